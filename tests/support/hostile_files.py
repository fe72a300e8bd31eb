"""Model files as nobody should write them, for tests of those who read them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

COUNTS = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]
"""Counts that headers may have."""

ODD: Sequence[Any] = [
    *(None, True, False, 0, 1, -5, 3, 2**31, 10**9, 10**12, 2**63, 10**30, -1.5, 0.0, 1e-320, 1e308, float("inf")),
    *(float("nan"), "", "5", "silu", [], [None], [1, "a"], [10**12], [[]], {}, {"a": {}}, [{}], {"rope_type": []}),
    {"rope_type": "yarn", "factor": "x"},
    {"rope_type": "longrope", "short_factor": 5, "long_factor": [1.0]},
    {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 1},
    {"quant_method": "fp8", "ignored_layers": 5},
    {"quant_method": "compressed-tensors", "config_groups": [1]},
    {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": ["re:(a+)+$"]},
]
"""Values that a field of config.json may have."""


def gguf(
    values: Sequence[bytes], tensors: Sequence[bytes], data: bytes = b"", counts: tuple[int, int] | None = None
) -> bytes:
    """A GGUF file of these entries; `counts`: of tensors and values, as its header has them."""
    tensor_count, value_count = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, value_count) + b"".join((*values, *tensors))
    return head + bytes(-len(head) % 32) + data


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def value(name: str, kind: int, content: bytes) -> bytes:
    """An entry of the metadata; `kind` is a GGUFValueType."""
    return text(name.encode()) + struct.pack("<I", kind) + content


def tensor(name: str, shape: Sequence[int], kind: int, offset: int, dimensions: int | None = None) -> bytes:
    """An entry of a tensor. `shape` is in GGUF's order."""
    count = len(shape) if dimensions is None else dimensions
    return text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def nested(depth: int) -> bytes:
    """A list of one list of one list ..."""
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


sizes = st.one_of(st.integers(0, 40), st.sampled_from(COUNTS))


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """Files that are nearly right."""
    scalar = st.one_of(
        st.builds(lambda n: (4, struct.pack("<I", n)), st.integers(0, 2**32 - 1)),
        st.builds(lambda n: (6, struct.pack("<f", n)), st.floats(width=32)),
        st.builds(lambda t, n: (8, text(t, n)), st.binary(max_size=8), st.one_of(st.none(), sizes)),
        st.builds(lambda k, n, d: (9, struct.pack("<IQ", k, n) + d), st.integers(0, 13), sizes, st.binary(max_size=99)),
        st.builds(lambda depth: (9, nested(depth)), st.integers(0, 2000)),
        st.builds(lambda kind: (kind, bytes(8)), st.integers(0, 14)),
    )
    names = st.sampled_from(["general.architecture", "general.alignment", "llama.block_count", "a", "b"])
    values = [value(name, *each) for name, each in draw(st.lists(st.tuples(names, scalar), max_size=4))]
    shapes = st.lists(sizes, min_size=0, max_size=5)
    tensors = [
        tensor(*each)
        for each in draw(
            st.lists(
                st.tuples(
                    st.sampled_from(["x", "y", "token_embd.weight"]),
                    shapes,
                    st.integers(0, 40),
                    st.one_of(st.sampled_from([0, 32, 64, 128]), sizes),
                    st.one_of(st.none(), st.sampled_from([0, 1, 4, 2**32 - 1])),
                ),
                max_size=4,
            )
        )
    ]
    counts = draw(st.one_of(st.none(), st.tuples(sizes, sizes)))
    return gguf(values, tensors, draw(st.sampled_from([b"", bytes(128), bytes(4096)])), counts)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Files that are nearly right: tensors one behind the other, of which some numbers are others."""
    dtypes = {"F32": 4, "F16": 2, "I8": 1, "F64": 8}
    header: dict[str, Any] = {}
    at = 0
    for i in range(draw(st.integers(0, 4))):
        dtype, shape = draw(st.sampled_from([*dtypes])), draw(st.lists(st.integers(0, 4), max_size=3))
        size = dtypes[dtype]
        for each in shape:
            size *= each
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    odd = st.one_of(sizes, st.integers(-3, 3), st.sampled_from([*ODD]))
    for name in list(header):
        entry = header[name]
        match draw(st.integers(0, 9)):
            case 0:
                entry["shape"] = draw(st.lists(sizes, max_size=9))
            case 1:
                entry["data_offsets"] = draw(st.lists(sizes, min_size=1, max_size=3))
            case 2:
                entry[draw(st.sampled_from([*entry]))] = draw(odd)
            case 3:
                del entry[draw(st.sampled_from([*entry]))]
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.sampled_from([{"format": "pt"}, {"shape": "x"}, {}]))
    data = bytes(draw(st.sampled_from([at, at, at, at + 1, max(0, at - 1)])))
    length = draw(st.one_of(st.none(), st.none(), st.none(), sizes))
    return safetensors(header, data, length)


Edits = list[tuple[int, int | None, Any]]

config_edits: st.SearchStrategy[Edits] = st.lists(
    st.tuples(st.integers(0, 99), st.one_of(st.none(), st.integers(0, 9)), st.sampled_from(ODD)),
    min_size=1,
    max_size=3,
)


def edited(config: Mapping[str, Any], edits: Edits) -> dict[str, Any]:
    """The config with other values of some fields, or of fields of its objects: the edits have the numbers of both."""
    changed: dict[str, Any] = deepcopy(dict(config))
    for number, inner, odd in edits:
        target, name = changed, sorted(changed)[number % len(changed)]
        if inner is not None and isinstance(target[name], dict) and target[name]:
            target = target[name]
            name = sorted(target)[inner % len(target)]
        target[name] = deepcopy(odd)
    return changed


EXTRA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "quantization_config": None,
    "layer_types": None,
    "rope_scaling": None,
    "max_window_layers": 28,
    "head_dim": 16,
    "num_experts": 8,
    "mlp_only_layers": [],
    "text_config": None,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 64,
}
"""Fields that any config may have."""
