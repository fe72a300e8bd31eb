"""Triton kernels for the operators on rows between a layer's matrix products, and on Hopper for products with few rows
(`kernels.few`); other products are torch's.

One launch each where torch's operators take up to ten, and a row's result has the same bits among any number of rows
(see `triton_rows`). torch's CUDA builds bring Triton. `check` compares each with torch's operators before it is used;
those that fail there are `without`, and computed by torch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton

from pilotfish.engine.kernels import triton_rows
from pilotfish.engine.kernels.dependent import PLAIN, Launch, for_rows, options
from pilotfish.engine.kernels.few import FewRows
from pilotfish.engine.kernels.fp8 import Fp8Linear, multiply
from pilotfish.engine.kernels.protocol import Gate
from pilotfish.engine.kernels.torch import TorchKernels, TorchLinear
from pilotfish.engine.weights.fp8 import quantize

FUSED = ("rms_norm", "add_norm", "rotate", "gate", "quantize", "race")
"""The kernels that can be left out, by name; so can "few", where there is that."""

WIDEST = 1 << 15
"""Longest row of a norm: a program holds all of it."""

_PIECE = 1024
"""Columns of the vocabulary that a program looks at."""
_WINDOW = 16384
"""Columns of a row that a program quantizes at a time."""


class TritonKernels(TorchKernels):
    fuses = True

    def __init__(self, without: Iterable[str] = (), dependent: bool = False, few: torch.device | None = None) -> None:
        """without: names of kernels that torch has to stand for; dependent: whether kernels are launched before the
        one in front of them ends (`kernels.dependent`); few: the device, if products with few rows are to be computed
        by `kernels.few` there."""
        missing = frozenset(without)
        self._launch = options(dependent)
        self._few = FewRows(few, self._launch) if few is not None and "few" not in missing else None
        self.used = frozenset(FUSED) - missing | ({"few"} if self._few is not None else set())
        self.draws = "race" in self.used
        # What is missing shows in the log and in the metric of the engine's kernels.
        self.name = "triton" + "".join(f"-{name}" for name in sorted(missing))

    def linear(
        self, x: torch.Tensor, weight: TorchLinear | Fp8Linear, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = self._few_rows(x, weight, None)
        if y is None:
            if not isinstance(weight, Fp8Linear) or "quantize" not in self.used:
                return super().linear(x, weight, residual)
            y = multiply(*quantized(x, self._launch), weight, x.dtype)
        return y if residual is None else y.add_(residual)

    def gated_linear(self, x: torch.Tensor, weight: TorchLinear | Fp8Linear, gate: Gate) -> torch.Tensor:
        y = self._few_rows(x, weight, gate)
        return super().gated_linear(x, weight, gate) if y is None else y

    def _few_rows(self, x: torch.Tensor, weight: TorchLinear | Fp8Linear, gate: Gate | None) -> torch.Tensor | None:
        """The linear by the kernel for few rows; None: it does not take these."""
        few = self._few
        if few is None or (tiling := few.takes(x, weight.weight, gate)) is None:
            return None
        if isinstance(weight, TorchLinear):
            return few.linear(x, weight, tiling, gate) if weight.weight.dtype == x.dtype else None
        scaled = quantized(x, self._launch) if "quantize" in self.used else quantize(x)
        return few.fp8_linear(scaled, weight, tiling, gate, x.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if "rms_norm" not in self.used or x.shape[-1] > WIDEST:
            return super().rms_norm(x, weight, eps)
        if x.dim() == 2:
            return _add_norm(x, None, None, weight, eps, self._launch)[1]
        rows, heads, size = x.shape
        x = _by_rows(x)
        out = x.new_empty(rows, heads, size)
        if rows:
            block = triton.next_power_of_2(size)
            triton_rows.norm_heads[(rows, heads)](
                *(x, weight, out, x.stride(0), x.stride(1), size, eps),
                BLOCK=block,
                num_warps=_warps(block),
                enable_fp_fusion=False,
                **for_rows(self._launch, rows),
            )
        return out

    def add_norm(
        self,
        hidden: torch.Tensor,
        change: torch.Tensor | None,
        post_weight: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if "add_norm" not in self.used or hidden.shape[-1] > WIDEST:
            return super().add_norm(hidden, change, post_weight, weight, eps)
        return _add_norm(hidden, change, post_weight, weight, eps, self._launch)

    def rotate_(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        if "rotate" not in self.used or x.stride(-1) != 1:
            return super().rotate_(x, positions, cos_sin)
        _rotate(x, x.shape[1], 0, None, positions, cos_sin, 0.0, None, self._launch)

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        kv_heads: int,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        eps: float,
        cache: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
    ) -> torch.Tensor:
        if "rotate" not in self.used or not qkv.is_contiguous():
            return super().rotate_and_write(qkv, kv_heads, norms, positions, cos_sin, eps, cache, slots)
        heads = qkv.shape[1] - 2 * kv_heads
        _rotate(qkv, heads, kv_heads, norms, positions, cos_sin, eps, (*cache, slots), self._launch)
        return qkv[:, :heads]

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return _gated(gate_up, False, self._launch) if "gate" in self.used else super().silu_mul(gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return _gated(gate_up, True, self._launch) if "gate" in self.used else super().gelu_mul(gate_up)


def _by_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(block: int) -> int:
    """Warps of a program over `block` columns. Sums depend on it, so it follows from the columns alone."""
    return max(1, min(16, block // 512))


def _add_norm(
    hidden: torch.Tensor,
    change: torch.Tensor | None,
    post_weight: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    launch: Launch,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = hidden.shape
    hidden = _by_rows(hidden)
    change = None if change is None else _by_rows(change)
    total = hidden if change is None else hidden.new_empty(rows, size)
    normed = total if weight is None else hidden.new_empty(rows, size)
    if rows and (change is not None or weight is not None):
        block = triton.next_power_of_2(size)
        # What is None is never read.
        triton_rows.add_norm_rows[(rows,)](
            hidden,
            hidden if change is None else change,
            hidden if post_weight is None else post_weight,
            hidden if weight is None else weight,
            total,
            normed,
            hidden.stride(0),
            0 if change is None else change.stride(0),
            size,
            eps,
            ADDED=change is not None,
            POST=post_weight is not None,
            NORMED=weight is not None,
            BLOCK=block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
            **for_rows(launch, rows),
        )
    return total, normed


def _rotate(
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    eps: float,
    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    launch: Launch,
) -> None:
    rows, every, dim = qkv.shape
    q_norm, k_norm = norms if norms is not None else (cos_sin, cos_sin)
    keys, values, slots = written if written is not None else (qkv, qkv, positions)
    if rows:
        triton_rows.rotate_heads[(rows, every)](
            *(qkv, q_norm, k_norm, positions, cos_sin, keys, values, slots, qkv.stride(0), qkv.stride(1), eps),
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            HALF=triton.next_power_of_2(dim // 2),
            WHOLE=triton.next_power_of_2(dim),
            NORMED=norms is not None,
            WRITTEN=written is not None,
            num_warps=1,
            enable_fp_fusion=False,
            **for_rows(launch, rows),
        )


def _gated(gate_up: torch.Tensor, gelu: bool, launch: Launch) -> torch.Tensor:
    rows, double = gate_up.shape
    size = double // 2
    gate_up = _by_rows(gate_up)
    out = gate_up.new_empty(rows, size)
    if rows:
        block = min(1024, triton.next_power_of_2(size))
        triton_rows.gate_rows[(rows, triton.cdiv(size, block))](
            *(gate_up, out, gate_up.stride(0), size),
            GELU=gelu,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
            **for_rows(launch, rows),
        )
    return out


def quantized(x: torch.Tensor, launch: Launch = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """`engine.weights.fp8.quantize` in one launch: (rows, size) -> float8_e4m3fn, and scales (rows, 1) float32."""
    rows, size = x.shape
    x = _by_rows(x)
    out = x.new_empty(rows, size, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    if rows:
        block = min(_WINDOW, triton.next_power_of_2(size))
        triton_rows.quantize_rows[(rows,)](
            *(x, out, scales, x.stride(0), size),
            WHOLE=size <= block,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
            enable_fp_fusion=False,
            **for_rows(launch, rows),
        )
    return out, scales


def race(
    logits: torch.Tensor, keys: torch.Tensor, temperatures: torch.Tensor | None = None, launch: Launch = PLAIN
) -> torch.Tensor:
    """Draw a token of each row, argmax(logit - log E), with the noise of `sampling.noise`: logits (rows, vocab), -inf
    for what may not be drawn; keys (rows,) int64, the rows' -> (rows,) int64.

    With temperatures, (rows,) float32, logits are first scaled as by `processors.scale_rows`; where it is 0, the
    token is the likeliest. Two or three launches, and no copy of the logits.
    """
    rows, vocab = logits.shape
    logits = _by_rows(logits)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    if not rows:
        return tokens
    pieces = triton.cdiv(vocab, _PIECE)
    scores = logits.new_empty(rows, pieces, dtype=torch.float32)
    columns = logits.new_empty(rows, pieces, dtype=torch.int32)
    highest = scores
    if temperatures is not None:
        highest = torch.empty_like(scores)
        triton_rows.highest_of_pieces[(rows, pieces)](
            logits, highest, logits.stride(0), vocab, PIECE=_PIECE, num_warps=4, **launch
        )
    power = triton.next_power_of_2(pieces)
    triton_rows.race_pieces[(rows, pieces)](
        *(logits, highest, keys, scores if temperatures is None else temperatures, scores, columns),
        *(logits.stride(0), vocab),
        PIECE=_PIECE,
        PIECES=power,
        SCALED=temperatures is not None,
        num_warps=4,
        enable_fp_fusion=False,
        **launch,
    )
    triton_rows.finish_race[(rows,)](scores, columns, tokens, pieces, PIECES=power, num_warps=1, **launch)
    return tokens
