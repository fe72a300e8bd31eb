"""Builds the CPU kernels. Everything else about the package is in pyproject.toml.

Where there is no C compiler the build goes on without them, and the engine runs on torch's operators instead.
"""

import sys

from setuptools import Extension, setup

# Apple's clang has no OpenMP of its own; the kernels then run on one thread.
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

setup(
    ext_modules=[
        Extension(
            "engine.kernels._native",
            sources=["engine/kernels/native.c"],
            depends=["engine/kernels/native_target.h"],
            # No -ffast-math: the kernels promise one order of operations. -Wno-psabi: vectors never cross a call.
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-Wno-psabi", *openmp],
            extra_link_args=[*openmp, "-lm"],
            optional=True,
        )
    ]
)
