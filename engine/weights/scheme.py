"""Scheme: a way to hold matrices in fewer bits than they are computed with. No torch until a matrix is quantized.

A scheme is one file beside this one and one entry of `engine.weights.quantization.SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCALE_BYTES = 4
"""A quantized matrix has a float32 scale for each output channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    name: str
    """Its name in settings, errors and SCHEMES."""
    storage: str
    """torch's name of the stored dtype, which no other scheme and no plain weight has."""
    safetensors: str
    """safetensors' name of that dtype."""
    bytes: int
    """Bytes of a stored number."""
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """Quantizes (rows, columns) in any floating dtype -> the same shape in `storage`, and scales (rows, 1) float32, so
    that their product approximates the matrix. A row does not depend on the other rows."""
    multiple: int = 1
    """Both sizes of a matrix on one rank must be multiples of this."""
    kernels: tuple[str, ...]
    """The kernels that compute with it, by `Kernels.name`."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """The dtypes of activations that they compute with."""
    on_cpu: bool = False
    """Whether a CPU computes with the stored numbers directly, and not by the same arithmetic in float32."""
    capability: tuple[int, int] | None = None
    """The compute capability of the first CUDA devices that compute with the stored numbers; None: none does."""
    arithmetic: str | None = None
    """The dtype in which a device multiplies, as `Device.flops` names it; None: that of the activations."""
    modules_left: Callable[[Mapping[str, Any]], tuple[str, ...] | None] = lambda _: None
    """Returns the modules that a config.json's quantization_config leaves unquantized, or None if it describes another
    scheme. Raises ValueError, which names the variant, if the engine cannot read it."""
    checkpoints: str = ""
    """The checkpoints that `modules_left` knows, for an error message."""
    unused: tuple[str, ...] = ()
    """Last components of the names of tensors that such checkpoints have and the engine does not use."""

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.storage)
        return found

    def dequantize(self, matrix: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """matrix (rows, columns) times scale (rows, 1), in `dtype`."""
        return (matrix.float() * scale).to(dtype)

    def is_native(self, capability: tuple[int, int] | None) -> bool:
        """Whether a device of this compute capability (None: a CPU) computes with the stored numbers directly."""
        if capability is None:
            return self.on_cpu
        return self.capability is not None and capability >= self.capability

    def why_not(self, capability: tuple[int, int] | None) -> str | None:
        """Why a device of this compute capability (None: a CPU) cannot compute with it, or None if it can."""
        if capability is None or self.is_native(capability):
            return None
        if self.capability is None:
            return "does not run on CUDA devices"
        wanted, has = (".".join(map(str, pair)) for pair in (self.capability, capability))
        return f"needs compute capability {wanted} or newer, not {has}"

    def size_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix with its scales."""
        return rows * columns * self.bytes + rows * SCALE_BYTES
