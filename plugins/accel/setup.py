# ruff: noqa: INP001 - a script of the build
"""The extension, for any CPython from 3.11 on. Where there is no compiler the package is installed without it."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            f"whimbrel_accel.{name}",
            [f"src/whimbrel_accel/{name}.c"],
            depends=["src/whimbrel_accel/common.h"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3"],
            py_limited_api=True,
            optional=True,
        )
        for name in ("_deltas", "_packets", "_records")
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
