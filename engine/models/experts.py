"""What families with mixtures of experts share: reading their shape, declaring their tensors, making their half of a
layer. No torch until a layer is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.gguf_header import Header
from pilotfish.checkpoints.values import Values
from pilotfish.engine.models.config import ExpertConfig, ModelConfig
from pilotfish.engine.models.plausible import MOST_LAYERS
from pilotfish.engine.models.tensors import gated_mlp, linear
from pilotfish.engine.weights.tensors import Tensor

if TYPE_CHECKING:
    from pilotfish.engine.layers.experts import ExpertMlp
    from pilotfish.engine.models.weight_store import LayerWeights

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def hf_experts(values: Values, **special: Any) -> ExpertConfig:
    """The experts that a config.json describes in Qwen's words, but for `special` fields."""
    layers = values.size("num_hidden_layers", most=MOST_LAYERS)
    count = values.size("num_experts" if values.get("num_local_experts") is None else "num_local_experts")
    step, dense = values.size("decoder_sparse_step", 1), frozenset(map(int, values.numbers("mlp_only_layers", ())))
    fields: dict[str, Any] = {
        "count": count,
        "per_token": values.size("num_experts_per_tok"),
        "normalized": bool(values.get("norm_topk_prob", False)),
        "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % step),
    }
    if "size" not in special:
        fields["size"] = values.size("moe_intermediate_size")
    return ExpertConfig(**fields | special)


def gguf_experts(header: Header, **special: Any) -> ExpertConfig:
    """The experts that a GGUF file's header describes, but for `special` fields."""
    values = header.values
    fields: dict[str, Any] = {
        "count": values.size("expert_count"),
        "per_token": values.size("expert_used_count"),
        "size": values.size("expert_feed_forward_length", values.optional_size("feed_forward_length")),
        "normalized": True,
    }
    return ExpertConfig(**fields | special)


def expert_tensors(
    config: ModelConfig,
    hf: str,
    gguf: str,
    *,
    router: str = "gate",
    names: tuple[str, str, str] = GATE_UP_DOWN,
) -> Iterator[Tensor]:
    """The router and experts of a layer; `hf` and `gguf` are prefixes of their names, `names` those of an expert's
    matrices. GGUF files hold one matrix of all experts."""
    assert config.experts is not None
    hidden, inner = config.hidden_size, config.experts.size
    shape = config.experts.count, hidden
    biased = config.experts.biased
    yield from linear(f"{hf}{router}", f"{gguf}ffn_gate_inp", shape, quantizable=False, bias=biased)
    gate, up, down = names
    for i in range(config.experts.count):
        path = f"{hf}experts.{i}."
        for name, kind in ((gate, "gate"), (up, "up")):
            yield from linear(
                path + name,
                f"{gguf}ffn_{kind}.{i}",
                (inner, hidden),
                rows="expert",
                bias=biased,
                fused=f"{path}gate_up",
                gguf_stored=f"{gguf}ffn_{kind}_exps",
                expert=i,
            )
        yield from linear(
            path + down,
            f"{gguf}ffn_down.{i}",
            (hidden, inner),
            columns="expert",
            bias=biased,
            gguf_stored=f"{gguf}ffn_down_exps",
            expert=i,
        )


def shared_tensors(config: ModelConfig, hf: str, gguf: str) -> Iterator[Tensor]:
    """The expert that every row takes, and its gate."""
    yield from gated_mlp(config, f"{hf}shared_expert.", gguf, shared=True)
    shape = 1, config.hidden_size
    yield from linear(f"{hf}shared_expert_gate", f"{gguf}ffn_gate_inp_shexp", shape, quantizable=False)


def expert_mlp(
    weights: LayerWeights, config: ModelConfig, prefix: str, *, router: str = "gate", down: str = "down_proj"
) -> ExpertMlp:
    """The second half of a layer; `prefix` is that of its tensors within the layer."""
    from pilotfish.engine.layers.decoder import DenseMlp
    from pilotfish.engine.layers.experts import Expert, ExpertMlp
    from pilotfish.engine.layers.native_experts import NativeExperts

    assert config.experts is not None
    here = {i for i in range(config.experts.count) if weights.has(f"{prefix}experts.{i}.gate_up")}
    paths = [f"{prefix}experts.{i}." for i in range(config.experts.count)]
    shared = shared_gate = None
    if config.experts.shared_size:
        shared_gate = weights.linear(f"{prefix}shared_expert_gate")
        path = f"{prefix}shared_expert."
        shared = DenseMlp(weights.linear(f"{path}gate_up_proj"), weights.linear(f"{path}down_proj"), "silu")
    experts = [
        Expert(weights.linear(f"{path}gate_up"), weights.linear(path + down)) if i in here else None
        for i, path in enumerate(paths)
    ]
    pairs = [None if expert is None else (expert.gate_up, expert.down) for expert in experts]
    return ExpertMlp(
        router=weights.linear(prefix + router),
        experts=experts,
        native=NativeExperts.of(pairs) if config.experts.clamp is None else None,
        per_token=config.experts.per_token,
        normalized=config.experts.normalized,
        shared=shared,
        shared_gate=shared_gate,
        chosen_only=config.experts.clamp is not None,
        clamp=config.experts.clamp,
    )
