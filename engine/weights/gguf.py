"""GGUF files of the Llama family and Gemma 3: hyper-parameters as a ModelConfig, tensors dequantized under Hugging
Face's names.

Metadata keys and tensor names are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `gguf_header`
reads them, the gguf package dequantizes. The tokenizer inside the file is the server's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from pilotfish.checkpoints.gguf_header import Header, TensorPlace, eos_token_ids, read_header
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.weights.names import Part, check_names, check_shape, expected_shapes, shape_of, whole
from pilotfish.errors import ModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
"""Mistral's models are "llama" in this format."""

ROPE_FACTORS = "rope_freqs.weight"

CHUNK = 1 << 18
"""Values that are dequantized at a time: the gguf package's intermediate arrays then stay in the processor's cache."""

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read_config(path: Path) -> ModelConfig:
    """The shape that the file's metadata and tensors describe. Raises ModelError for a model that the engine does not
    know, and for a file that lacks a value."""
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path}: the architecture is {architecture!r}, but the engine knows {', '.join(ARCHITECTURES)}"
        )
    values = _Values(path, architecture, header.metadata)
    if experts := values.get("expert_count", 0):
        raise ModelError(f"{path}: the model is a mixture of {experts} experts, but the engine knows dense ones only")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{path} lacks tensor 'token_embd.weight', or it is not a matrix")
    hidden, heads = values.size("embedding_length"), values.size("attention.head_count")
    head_dim = values.get("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := values.get(name, head_dim)) != head_dim:
            raise ModelError(
                f"{path}: {architecture}.{name} is {size}, but the engine needs that of a head's keys, {head_dim}"
            )
    gemma3 = _gemma3(path, values) if architecture == "gemma3" else {}
    return ModelConfig(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=values.size("feed_forward_length"),
        num_layers=values.size("block_count"),
        num_heads=heads,
        num_kv_heads=values.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=values.size("context_length"),
        rms_norm_eps=values.get("attention.layer_norm_rms_epsilon", 1e-5),
        rope=_rope(path, header, values),
        tie_embeddings="output.weight" not in header.tensors,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        output_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_up.bias" in header.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in header.tensors,
        sliding_window=values.get("attention.sliding_window", None),
        eos_token_ids=eos_token_ids(header.metadata),
        bos_token_id=header.metadata.get("tokenizer.ggml.bos_token_id"),
        dtype=_dtype(header),
        **gemma3,
    )


def iter_weights(
    path: Path, config: ModelConfig, dtype: torch.dtype, parts: Mapping[str, Part] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `engine.weights.iter_weights`; on the CPU. Dequantized in float32, then rounded to `dtype`.

    Rows are read as far as they are wanted, and of them the blocks that hold a wanted column are dequantized.
    """
    tensors = read_header(path).tensors
    places = {_hf_name(name, config): place for name, place in tensors.items() if not _derived(name)}
    shapes = expected_shapes(config)
    check_names(path, places.keys(), shapes.keys())
    with path.open("rb") as file:
        for name, shape in shapes.items():
            check_shape(path, places[name].name, places[name].shape, shape)
        for name, part in ({name: whole(shape) for name, shape in shapes.items()} if parts is None else parts).items():
            tensor = _read(path, file, places[name], part)
            if config.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
                tensor = _halves(tensor, len(tensor) // config.head_dim)
            elif config.architecture == "gemma3" and name.endswith("norm.weight"):
                tensor = tensor - 1  # llama.cpp's converter stores what is multiplied by, Hugging Face one less
            yield name, tensor.to(dtype)


class _Values:
    """The metadata of one architecture."""

    def __init__(self, path: Path, architecture: str, metadata: dict[str, Any]) -> None:
        self._path, self._architecture, self._metadata = path, architecture, metadata

    def get(self, name: str, default: Any) -> Any:
        return self._metadata.get(f"{self._architecture}.{name}", default)

    def size(self, name: str, default: int | None = None) -> int:
        """Also refuses what some models have for each layer: a list."""
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self._path}: {self._architecture}.{name} is {value!r}, but must be a positive number")
        return value


def _rope(path: Path, header: Header, values: _Values) -> RopeConfig:
    theta = float(values.get("rope.freq_base", 10000.0))
    kind = values.get("rope.scaling.type", "none")
    factor = float(values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)))
    factors = header.tensors.get(ROPE_FACTORS)
    if kind not in ("none", "linear"):
        raise ModelError(f"{path}: rope.scaling.type is {kind!r}, but the engine knows 'none' and 'linear'")
    scaled = factor != 1.0 and (kind == "linear" or "rope.scaling.type" not in header.metadata)
    freq_factors = None
    if factors is not None:
        with path.open("rb") as file:
            freq_factors = tuple(_read(path, file, factors, whole(factors.shape)).tolist())
    return RopeConfig(
        theta=theta, kind="linear" if scaled else "default", factor=factor if scaled else 1.0, freq_factors=freq_factors
    )


def _gemma3(path: Path, values: _Values) -> dict[str, Any]:
    """What only Gemma 3 has. Values that its files leave out are those that llama.cpp's src/models/gemma3.cpp takes."""
    if (cap := values.get("final_logit_softcapping", 0.0)) != 0.0:
        raise ModelError(f"{path}: gemma3.final_logit_softcapping is {cap}, but the engine knows Gemma 3 without")
    layers = values.size("block_count")
    pattern = values.get("attention.sliding_window_pattern", 6)
    if values.get("attention.sliding_window", 0) == 0:
        sliding = (False,) * layers
    elif isinstance(pattern, int):  # the last of every so many layers sees everything
        sliding = tuple(pattern == 0 or (i + 1) % pattern != 0 for i in range(layers))
    else:
        sliding = tuple(map(bool, pattern))
    if len(sliding) != layers:
        raise ModelError(f"{path}: sliding_window_pattern has {len(sliding)} layers, but the model {layers}")
    local_rope = RopeConfig(theta=float(values.get("rope.freq_base_swa", 10000.0)))
    # Only the 27B model, which the number of its layers gives away, scales by something else than a head's size.
    scale = (values.size("embedding_length") // values.size("attention.head_count")) ** -0.5 if layers == 62 else None
    return {
        "sliding_layers": sliding,
        "local_rope": local_rope,
        "attention_scale": scale,
        "sandwich_norms": True,
    }


def _dtype(header: Header) -> str:
    """The file's own where it is plain. The quantized ones come from bfloat16 models nearly always, and float16 could
    overflow where those do not."""
    plain = {Kind.F32: "float32", Kind.F16: "float16"}
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) == 2}
    return plain.get(next(iter(kinds)), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _hf_name(name: str, config: ModelConfig) -> str:
    """Hugging Face's name of a tensor, or its own if it has none there."""
    layer_names = _GEMMA3_LAYER_NAMES if config.architecture == "gemma3" else _LAYER_NAMES
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in layer_names:
        return f"model.layers.{parts[1]}.{layer_names[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _NAMES:
        return f"{_NAMES[parts[0]]}.{parts[1]}"
    return name


def _derived(name: str) -> bool:
    """Rotary frequencies: those of the whole model are in its RopeConfig, old files have copies in each layer."""
    return name == ROPE_FACTORS or name.endswith((".attn_rot_embd.weight", ".rope_freqs.weight"))


def _read(path: Path, file: BinaryIO, place: TensorPlace, part: Part) -> torch.Tensor:
    """float32, that part of a vector or matrix."""
    block, size = GGML_QUANT_SIZES[place.kind]
    if len(part) == 1:
        (columns,), rows, height = part, slice(0, 1), 1
    else:
        rows, columns = part
        height = place.shape[0]
    row_bytes = place.size // height
    file.seek(place.offset + rows.start * row_bytes)
    count = rows.stop - rows.start
    raw = np.fromfile(file, dtype=np.uint8, count=count * row_bytes).reshape(count, row_bytes)
    first, last = columns.start // block, -(-columns.stop // block)
    raw = raw[:, first * size : last * size]
    skipped = columns.start - first * block
    tensor = _dequantized(path, place, raw, (last - first) * block)
    return tensor[:, skipped : skipped + columns.stop - columns.start].reshape(shape_of(part))


def _dequantized(path: Path, place: TensorPlace, raw: np.ndarray, width: int) -> torch.Tensor:
    """float32 (rows, width) of (rows, bytes) uint8."""
    plain = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    if place.kind in plain:
        return torch.from_numpy(np.ascontiguousarray(raw)).view(plain[place.kind]).float()
    step = max(1, CHUNK // width)
    values = np.empty((len(raw), width), dtype=np.float32)
    try:
        for i in range(0, len(raw), step):
            values[i : i + step] = gguf.dequantize(np.ascontiguousarray(raw[i : i + step]), place.kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{path}: tensor {place.name!r} is {place.kind.name}, which the gguf package cannot read"
        ) from error
    return torch.from_numpy(values)


def _halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (x0, y0, x1, y1, ...), where llama.cpp's converter puts the pairs that are rotated
    together, to Hugging Face's (x0, x1, ..., y0, y1, ...)."""
    size = len(tensor) // heads
    return tensor.view(heads, size // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
