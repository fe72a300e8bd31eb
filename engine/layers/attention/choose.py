"""Chooses the attention backend: the best one that is installed and whose rules the model and the device meet."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from pilotfish.engine.kernels.native import CACHE_FORMS, VECTOR, NativeKernels, load_library
from pilotfish.engine.layers.attention.backend import AttentionBackend
from pilotfish.engine.layers.attention.cache import FP8
from pilotfish.engine.layers.attention.flash import Flash4Attention, load_flash2, load_flash4
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.attention.unsplit import UnsplitAttention
from pilotfish.errors import ConfigError

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
KEY_TILE = 128
"""Keys in a tile of flash-attn-4's kernels up to head_dim 128: a block of as many is loaded whole."""


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """The properties of model, device and settings that a backend's rules look at."""

    device: torch.device
    capability: tuple[int, int] | None
    """The CUDA device's compute capability; None on other devices."""
    dtype: torch.dtype
    cache_dtype: torch.dtype
    """The KV cache's dtype: `dtype`, bfloat16, int8 or float8_e4m3fn."""
    head_dim: int
    block_size: int
    """Tokens per block; 0: the backend's default."""
    softcap: bool = False
    """Whether scores are capped."""
    sinks: bool = False
    """Whether heads have sinks."""


def choose_attention(name: str, needs: AttentionNeeds, kernels: NativeKernels | None) -> AttentionBackend:
    """The backend called `name`. "auto" takes the best available: flash4, flash2, triton, torch on a GPU, else native,
    torch. A KV cache in another dtype than the model's that only torch could read on a GPU is refused: that would be
    many times slower.

    kernels: the native ones if the model computes with them; native attention shares their threads. Raises ConfigError
    with the reason if the named backend cannot be used.
    """
    if name != "auto":
        found = _try(name, needs, kernels)
        if isinstance(found, str):
            raise ConfigError(f"attention_backend is {name!r}, but {found}")
        return found
    # Native attention goes with native kernels, unless it is asked for by name.
    suited = ("flash4", "flash2", "triton") if needs.capability else ("native",) if kernels else ()
    reasons: list[str] = []
    for candidate in suited:
        found = _try(candidate, needs, kernels)
        if not isinstance(found, str):
            return found
        logger.info("attention: not %s, since %s", candidate, found)
        reasons.append(found)
    setting = f"kv_cache_dtype is {_cache_name(needs.cache_dtype)!r}"
    if reason := why_not("torch", needs):
        raise ConfigError(f"{setting}, but {'; '.join((*reasons, reason))}. kv_cache_dtype 'auto' works everywhere")
    if needs.capability and needs.cache_dtype != needs.dtype:
        raise ConfigError(
            f"{setting}, but no attention that is fast on a GPU can read such a cache here: "
            f"{'; '.join(reasons)}. attention_backend 'torch' can, span by span and without CUDA graphs; "
            f"kv_cache_dtype 'auto' keeps it in {_short(needs.dtype)}"
        )
    if needs.capability:
        logger.warning("attention: torch's, span by span, which is slow on a GPU: is flash-attn installed?")
    return TorchAttention()


def why_not(name: str, needs: AttentionNeeds) -> str | None:
    """Why the backend `name` cannot be used by its rules, or None. Whether its package is installed is not checked."""
    rules = {
        "flash4": _why_not_flash4,
        "flash2": _why_not_flash2,
        "triton": _why_not_triton,
        "native": _why_not_native,
        "torch": _why_not_torch,
    }
    return rules[name](needs) if name in rules else None


def _try(name: str, needs: AttentionNeeds, kernels: NativeKernels | None) -> AttentionBackend | str:
    if reason := why_not(name, needs):
        return reason
    try:
        match name:
            case "flash4":
                assert needs.capability is not None
                flash4 = load_flash4(needs.capability)
                return flash4 if flash4.splits else _divided(flash4, needs)
            case "flash2":
                return load_flash2()
            case "triton":
                from pilotfish.engine.layers.attention.triton import load_triton  # torch brings Triton for CUDA alone

                return load_triton(needs.device)
            case "native":
                return NativeAttention(kernels or NativeKernels())
    except ImportError as error:
        return str(error)
    return TorchAttention()


def _divided(flash4: Flash4Attention, needs: AttentionNeeds) -> AttentionBackend:
    """Leave passes that would keep few multiprocessors busy to the Triton kernels, where they can run."""
    if why_not("triton", needs):
        return flash4
    try:
        from pilotfish.engine.layers.attention.triton import load_triton

        triton = load_triton(needs.device)
    except ImportError as error:
        logger.info("attention: flash4 alone, which does not split long contexts here, since %s", error)
        return flash4
    return UnsplitAttention(flash4, triton, triton.processors)


def _why_not_flash4(needs: AttentionNeeds) -> str | None:
    """flash_attn/cute/interface.py of 4.0.0b36: `_validate_head_dims` and the assertions of `_flash_attn_fwd`."""
    if needs.capability is None:
        return f"flash-attn-4 computes on NVIDIA GPUs, not on {needs.device}"
    if needs.sinks:
        return "the model has attention sinks, which are not passed to flash-attn-4"
    major = needs.capability[0]
    # 8.x and 12.x run its other functions, but have "paged KV not supported".
    if major not in (9, 10, 11):
        return (
            "flash-attn-4's paged KV cache needs compute capability 9.x, 10.x or 11.x (Hopper, Blackwell), "
            f"not {_dotted(needs.capability)}"
        )
    if needs.dtype not in HALF:
        return f"flash-attn-4 computes in bfloat16 or float16, not in {_short(needs.dtype)}"
    if needs.cache_dtype not in (needs.dtype, FP8):
        return f"flash-attn-4's KV cache is in the model's dtype or fp8, not in {_cache_name(needs.cache_dtype)}"
    if needs.cache_dtype == FP8 and major != 10:
        return (
            "flash-attn-4 can read a KV cache in fp8 on compute capability 10.x (B200) only, "
            f"not {_dotted(needs.capability)}"
        )
    alignment = 16 // needs.cache_dtype.itemsize
    widest = 256 if major == 9 else 128
    if needs.head_dim % alignment or not (8 <= needs.head_dim <= widest or needs.head_dim == 256):
        allowed = "8 to 256" if major == 9 else "8 to 128, or 256,"
        return (
            f"flash-attn-4 needs a head_dim of {allowed} in multiples of {alignment} here, "
            f"and the model's is {needs.head_dim}"
        )
    # flash_fwd_sm90.py:67 and flash_fwd_sm100.py:266, "Paged KV does not support irregular head dim": blocks that are
    # no key tile are loaded row by row. Tiles are of 128 keys up to head_dim 128, and of other sizes beyond.
    if needs.head_dim % 16 and (needs.head_dim > 128 or needs.block_size not in (0, KEY_TILE)):
        return (
            f"flash-attn-4 needs a head_dim that is a multiple of 16, or at most 128 with blocks of {KEY_TILE} tokens, "
            f"and the model's is {needs.head_dim}"
        )
    return None


def _why_not_flash2(needs: AttentionNeeds) -> str | None:
    """csrc/flash_attn/flash_api.cpp of 2.8.3: the TORCH_CHECKs of `mha_varlen_fwd` and `mha_fwd_kvcache`."""
    if needs.capability is None:
        return f"flash-attn computes on NVIDIA GPUs, not on {needs.device}"
    if needs.capability[0] < 8:
        return f"flash-attn needs compute capability 8.0 (Ampere) or newer, not {_dotted(needs.capability)}"
    if needs.dtype not in HALF:
        return f"flash-attn computes in bfloat16 or float16, not in {_short(needs.dtype)}"
    if needs.sinks:
        return "the model has attention sinks, which flash-attn does not know"
    if needs.cache_dtype != needs.dtype:
        return (
            f"flash-attn's KV cache must be in the model's dtype, {_short(needs.dtype)}, "
            f"not in {_cache_name(needs.cache_dtype)}"
        )
    if needs.head_dim % 8 or needs.head_dim > 256:
        return f"flash-attn needs a head_dim of at most 256, a multiple of 8, and the model's is {needs.head_dim}"
    if needs.block_size % 256:
        return f"flash-attn needs a block_size that is a multiple of 256, not {needs.block_size}"
    return None


def _why_not_triton(needs: AttentionNeeds) -> str | None:
    """What this package's Triton kernels were written for."""
    if needs.capability is None:
        return f"the Triton kernels compute on NVIDIA GPUs, not on {needs.device}"
    if needs.capability[0] < 8:
        return f"the Triton kernels need compute capability 8.0 (Ampere) or newer, not {_dotted(needs.capability)}"
    if needs.cache_dtype not in (needs.dtype, FP8):
        return f"the Triton kernels' KV cache is in the model's dtype or fp8, not in {_cache_name(needs.cache_dtype)}"
    if needs.cache_dtype == FP8 and needs.capability < (8, 9):
        return f"Triton reads fp8 on compute capability 8.9 or newer, not {_dotted(needs.capability)}"
    if needs.head_dim > 256:
        return f"the Triton kernels take a head_dim of at most 256, and the model's is {needs.head_dim}"
    return None


def _why_not_native(needs: AttentionNeeds) -> str | None:
    if needs.device.type != "cpu" or needs.dtype != torch.float32:
        return f"the native kernels compute in float32 on the CPU, not in {_short(needs.dtype)} on {needs.device}"
    if needs.cache_dtype not in CACHE_FORMS:
        return f"the native kernels' KV cache is in float32, bfloat16 or int8, not in {_cache_name(needs.cache_dtype)}"
    if needs.head_dim % VECTOR:
        return f"the model's head_dim ({needs.head_dim}) is not a multiple of {VECTOR}"
    if needs.softcap:
        return "the model caps attention scores, which the native kernels do not"
    if needs.sinks:
        return "the model has attention sinks, which the native kernels do not know"
    if needs.block_size % VECTOR:
        return f"block_size ({needs.block_size}) is not a multiple of {VECTOR}"
    if load_library() is None:
        return "the native kernels were not built (no C compiler at installation)"
    return None


def _why_not_torch(needs: AttentionNeeds) -> str | None:
    if needs.cache_dtype == torch.int8:
        return "a KV cache in int8 is read by the CPU's native kernels alone, not by torch's operators"
    return None


def _cache_name(dtype: torch.dtype) -> str:
    """The dtype as `kv_cache_dtype` calls it."""
    return "fp8" if dtype == FP8 else _short(dtype)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
