"""Builds the kernel's shared library; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "comoe.kernels._native",
            sources=["src/comoe/kernels/expert.c", "src/comoe/kernels/scales.c"],
            depends=["src/comoe/kernels/clones.h"],
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno"],
            optional=True,
        )
    ]
)
