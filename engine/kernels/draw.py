"""Drawing tokens by the native kernels (draw.h), on the CPU in float32: in one look at a row and on all threads, where
torch's operators make some twenty arrays of the vocabulary's size."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq

import numpy as np
import torch

from pilotfish.engine.kernels.native import load_library


def can_draw(logits: torch.Tensor) -> bool:
    """Return whether `draw` takes these logits: float32, contiguous, on the CPU, and the library is there."""
    on_host = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous()
    return on_host and load_library() is not None


def draw(
    logits: torch.Tensor, rows: Seq[int], keys: Seq[int], temperatures: Seq[float], level: int | None = None
) -> list[int]:
    """Draw a token of the whole vocabulary for each of `rows` of logits, (all rows, vocab), which `can_draw`:
    argmax(logit / temperature - log E), with the noise of `sampling.noise.log_exponential`, up to its rounding; the
    likeliest, the first of equals, where the temperature is 0. A row's token depends on the row alone.

    keys: `noise.row_key` of each. level: the instruction set, as `NativeKernels` has it.
    """
    library = load_library()
    assert library is not None
    best = int(library.pilotfish_level()) if level is None else level
    vocab, first = logits.shape[1], rows[0]
    if list(rows) == list(range(first, first + len(rows))):
        groups = [(first, 0, len(rows))]
    else:
        groups = [(row, i, 1) for i, row in enumerate(rows)]
    space = (ctypes.c_uint8 * library.pilotfish_draw_space(len(rows), vocab))()
    found = (ctypes.c_int64 * len(rows))()
    keyed = np.array(keys, dtype=np.uint64)
    heat = np.array(temperatures, dtype=np.float32)
    for row, at, count in groups:
        library.pilotfish_draw(
            best,
            logits.data_ptr() + 4 * vocab * row,
            None,
            keyed.ctypes.data + 8 * at,
            heat.ctypes.data + 4 * at,
            count,
            vocab,
            space,
            ctypes.addressof(found) + 8 * at,
            None,
        )
    return list(found)
