"""DFlash and DSpark drafters on disk: shape, tensors and weights, in the three public layouts, read as published.

- z-lab's (github.com/z-lab/dflash): config.json is a Qwen3 configuration with `block_size`, and `dflash_config` with
  `mask_token_id` and `target_layer_ids`; the embedding and the head are the target's.
- speculators' (github.com/vllm-project/speculators): `speculators_model_type` "dflash", the layers' shape in
  `transformer_layer_config`, `aux_hidden_state_layer_ids`, and a vocabulary of its own with `lm_head`, `d2t`, `t2d`.
- DeepSpec's (github.com/deepseek-ai/DeepSpec): a Qwen3 configuration of architecture "Qwen3DSparkModel" with
  `block_size`, `mask_token_id` and `target_layer_ids`; with copies of the target's embedding and head.

DSpark's, in the last two layouts, also have `markov_head.*` and `confidence_head.proj`, and `markov_rank`,
`markov_head_type`, `enable_confidence_head`, `confidence_head_with_markov`; speculators calls them "dspark".

All have `fc`, `hidden_norm`, `layers.N.*` of Qwen3's layers and `norm`. z-lab and DeepSpec number a layer by its
output, speculators and `FeatureTap` by its input. Quantized matrices are as in `head_files`. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.huggingface import read_json
from pilotfish.checkpoints.values import Values, is_id
from pilotfish.engine.models import head_files, llama
from pilotfish.engine.models.config import SEQUENTIAL, DFlashConfig, ModelConfig
from pilotfish.engine.models.head_files import EMBEDDING, check_features, shared_tensors
from pilotfish.engine.models.plausible import check_config, readable
from pilotfish.engine.models.tensors import attention, gated_mlp, linear, norm
from pilotfish.engine.weights.tensors import Tensor, by_name

if TYPE_CHECKING:
    import torch

LOOKED_UP = "markov_head.markov_w1.weight"

LARGEST_BLOCK = 1024

_SLIDING = "sliding_attention"


def read_config(folder: Path) -> DFlashConfig:
    """The drafter's shape. Raises ModelError for one that the engine does not know."""
    path = folder / "config.json"
    with readable(path):
        return _read_config(path, read_json(path))


def _read_config(path: Path, raw: dict[str, Any]) -> DFlashConfig:
    own: dict[str, Any] = {**raw, **(raw.get("dflash_config") or {})}
    values, speculators = Values(path, own), bool(raw.get("speculators_model_type"))
    layers = Values(path, raw.get("transformer_layer_config") or raw)
    decoder, causal = _with_windows(_decoder(layers), layers, own, speculators)
    check_config(path, decoder)
    block_size, mask = values.size("block_size"), values.get("mask_token_id")
    of_deepspec = "Qwen3DSparkModel" in (raw.get("architectures") or ())
    first_drafts = bool(own.get("sample_from_anchor", of_deepspec or raw.get("speculators_model_type") == "dspark"))
    rank, sequential = own.get("markov_rank") or 0, own.get("markov_head_type") or "vanilla"
    if not is_id(rank):
        raise values.error(f"markov_rank is {rank!r:.200}, but must be a number from 0")
    if sequential not in SEQUENTIAL:
        raise values.error(f"markov_head_type is {sequential!r}, but the engine knows {', '.join(SEQUENTIAL)}")
    confidence = bool(own.get("enable_confidence_head", False))
    reads_token = confidence and bool(own.get("confidence_head_with_markov", True))
    if reads_token and not rank:
        raise values.error("confidence_head_with_markov is set, but markov_rank is 0: there is no token to read")
    if not 2 - first_drafts <= block_size <= LARGEST_BLOCK:
        raise values.error(f"block_size is {block_size}, but must be {2 - first_drafts} to {LARGEST_BLOCK}")
    if not is_id(mask) or mask >= decoder.vocab_size:
        raise values.error(
            f"mask_token_id is {mask!r}, but must be a token of the vocabulary, 0 to {decoder.vocab_size - 1}"
        )
    return DFlashConfig(
        decoder=decoder,
        draft_vocab_size=values.size("draft_vocab_size", decoder.vocab_size),
        target_hidden_size=values.size("target_hidden_size", decoder.hidden_size),
        feature_layers=_feature_layers(values, decoder, speculators),
        block_size=block_size,
        mask_token_id=mask,
        first_drafts=first_drafts,
        causal_layers=causal if any(causal) else (),
        sequential=sequential,
        rank=rank,
        confidence=confidence,
        confidence_reads_token=reads_token,
    )


def _decoder(layers: Values) -> ModelConfig:
    """The layers' shape. They are Qwen3's, whatever model the configuration was derived from."""
    raw = {name: value for name, value in layers.raw.items() if name not in ("layer_types", "sliding_window")}
    if raw.get("model_type") != "qwen3":
        heads = layers.size("num_attention_heads")
        defaults = {"num_key_value_heads": heads, "head_dim": layers.size("hidden_size") // heads}
        raw = defaults | {name: value for name, value in raw.items() if value is not None}
    return llama.read_hf(Values(layers.path, raw | {"model_type": "qwen3"}))


def _with_windows(
    decoder: ModelConfig, layers: Values, own: dict[str, Any], speculators: bool
) -> tuple[ModelConfig, tuple[bool, ...]]:
    """The shape with its sliding windows, and which layers are causal. Published configurations say neither of most
    layers: those with a window are causal then, and the others not."""
    count = decoder.num_layers
    kinds = layers.get("layer_types") or ["full_attention"] * count
    if len(kinds) != count:
        raise layers.error(f"layer_types has {len(kinds)} entries, but num_hidden_layers is {count}")
    slides = tuple(kind == _SLIDING for kind in kinds)
    if own.get("use_swa") and not any(slides):
        slides, causal = (True,) * count, (False,) * count
    else:
        causal = slides
    if own.get("sliding_window_non_causal"):
        causal = (False,) * count
    said = own.get("is_causal", own.get("causal"))
    if said is not None and not speculators:
        causal = (bool(said),) * count
    if not any(slides):
        return decoder, causal
    window = own.get("swa_window_size") or layers.get("sliding_window")
    if not is_id(window) or not window:
        raise layers.error(f"sliding_window is {window!r}, but layers slide: it must be a positive number")
    return replace(decoder, sliding_window=window, sliding_layers=slides), causal


def _feature_layers(values: Values, decoder: ModelConfig, speculators: bool) -> tuple[int, ...]:
    name = "aux_hidden_state_layer_ids" if speculators else "target_layer_ids"
    ids = values.get(name)
    if ids is None and not speculators:
        ids = _spread(values.size("num_target_layers"), decoder.num_layers)
    if not isinstance(ids, list) or not ids or not all(each == -1 or is_id(each) for each in ids):
        raise values.error(f"{name} is {ids!r:.200}, but must be numbers of the target's layers")
    return tuple(each if speculators else each + 1 for each in ids)


def _spread(target_layers: int, count: int) -> list[int]:
    """The layers that z-lab's drafters read unless they name others."""
    if count == 1:
        return [target_layers // 2]
    return [round(1 + i * (target_layers - 4) / (count - 1)) for i in range(count)]


def tensors_of(config: DFlashConfig) -> dict[str, Tensor]:
    """Every tensor by its name, as `read_weights` returns it; head and embedding may be the target's."""
    return by_name(_tensors(config))


def _tensors(config: DFlashConfig) -> Iterator[Tensor]:
    decoder, hidden = config.decoder, config.decoder.hidden_size
    yield from linear("fc", "", (hidden, len(config.feature_layers) * config.target_hidden_size))
    yield norm("hidden_norm", "", hidden)
    for i in range(decoder.num_layers):
        yield norm(f"layers.{i}.input_layernorm", "", hidden)
        yield from attention(decoder, f"layers.{i}.self_attn.", "")
        yield norm(f"layers.{i}.post_attention_layernorm", "", hidden)
        yield from gated_mlp(decoder, f"layers.{i}.mlp.", "")
    yield norm("norm", "", hidden)
    yield from linear("lm_head", "", (config.draft_vocab_size, hidden))
    yield from linear("embed_tokens", "", (decoder.vocab_size, hidden))
    if rank := config.rank:
        yield from linear("markov_head.markov_w1", "", (decoder.vocab_size, rank))
        yield from linear("markov_head.markov_w2", "", (config.draft_vocab_size, rank))
        if config.sequential == "gated":
            yield from linear("markov_head.gate_proj", "", (rank, hidden + rank), bias=True)
        elif config.sequential == "rnn":
            yield from linear("markov_head.joint_proj", "", (3 * rank, 2 * rank + hidden), bias=True)
    if config.confidence:
        inputs = hidden + (config.rank if config.confidence_reads_token else 0)
        yield from linear("confidence_head.proj", "", (1, inputs), bias=True)


def check_target(name: str, config: DFlashConfig, target: ModelConfig) -> None:
    """Raise ConfigError unless the drafter, called `name`, reads hidden states that the target has."""
    check_features(name, config.target_hidden_size, config.feature_layers, target)


def optional(config: DFlashConfig) -> set[str]:
    """The names of tensors that a drafter may take from its target instead."""
    return shared_tensors(config.draft_vocab_size, config.decoder.vocab_size)


def read_weights(folder: Path, config: DFlashConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The drafter's tensors, as `head_files.read_weights` returns them."""
    return head_files.read_weights(
        folder,
        tensors_of(config),
        optional(config),
        lambda stored: stored.removeprefix("model."),
        dtype,
        config.draft_vocab_size,
        config.decoder.vocab_size,
        (EMBEDDING, LOOKED_UP),
    )
