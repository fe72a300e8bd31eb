"""Where flash-attn-4 is installed (no GPU needed): its own checks and its compiler take the backend's calls.

Fake tensors stand for those on the GPU, as flash-attn-4 does for compiling ahead of time; nothing is launched.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pilotfish.engine.layers.attention.flash import load_flash4
from pilotfish.engine.layers.attention.backend import AttentionBatch, AttentionParams

CUDA = torch.device("cuda", 0)
backend = load_flash4((9, 0))


def attend(head_dim, heads, kv_heads, lengths, window=None, softcap=None, block_size=128):
    contexts = [length + 300 for length in lengths]
    with FakeTensorMode(), torch.inference_mode():
        cache = backend.allocate(64, block_size, kv_heads, head_dim, torch.bfloat16, CUDA)
        qkv = torch.empty(sum(lengths), heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16, device=CUDA)
        counts = (len(lengths) + 1, len(lengths), len(lengths) + 1)
        queries, keys, cu_keys = (torch.empty(n, dtype=torch.int32, device=CUDA) for n in counts)
        table = torch.empty(len(lengths), -(-max(contexts) // block_size), dtype=torch.int32, device=CUDA)
        slots = torch.empty(sum(lengths), dtype=torch.int64, device=CUDA)
        batch = AttentionBatch(
            cu_query_lens=queries, context_lens=keys, cu_context_lens=cu_keys, block_tables=table, slots=slots,
            query_lens=lengths, contexts=contexts, block_size=block_size,
        )
        parts = qkv.split((heads, kv_heads, kv_heads), dim=1)
        out = backend.attend(*parts, cache, batch, AttentionParams(head_dim**-0.5, window, softcap))
        assert out.shape == (sum(lengths), heads * head_dim), out.shape


attend(128, 32, 8, [1, 1])  # Llama 3.1
attend(128, 32, 8, [1, 5, 90])
attend(64, 32, 8, [1, 5, 90], block_size=16)  # Llama 3.2
attend(128, 32, 8, [1, 5, 90], window=4096)  # Mistral
attend(256, 4, 1, [1, 5], window=512)  # Gemma 3
attend(128, 32, 8, [1, 5], softcap=50.0)
print("compiled")
"""


def test_flash4_takes_and_compiles_the_backends_calls() -> None:
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed here", exc_type=ImportError)
    settings = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    root = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | settings | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("compiled\n")
