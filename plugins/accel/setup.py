# ruff: noqa: INP001 - a script of the build
"""The extension, for any CPython from 3.11 on. Where there is no compiler the package is installed without it."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "whimbrel_accel._deltas",
            ["src/whimbrel_accel/_deltas.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
