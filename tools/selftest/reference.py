"""The oracle of the self-test and of the engine's tests: plain formulas in float64 (or float32) on the CPU for kernels,
attention, noise and truncation. It is slow, and uses libraries only for sums, products and exponentials."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import gguf
import numpy as np
import torch

from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.weights.blocks import Blocks
from pilotfish.engine.weights.fp8 import LARGEST


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    weight: torch.Tensor  # (out_features, in_features)
    bias: torch.Tensor | None
    fp8: bool = False
    """Whether inputs are rounded to fp8, row by row."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


class ReferenceKernels:
    """The operators of `engine.kernels.protocol`, computed in `dtype`.

    Weights in fp8 or int8 are dequantized first. Inputs of fp8 weights are rounded to fp8 as `engine.kernels.fp8`
    defines it.
    """

    name = "reference"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def prepare_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> ReferenceLinear:
        wide = weight.to(self.dtype)
        if scale is not None:
            wide = wide * scale.to(self.dtype)
        return ReferenceLinear(wide, None if bias is None else bias.to(self.dtype), weight.dtype == torch.float8_e4m3fn)

    def prepare_blocks(self, parts: Seq[torch.Tensor | Blocks], bias: torch.Tensor | None = None) -> ReferenceLinear:
        wide = [
            torch.from_numpy(gguf.dequantize(part.rows.numpy(), part.kind)) if isinstance(part, Blocks) else part
            for part in parts
        ]
        return self.prepare_linear(torch.cat(wide), bias)

    def linear(self, x: torch.Tensor, weight: ReferenceLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(self.dtype)
        if weight.fp8:
            # In float32, as it is defined: a number at the edge of a step must fall to the same side.
            scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
            rounded = (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            x = rounded.to(self.dtype) * scale.to(self.dtype)
        y = x @ weight.weight.T
        if weight.bias is not None:
            y = y + weight.bias
        return y if residual is None else y + residual.to(self.dtype)

    def gated_linear(self, x: torch.Tensor, weight: ReferenceLinear, gate: Gate) -> torch.Tensor:
        gate_up = self.linear(x, weight)
        return self.silu_mul(gate_up) if gate == "silu" else self.gelu_mul(gate_up)

    def embed(self, ids: torch.Tensor, weight: ReferenceLinear) -> torch.Tensor:
        return weight.weight[ids]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(self.dtype)
        return wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps) * weight.to(self.dtype)

    def rotate_(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        half = x.shape[-1] // 2
        angles = cos_sin[positions].to(self.dtype)
        cosine, sine = angles[:, None, :half], angles[:, None, half:]
        first, second = x[..., :half].clone(), x[..., half:].clone()
        x[..., :half] = first * cosine - second * sine
        x[..., half:] = second * cosine + first * sine

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.to(self.dtype).chunk(2, dim=-1)
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        # (1 + tanh(x)) / 2 as 1 / (1 + exp(-2 x)), which keeps its digits where tanh is near -1.
        return gate / (1 + torch.exp(-2 * inner)) * up


class ReferenceAttention:
    """The attention of `engine.layers.attention.backend`, query by query, in the query's dtype."""

    name = "reference"
    block_size = 16
    capturable = False

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        shape = (num_blocks, block_size, kv_heads, head_dim)
        return LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: AttentionBatch) -> None:
        """Write keys and values into the cache, without attending."""
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        keys[batch.slots], values[batch.slots] = key.to(keys.dtype), value.to(values.dtype)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cache: LayerCache,
        batch: AttentionBatch,
        params: AttentionParams,
    ) -> torch.Tensor:
        if key is not None and value is not None:
            self.store(key, value, cache, batch)
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        rows, heads, head_dim = query.shape
        group = heads // cache.keys.shape[2]
        out = torch.empty(rows, heads, head_dim, dtype=query.dtype)
        row = 0
        for table, length, context in zip(batch.block_tables, batch.query_lens, batch.contexts, strict=True):
            for position in range(context - length, context):
                first = 0 if params.window is None else max(0, position + 1 - params.window)
                positions = torch.arange(first, position + 1)
                slots = table[positions // batch.block_size].long() * batch.block_size + positions % batch.block_size
                seen = keys[slots].repeat_interleave(group, dim=1)  # (keys, heads, head_dim)
                scores = torch.einsum("hd,khd->hk", query[row], seen.to(query.dtype)) * params.scale
                if params.softcap:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                weights = torch.exp(scores - scores.amax(1, keepdim=True))
                weights = weights / weights.sum(1, keepdim=True)
                out[row] = torch.einsum(
                    "hk,khd->hd", weights, values[slots].repeat_interleave(group, dim=1).to(query.dtype)
                )
                row += 1
        return out.flatten(1)


def bits31(keys: Seq[int], tokens: np.ndarray) -> np.ndarray:
    """Return the noise's 31 random bits for each (key, token), as in `engine.sampling.noise`: triple32 in unsigned
    words, the row's low half mixed in before the first multiplication and the high half before the second.

    tokens: (count,) ids -> (keys, count) uint32.
    """
    low = np.array([key & 0xFFFFFFFF for key in keys], dtype=np.uint32)[:, None]
    high = np.array([key >> 32 for key in keys], dtype=np.uint32)[:, None]
    z = tokens.astype(np.uint32)[None, :] ^ low
    z = z * np.uint32(0xED5AD4BB)
    z ^= z >> np.uint32(11)
    z = (z + high) * np.uint32(0xAC4C1B51)
    z ^= z >> np.uint32(15)
    z *= np.uint32(0x31848BAB)
    # The last step is an arithmetic shift: a set sign bit fills the upper 14 bits and clears itself.
    signed = z.view(np.int32)
    return (signed ^ (signed >> np.int32(14))).view(np.uint32)


def log_exponential(bits: np.ndarray) -> np.ndarray:
    """Return log E of 31 random bits: the uniform number rounded to float32 as in the noise, because its last bits
    decide large values of E; logarithms in float64."""
    factor = np.float32((2.0**-31) * (1 - 2.0**-24))
    uniform = bits.astype(np.float32) * factor + np.float32(2.0**-32)
    return np.log(-np.log1p(-uniform.astype(np.float64)))


def cumulative(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a row's token ids by falling probability, lower ids first among equals, (vocab,); and for each of them the
    cumulative probability of those before it."""
    order = np.argsort(-scaled, kind="stable")
    mass = np.exp(scaled[order].astype(np.float64))
    return order, (np.cumsum(mass) - mass) / mass.sum()
