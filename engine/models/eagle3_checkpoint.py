"""EAGLE-3 heads on disk: their shape, tensors and weights, in the two public layouts, read as they are published.

- SafeAILab's (github.com/SafeAILab/EAGLE; also what SpecForge, AngelSlim and Model Optimizer write): config.json is a
  Llama configuration with `draft_vocab_size` and architecture "LlamaForCausalLMEagle3"; tensors `midlayer.*` (or
  `layers.0.*`), `fc`, `norm`, `lm_head`, `d2t`, `t2d`, and `embed_tokens` where the head has its own; in
  model.safetensors or pytorch_model.bin.
- speculators' (github.com/vllm-project/speculators): config.json has `speculators_model_type` "eagle3" and the layer's
  shape in `transformer_layer_config`; tensors `layers.0.*` and the same others; model.safetensors.

`d2t[i]` is the target's id of the head's token i, minus i; `t2d` says the same as a mask, and is not needed. Matrices
may also be stored as int8 with one scale per row (`NAME.weight` int8, `NAME.weight_scale` float32), as in the heads
that come with Pilotfish. torch is imported only to read weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pilotfish.checkpoints.huggingface import read_json
from pilotfish.checkpoints.values import Values, is_id
from pilotfish.engine.models import head_files, llama
from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.models.head_files import check_features, shared_tensors
from pilotfish.engine.models.plausible import check_config, readable
from pilotfish.engine.models.tensors import attention, gated_mlp, linear, norm
from pilotfish.engine.weights.tensors import Tensor, by_name
from pilotfish.errors import ModelError

if TYPE_CHECKING:
    import torch


def read_config(folder: Path) -> Eagle3Config:
    """The head's shape. Raises ModelError for a head that the engine does not know."""
    path = folder / "config.json"
    raw = read_json(path)
    values = Values(path, raw)
    layer = values.within("transformer_layer_config").raw or raw
    if raw.get("norm_before_fc"):
        raise ModelError(f"{path}: norm_before_fc is set, but the engine knows EAGLE-3 heads without it")
    if (layers := layer.get("num_hidden_layers", 1)) != 1:
        raise ModelError(f"{path}: num_hidden_layers is {layers}, but the engine knows EAGLE-3 heads with 1")
    shape = {"model_type": "llama", **layer, "num_hidden_layers": 1}
    with readable(path):
        decoder = check_config(path, llama.read_hf(Values(path, shape)))
    extra, name = values.within("eagle_config").raw, "eagle_aux_hidden_state_layer_ids"
    ids = raw.get(name) or extra.get(name) or ()
    if ids and not (isinstance(ids, list) and len(ids) == 3 and all(map(is_id, ids))):
        raise ModelError(f"{path}: {name} is {ids!r:.200}, but must name three layers")
    return Eagle3Config(
        decoder=decoder,
        draft_vocab_size=values.size("draft_vocab_size", decoder.vocab_size),
        target_hidden_size=values.size("target_hidden_size", decoder.hidden_size),
        feature_layers=tuple(ids),
        norm_before_residual=bool(raw.get("norm_before_residual", False)),
    )


def tensors_of(config: Eagle3Config) -> dict[str, Tensor]:
    """Every tensor by its name, as `read_weights` returns it; head and embedding may be the target's."""
    return by_name(_tensors(config))


def _tensors(config: Eagle3Config) -> Iterator[Tensor]:
    decoder, hidden = config.decoder, config.decoder.hidden_size
    yield from linear("fc", "", (hidden, 3 * config.target_hidden_size))
    yield norm("layer.input_layernorm", "", hidden)
    yield norm("layer.hidden_norm", "", hidden)
    yield from attention(decoder, "layer.self_attn.", "", inputs=2 * hidden)
    yield norm("layer.post_attention_layernorm", "", hidden)
    yield from gated_mlp(decoder, "layer.mlp.", "")
    yield norm("norm", "", hidden)
    yield from linear("lm_head", "", (config.draft_vocab_size, hidden))
    yield from linear("embed_tokens", "", (decoder.vocab_size, hidden))


def check_target(name: str, head: Eagle3Config, target: ModelConfig) -> None:
    """Raise ConfigError unless the head, a drafter called `name`, reads hidden states that the target has."""
    check_features(name, head.target_hidden_size, head.features_of(target), target)


def optional(config: Eagle3Config) -> set[str]:
    """The names of tensors that a head may take from its target instead."""
    return shared_tensors(config.draft_vocab_size, config.decoder.vocab_size)


def declared_name(stored: str) -> str:
    """The declared name of a stored tensor, which is the same in both layouts."""
    name = stored.removeprefix("model.")
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return "layer." + name.removeprefix(prefix)
    return name


def read_weights(folder: Path, config: Eagle3Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The head's tensors, as `head_files.read_weights` returns them."""
    decoder = config.decoder
    return head_files.read_weights(
        folder, tensors_of(config), optional(config), declared_name, dtype, config.draft_vocab_size, decoder.vocab_size
    )
