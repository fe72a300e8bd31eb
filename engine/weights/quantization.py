"""Quantized weights: the schemes, and which of a model's matrices they apply to. No torch until there are tensors.

In a sequence of tensors a quantized matrix is followed by its scales, under the matrix's name and SCALE: (out_features,
1) float32, matrix times scale being the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.patterns import module_pattern
from pilotfish.engine.weights import fp8, int8
from pilotfish.engine.weights.scheme import Scheme
from pilotfish.engine.weights.tensors import Tensor
from pilotfish.errors import ModelError

if TYPE_CHECKING:
    import torch

SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (fp8.SCHEME, int8.SCHEME)}

SCALE = "_scale"
"""Suffix that makes a weight's name that of its scales."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's matrices are quantized, in its checkpoint or once they are loaded."""

    scheme: str
    """A key of SCHEMES."""
    unquantized: tuple[str, ...] = ()
    """Modules left as they were: names, parts of names, or "re:" and a regular expression."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor is quantized: a matrix of a layer, and not of one of the modules `unquantized`."""
        if not tensor.quantizable:
            return False
        modules = {tensor.module, tensor.stored.rpartition(".")[0]} - {""}
        return not any(_names(pattern, module) for pattern in self.unquantized for module in modules)


def _names(pattern: str, module: str) -> bool:
    """Whether the pattern matches the module: it is a name or a part of its path, or "re:" and a regular expression."""
    if pattern.startswith("re:"):
        return module_pattern(pattern[3:]).match(module) is not None
    return f".{pattern}." in f".{module}."


def scheme_of(dtype: torch.dtype) -> Scheme | None:
    """The scheme that stores numbers in this dtype; None for a dtype of plain weights."""
    return next((scheme for scheme in SCHEMES.values() if scheme.dtype == dtype), None)


def dequantized(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights with every matrix in `dtype`, and no scales among them."""
    waiting: tuple[str, torch.Tensor, Scheme] | None = None
    for name, tensor in weights:
        scheme = scheme_of(tensor.dtype)
        if scheme is not None:
            waiting = name, tensor, scheme
        elif waiting is not None and name == waiting[0] + SCALE:
            yield waiting[0], waiting[2].dequantize(waiting[1], tensor, dtype)
            waiting = None
        else:
            yield name, tensor


def quantized(
    weights: Iterable[tuple[str, torch.Tensor]],
    tensors: Mapping[str, Tensor],
    quantization: Quantization,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights, with the matrices that `quantization` takes quantized on `device`, each followed by its scales.
    Matrices that are quantized by the same scheme already stay as they are."""
    scheme = SCHEMES[quantization.scheme]
    for name, tensor in weights:
        if tensor.dtype == scheme.dtype or name not in tensors or not quantization.takes(tensors[name]):
            yield name, tensor
            continue
        matrix, scale = scheme.quantize(tensor.to(device))  # a row of a weight is an output channel
        yield name, matrix
        yield name + SCALE, scale


def read_quantization(path: Path, raw: Mapping[str, Any]) -> Quantization | None:
    """The quantization in `raw`, the config.json at `path`; None: plain weights. Raises ModelError if it is unknown."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found:
        return None
    try:
        for scheme in SCHEMES.values():
            modules = scheme.modules_left(found)
            if modules is not None:
                _check_patterns(modules)
                return Quantization(scheme.name, modules)
        what = _described(found)
    except ValueError as error:
        what = str(error)
    known = ", ".join(scheme.checkpoints for scheme in SCHEMES.values() if scheme.checkpoints)
    raise ModelError(
        f"{path}: the weights are quantized ({what}), but the engine knows {known}, plain weights, and GGUF files"
    )


def _check_patterns(modules: tuple[Any, ...]) -> None:
    """Raise ValueError unless these are names, or patterns that can be matched."""
    for each in modules:
        if not isinstance(each, str):
            raise ValueError(f"modules that are not quantized are named by {each!r:.80}")
        if each.startswith("re:"):
            module_pattern(each[3:])


def _described(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if method != "compressed-tensors":
        return repr(method)
    groups = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    kinds = [f"{each.get('num_bits')}-bit {each.get('type')} by {each.get('strategy')}" for each in groups]
    return f"compressed-tensors with weights of {' and '.join(kinds)}"
