"""The quantization_config of a Hugging Face config.json, as far as the engine knows it: fp8; and which matrices can be
in fp8. No torch.

Three ways in which Llama 3.1's fp8 checkpoints are published, all with weights in float8_e4m3fn and `weight_scale`:

- "fbgemm_fp8", Meta's own: a scale for each output channel (transformers, integrations/fbgemm_fp8.py);
- "compressed-tensors" with 8-bit floats, llm-compressor's: a scale for each output channel or for the whole matrix
  (https://github.com/vllm-project/compressed-tensors);
- "fp8", AutoFP8's: a scale for the whole matrix (https://github.com/neuralmagic/AutoFP8).

Activations get the scale of each row, whatever scale was found for them when the checkpoint was made.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pilotfish.engine.models.config import Fp8Config
from pilotfish.errors import ModelError

IGNORED_TENSORS = ("input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale")
"""Ends of names: static scales of activations and of a KV cache, which the engine does not use."""

_METHODS = "fbgemm_fp8, fp8 (AutoFP8) and compressed-tensors with 8-bit floats"


def read_fp8(path: Path, raw: dict[str, Any]) -> Fp8Config | None:
    """What `raw`, a config.json, says of its weights; None: they are plain. Raises ModelError for other schemes."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method")
    if method == "fbgemm_fp8":
        return Fp8Config(unquantized=tuple(found.get("modules_to_not_convert") or ()))
    if method == "fp8":
        if found.get("weight_block_size"):
            raise _unknown(path, "fp8 with scales for blocks of a matrix (weight_block_size)")
        ignored = found.get("ignored_layers") or found.get("modules_to_not_convert") or ("lm_head",)
        return Fp8Config(unquantized=tuple(ignored))
    if method == "compressed-tensors":
        for group in (found.get("config_groups") or {}).values():
            _check_group(path, group)
        return Fp8Config(unquantized=tuple(found.get("ignore") or ()))
    raise _unknown(path, repr(method))


def is_quantizable(name: str, unquantized: tuple[str, ...] = ()) -> bool:
    """Whether the tensor is a matrix of a layer, and not of one of the modules `unquantized`."""
    module = name.removesuffix(".weight")
    if module == name or not re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj", module):
        return False
    return not any(_names(pattern, module) for pattern in unquantized)


def _names(pattern: str, module: str) -> bool:
    """compressed-tensors: a name, or "re:" and what a name begins with; transformers: also a part of a name's path."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."


def _check_group(path: Path, group: dict[str, Any]) -> None:
    weights = group.get("weights") or {}
    scheme = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    if scheme[:2] != ("float", 8) or scheme[2] not in ("tensor", "channel") or not weights.get("symmetric", True):
        raise _unknown(path, f"compressed-tensors with weights of {scheme[1]}-bit {scheme[0]} by {scheme[2]}")


def _unknown(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path}: the weights are quantized ({what}), but the engine knows {_METHODS}, plain weights, and GGUF files"
    )
