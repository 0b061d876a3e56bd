"""Builds the compiled cost models and quantizers; everything else about the package stands in pyproject.toml.

Every ``.pyx`` under fxopt/targets and fxopt/graph becomes an extension module: a new family of models is a new file, no
edit here.
``FXOPT_CYTHON_DEBUG=1`` keeps bounds checks and debug symbols.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("FXOPT_CYTHON_DEBUG", "") not in ("", "0")

# NaN stands for "no model" inside the kernels, so no -ffast-math; wheels travel, so no -march=native.
# Formulas are compiled by themselves and into loops, which have to give the same to the last bit: no fusing of
# products and sums; and into loops they go whatever their size.
COMPILE_ARGS = (
    ["-O0", "-g"]
    if DEBUG
    else [
        *("-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
        "-DCYTHON_INLINE=__inline__ __attribute__((always_inline))",
    ]
)

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    "cdivision": True,
    "embedsignature": True,
}


def extensions() -> list[Extension]:
    """One extension for each .pyx, named by its path (fxopt/targets is a link, or real files in a distribution)."""
    patterns = ("graph/*.pyx", "targets/*.pyx", "targets/*/*.pyx")
    sources = [source for pattern in patterns for source in sorted(Path("fxopt").glob(pattern))]
    return [
        Extension(".".join(source.with_suffix("").parts), [source.as_posix()], extra_compile_args=COMPILE_ARGS)
        for source in sources
    ]


setup(
    ext_modules=cythonize(
        extensions(),
        build_dir="build/cython-debug" if DEBUG else "build/cython",
        compiler_directives=DIRECTIVES,
        force=True,
        quiet=True,
    ),
    # The two kinds of build share the names of their results, which dates alone do not tell apart.
    options={"build_ext": {"force": True, "parallel": os.cpu_count() or 1}},
)
