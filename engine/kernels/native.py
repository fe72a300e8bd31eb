"""This package's own CPU kernels (native.c), in float32, called through ctypes.

They exist for two properties that a verify pass needs and that general matrix libraries do not promise:

- They are batch-invariant: a row's result is the same, to the last bit, however many rows are computed with it. So a
  verified token is the decoded token and not merely close to it.
- A pass over a handful of rows costs hardly more than a pass over one: weights are read once, in the order in which
  they lie in memory, and rows share them in registers.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence as Seq
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from pilotfish.engine.kernels.memory import Arena
from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.weights.blocks import Blocks, joined
from pilotfish.errors import ConfigError

VECTOR = 16
"""Floats in the widest vector register: sizes of norms, gates and heads must be multiples of it."""

GROUP = 32
"""GROUP of blocks.h."""
ACTIVATION_FLOATS = 12
"""The size of blocks.h's `struct activation`, in floats."""
QUANTIZED_AT_A_TIME = 1 << 22
"""Values of a matrix that are in float32 at a time while it is quantized."""

HALVES = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
"""Dtypes of 16 bits that matrices may have, and their kinds in blocks.h."""

CACHE_FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Dtypes that attention's cache may have, and their numbers in attention.h."""


class AttentionArguments(ctypes.Structure):
    """`struct attention` of attention.h, which documents the fields."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "keys", "values", "cu_query_lens", "context_lens", "block_tables")),
        *((name, c_void_p) for name in ("out", "scratch")),
        *((name, c_int64) for name in ("query_stride", "spans", "max_blocks", "heads", "kv_heads", "dim")),
        *((name, c_int64) for name in ("block_size", "window", "form")),
        ("scale", c_float),
    )


@cache
def load_library() -> ctypes.CDLL | None:
    """Load the compiled kernels; None where they were not built (no C compiler at installation)."""
    spec = importlib.util.find_spec("pilotfish.engine.kernels._native")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    for name in ("panel", "attention_scratch", "max_tile"):
        getattr(library, f"pilotfish_{name}").restype = c_int64
    library.pilotfish_attention_scratch.argtypes = (c_int64,) * 5
    library.pilotfish_max_tile.argtypes = (c_int,)
    signatures = {
        "pack": (c_void_p, c_void_p, c_int64, c_int64),
        "unpack_rows": (c_void_p, c_void_p, c_void_p, c_int64, c_int64),
        "linear": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        "pack_int8": (c_void_p, c_void_p, c_int64, c_int64),
        "linear_int8": (c_int, *(c_void_p,) * 6, c_int64, c_int64, c_int64),
        "pack_halves": (c_void_p, c_void_p, c_int64, c_int64),
        "fit_blocks": (c_int, c_void_p, c_void_p, c_int64, c_int64),
        "unpack_blocks": (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64),
        "linear_parts": (c_int, c_void_p, c_void_p, c_int64, *(c_void_p,) * 3, c_int64, c_int64, c_int64, c_void_p),
        "rms_norm": (c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_float),
        "silu_mul": (c_int, c_void_p, c_void_p, c_int64, c_int64),
        "gelu_mul": (c_int, c_void_p, c_void_p, c_int64, c_int64),
        "rotate": (c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        "mask": (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64),
        "write_cache": (c_int64, c_void_p, c_void_p, c_int64, *(c_void_p,) * 3, c_int64, c_int64, c_int64, c_int64),
        "attend": (c_int, POINTER(AttentionArguments)),
        "decode": (c_int, c_void_p, c_int64, c_void_p),
        "experts": (c_int, c_void_p),
        "low_rank": (c_int, *(c_void_p,) * 4, c_int64, c_int64),
        "draw": (c_int, *(c_void_p,) * 4, c_int64, c_int64, *(c_void_p,) * 3),
        "draft": (c_int, c_void_p, c_void_p, c_int64, c_void_p),
    }
    for name, arguments in signatures.items():
        function = getattr(library, f"pilotfish_{name}", None)
        if function is None:
            raise ConfigError(f"{spec.origin} was compiled from older sources: install the package again")
        function.argtypes, function.restype = arguments, None
    counts = {
        "space": (c_int64,) * 5,
        "block_bytes": (c_int64,) * 3,
        "draw_space": (c_int64,) * 2,
        "draft_space": (c_void_p, *(c_int64,) * 5),
        "pack_blocks": (c_void_p, c_void_p, c_int64, c_int64, c_int64),
    }
    for name, arguments in counts.items():
        function = getattr(library, f"pilotfish_{name}")
        function.argtypes, function.restype = arguments, c_int64
    return library


@dataclass(frozen=True, slots=True)
class NativeLinear:
    packed: torch.Tensor  # (panels, in_features, panel), see pilotfish_pack: float32, or int8 where there is a scale
    scale: torch.Tensor | None  # (out_features,) float32
    bias: torch.Tensor | None
    in_features: int
    out_features: int


class Part(ctypes.Structure):
    """`struct part` of blocks.h."""

    _fields_ = (("packed", c_void_p), ("kind", c_int64), ("first", c_int64), ("columns", c_int64))


@dataclass(frozen=True, slots=True)
class NativeBlocks:
    """A matrix in parts, of which some are in quantized blocks, or in 16 bits."""

    parts: ctypes.Array[Part]
    packed: tuple[torch.Tensor, ...]  # what the parts point to
    bias: torch.Tensor | None
    in_features: int
    out_features: int


class NativeKernels:
    """Kernels in float32 on the CPU. Raises RuntimeError where the library was not built.

    level: the instruction set: 0 the compiler's default, 1 AVX2, 2 AVX-512; None: the best that the processor has.
    vnni: whether quantized blocks are multiplied by the instructions for it; None: where the processor has them.
    """

    name = "native"

    def __init__(self, level: int | None = None, vnni: bool | None = None) -> None:
        library = load_library()
        if library is None:
            raise RuntimeError(
                "the native kernels were not built: install with a C compiler, or choose kernels 'torch'"
            )
        self._library = library
        self._arena = Arena()
        self.panel = int(library.pilotfish_panel())
        best = int(library.pilotfish_level())
        if level is not None and not 0 <= level <= best:
            raise ValueError(f"level is {level}, but this processor has 0 to {best}")
        self.level = best if level is None else level
        self.max_tile = int(library.pilotfish_max_tile(self.level))
        """Rows that are computed together."""
        self.vnni = bool(library.pilotfish_vnni(self.level)) if vnni is None else vnni
        if vnni and not library.pilotfish_vnni(self.level):
            raise ValueError(f"this processor has no VNNI at level {self.level}")
        self._blocks_level = self.level | (library.pilotfish_vnni(self.level) if self.vnni else 0)

    def prepare_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> NativeLinear | NativeBlocks:
        """See `Kernels.prepare_linear`. A matrix in 16 bits stays in them, with the results that it has in float32."""
        if weight.dtype in HALVES:
            return self.prepare_blocks([weight], bias)
        return self.prepare_panels(weight, bias, scale)

    def prepare_panels(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> NativeLinear:
        """As `prepare_linear`, of a matrix in float32 or int8."""
        library = self._library
        if weight.dtype == torch.int8 and scale is not None:
            pack, scale = library.pilotfish_pack_int8, _checked(scale).flatten()
        else:
            weight, pack, scale = _checked(weight), library.pilotfish_pack, None
        weight = weight.contiguous()
        out_features, in_features = weight.shape
        packed = self._arena.zeros((-(-out_features // self.panel), in_features, self.panel), weight.dtype)
        pack(weight.data_ptr(), packed.data_ptr(), out_features, in_features)
        bias = None if bias is None else _checked(bias).contiguous()
        return NativeLinear(packed, scale, bias, in_features, out_features)

    def prepare_blocks(self, parts: Seq[torch.Tensor | Blocks], bias: torch.Tensor | None = None) -> NativeBlocks:
        found = joined(parts, self.panel)
        packed, described, first = [], [], 0
        for part in found:
            rows = part.shape[0]
            if isinstance(part, Blocks):
                kind, data = int(part.kind), self._packed_blocks(part)
            elif part.dtype in HALVES:
                kind, data = int(HALVES[part.dtype]), self._packed_halves(part)
            else:
                kind, data = int(Kind.F32), self.prepare_panels(part).packed
            packed.append(data)
            described.append(Part(data.data_ptr(), kind, first, rows))
            first += rows
        array = (Part * len(described))(*described)
        bias = None if bias is None else _checked(bias).contiguous()
        return NativeBlocks(array, tuple(packed), bias, found[0].shape[1], first)

    def quantize_blocks(self, name: str, matrix: torch.Tensor, kind: Kind) -> Blocks:
        """Quantize a matrix of any floating dtype, whose rows are whole blocks, to Q8_0 or Q4_1. A block depends on its
        own values alone. `name` is for errors."""
        block, size = GGML_QUANT_SIZES[kind]
        rows, columns = matrix.shape
        out = torch.empty(rows, columns // block * size, dtype=torch.uint8)
        step = max(1, QUANTIZED_AT_A_TIME // columns)
        for start in range(0, rows, step):
            values = matrix[start : start + step].to(torch.float32).contiguous()
            self._library.pilotfish_fit_blocks(
                self._blocks_level, values.data_ptr(), out[start].data_ptr(), kind, values.numel() // block
            )
        return Blocks(name, kind, out)

    def _packed_halves(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        data = self._arena.zeros((-(-rows // self.panel), columns, self.panel), weight.dtype)
        weight = weight.contiguous()
        self._library.pilotfish_pack_halves(weight.data_ptr(), data.data_ptr(), rows, columns)
        return data

    def _packed_blocks(self, blocks: Blocks) -> torch.Tensor:
        rows, columns = blocks.shape
        size = self._library.pilotfish_block_bytes(blocks.kind, rows, columns)
        if not size:
            raise ValueError(f"tensor {blocks.name!r} is {blocks.kind.name}, which the kernels do not compute with")
        data = self._arena.zeros((size,), torch.uint8)
        stored = blocks.rows.contiguous()
        if self._library.pilotfish_pack_blocks(stored.data_ptr(), data.data_ptr(), blocks.kind, rows, columns):
            raise ValueError(f"tensor {blocks.name!r} has a block whose scale is not a finite number")
        return data

    def linear(
        self, x: torch.Tensor, weight: NativeLinear | NativeBlocks, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = torch.empty(len(x), weight.out_features)
        if isinstance(weight, NativeBlocks):
            space = torch.empty(len(x), ACTIVATION_FLOATS * (weight.in_features // GROUP))
            self._library.pilotfish_linear_parts(
                self._blocks_level,
                address(x),
                ctypes.addressof(weight.parts),
                len(weight.parts),
                address(weight.bias),
                address(residual),
                out.data_ptr(),
                len(x),
                weight.out_features,
                weight.in_features,
                space.data_ptr(),
            )
            return out
        scale = () if weight.scale is None else (address(weight.scale),)
        function = self._library.pilotfish_linear_int8 if scale else self._library.pilotfish_linear
        function(
            self.level,
            x.data_ptr(),
            weight.packed.data_ptr(),
            *scale,
            address(weight.bias),
            address(residual),
            out.data_ptr(),
            len(x),
            weight.out_features,
            weight.in_features,
        )
        return out

    def gated_linear(self, x: torch.Tensor, weight: NativeLinear | NativeBlocks, gate: Gate) -> torch.Tensor:
        gate_up = self.linear(x, weight)
        return self.silu_mul(gate_up) if gate == "silu" else self.gelu_mul(gate_up)

    def embed(self, ids: torch.Tensor, weight: NativeLinear | NativeBlocks) -> torch.Tensor:
        if isinstance(weight, NativeBlocks):
            (part,) = weight.parts
            out = torch.empty(len(ids), weight.in_features)
            self._library.pilotfish_unpack_blocks(
                part.packed, part.kind, ids.data_ptr(), out.data_ptr(), len(ids), weight.in_features
            )
            return out
        if weight.scale is not None:
            raise ValueError("an int8 matrix cannot be embedded from")
        out = torch.empty(len(ids), weight.in_features)
        self._library.pilotfish_unpack_rows(
            weight.packed.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), weight.in_features
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        groups, group_stride = (1, 0) if x.ndim == 2 else (x.shape[1], x.stride(1))
        out = torch.empty(x.shape)
        self._library.pilotfish_rms_norm(
            self.level,
            x.data_ptr(),
            x.stride(0),
            group_stride,
            weight.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            groups,
            x.shape[-1],
            eps,
        )
        return out

    def rotate_(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        rows, heads, dim = x.shape
        self._library.pilotfish_rotate(
            self.level, x.data_ptr(), x.stride(0), positions.data_ptr(), cos_sin.data_ptr(), rows, heads, dim
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(self._library.pilotfish_silu_mul, gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gated(self._library.pilotfish_gelu_mul, gate_up)

    def _gated(self, function: Any, gate_up: torch.Tensor) -> torch.Tensor:
        rows, double = gate_up.shape
        out = torch.empty(rows, double // 2)
        function(self.level, gate_up.data_ptr(), out.data_ptr(), rows, double // 2)
        return out

    def write_cache(
        self,
        key: torch.Tensor,  # (rows, kv_heads, head_dim)
        value: torch.Tensor,  # (rows, kv_heads, head_dim)
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,  # (rows,) int64
        block_size: int,
    ) -> None:
        """Write each row's key and value to its slot of the caches, laid out as `NativeAttention.allocate` does."""
        if key.stride(0) != value.stride(0):  # the kernel would read past the end of one
            key, value = key.contiguous(), value.contiguous()
        self._library.pilotfish_write_cache(
            CACHE_FORMS[keys.dtype],
            key.data_ptr(),
            value.data_ptr(),
            key.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
            *key.shape,
            block_size,
        )

    def set_threads(self, count: int) -> int:
        """Compute with `count` threads from now on, in this process; returns how many the system could start."""
        return int(self._library.pilotfish_set_threads(count))

    @property
    def threads(self) -> int:
        return int(self._library.pilotfish_threads())

    def low_rank_(self, linear: ctypes.Structure, adapted: ctypes.Structure, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y what the adapters of a pass change in a linear of x (see low_rank.h and `layers.native_lora`)."""
        x = x.contiguous()
        assert y.is_contiguous()
        self._library.pilotfish_low_rank(
            self.level,
            ctypes.byref(linear),
            ctypes.byref(adapted),
            x.data_ptr(),
            y.data_ptr(),
            x.shape[1],
            y.shape[1],
        )

    def attention_scratch(self, rows: int, context: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate what a call of `attend` needs to compute `rows` rows that see up to `context` keys each, in a cache
        of `dtype`, with as many threads as there are."""
        size = self._library.pilotfish_attention_scratch(rows, context, heads, dim, CACHE_FORMS[dtype])
        return torch.empty(size)

    def attend(self, arguments: AttentionArguments) -> None:
        self._library.pilotfish_attend(self.level, ctypes.byref(arguments))

    def experts(self, arguments: ctypes.Structure) -> None:
        """Compute a layer's experts (experts.h)."""
        self._library.pilotfish_experts(self._blocks_level, ctypes.byref(arguments))

    def decoder_space(self, size: int, heads: int, kv_heads: int, head_dim: int, gated_size: int) -> int:
        """Return the floats per row that `decode` needs beside the hidden states."""
        return int(self._library.pilotfish_space(size, heads, kv_heads, head_dim, gated_size))

    def decode(self, layers: Any, count: int, step: ctypes.Structure) -> None:
        """Run `count` layers of the fused decoder (decoder.h); `layers` is the address of the first."""
        self._library.pilotfish_decode(self._blocks_level, layers, count, ctypes.byref(step))

    def draft_space(self, head: ctypes.Structure, rows: int, spans: int, blocks: int, context: int, form: int) -> int:
        """Return the bytes that `draft` needs."""
        return int(self._library.pilotfish_draft_space(ctypes.byref(head), rows, spans, blocks, context, form))

    def draft(self, head: ctypes.Structure, drafting: ctypes.Structure, context: int, space: int) -> None:
        """Grow drafts (draft.h); `space` is the address of as many bytes as `draft_space` says, a multiple of 64."""
        self._library.pilotfish_draft(self._blocks_level, ctypes.byref(head), ctypes.byref(drafting), context, space)


def mask_logits(logits: torch.Tensor, words: torch.Tensor, level: int | None = None) -> bool:
    """Set the logits whose bits are 0 to -inf: logits (rows, vocab) float32, words (rows, words) int32 with bit i of
    word w for token 32 w + i, both contiguous on the CPU. Returns False, with nothing done, if there is no library."""
    library = load_library()
    if library is None:
        return False
    rows, vocab = logits.shape
    assert logits.is_contiguous()
    assert words.is_contiguous()
    assert words.shape[1] * 32 >= vocab
    best = int(library.pilotfish_level())
    library.pilotfish_mask(
        best if level is None else level, logits.data_ptr(), words.data_ptr(), rows, vocab, words.shape[1]
    )
    return True


def address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a contiguous float32 tensor; None, which C reads as a null pointer, for None."""
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _checked(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"the native kernels compute in float32 on the CPU, not {tensor.dtype} on {tensor.device}")
    return tensor
