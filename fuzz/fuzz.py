"""One target under atheris: python fuzz/fuzz.py TARGET [libFuzzer options and files]. See README.md."""

import sys

import atheris

if __name__ == "__main__":
    import numpy as np  # noqa: F401 - not instrumented: it is not what is looked for

    with atheris.instrument_imports(
        include=[
            *("whimbrel", "whimbrel_block", "whimbrel_device", "whimbrel_monitor", "whimbrel_qemu"),
            *("whimbrel_ram", "whimbrel_rdma", "whimbrel_zstd"),
        ]
    ):
        import targets

    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()
