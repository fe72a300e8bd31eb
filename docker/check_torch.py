"""Exits with a message if the installed torch is not the build that the image's variant asks for:
`check_torch.py cpu|cuda`.

The same version of torch comes as a build for the CPU and as one for CUDA, which is several GB larger; which of them
pip gets depends on the index that it asks.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

CUDA = "13"
"""Major version of the CUDA that the image is for."""


def cuda_of_torch() -> str | None:
    """The CUDA version that torch was built with, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed")
    version: str | None = runpy.run_path(str(Path(spec.origin).parent / "version.py"))["cuda"]
    return version


def main(variant: str) -> None:
    if variant not in ("cpu", "cuda"):
        sys.exit(f"VARIANT is {variant!r}, but must be cpu or cuda")
    cuda = cuda_of_torch()
    if variant == "cpu" and cuda is not None:
        sys.exit(f"VARIANT=cpu, but this torch is built for CUDA {cuda}: give TORCH_INDEX_URL, an index of CPU wheels")
    if variant == "cuda" and (cuda is None or cuda.partition(".")[0] != CUDA):
        sys.exit(f"VARIANT=cuda, but this torch is built for {cuda or 'the CPU'} instead of CUDA {CUDA}")


if __name__ == "__main__":
    main(sys.argv[1])
