"""Builds the CPU kernels. Everything else about the package is in pyproject.toml.

Where there is no C compiler the build goes on without them, and the engine runs on torch's operators instead.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pilotfish.engine.kernels._native",
            sources=["engine/kernels/native.c"],
            depends=sorted(glob("engine/kernels/*.h")),
            # No -ffast-math: the kernels promise one order of operations. -Wno-psabi: vectors never cross a call.
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-Wno-psabi", "-pthread"],
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ]
)
