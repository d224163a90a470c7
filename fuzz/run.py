"""Fuzz every target for its share of the time: python fuzz/run.py [--seconds N] [TARGET...]. See README.md."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "fuzz"
TARGETS = ("stream", "vmdescription", "vmstate", "qmp", "zstd", "block", "rdma")
#: Seconds for one input, and MiB for the process: what needs more is a bug.
INPUT_SECONDS, MEMORY = 20, 1500


def _need_atheris() -> None:
    if importlib.util.find_spec("atheris") is not None:
        return
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    sys.exit(
        f"make fuzz needs atheris, which is not installed for {here}."
        " It comes as a wheel for Python 3.11 to 3.13 on Linux x86_64: make fuzz PYTHON=python3.13 VENV=.venv-fuzz"
    )


def _run(target: str, seconds: int) -> bool:
    import seeds

    corpus, found = WORK / target / "corpus", WORK / target / "found"
    found.mkdir(parents=True, exist_ok=True)
    seeds.write(target, corpus)
    log = WORK / target / "log"
    print(f"{target}: {seconds} s ...", flush=True)
    with log.open("wb") as output:
        status = subprocess.run(
            [
                *(sys.executable, HERE / "fuzz.py", target, f"-max_total_time={seconds}"),
                *(f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY}", "-max_len=20000"),
                *(f"-artifact_prefix={found}/", "-print_final_stats=1", corpus),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONWARNINGS": "default"},
            check=False,
        ).returncode
    said = log.read_text(errors="replace").splitlines()
    stats = dict(
        line.removeprefix("stat::").split(":", 1) for line in said if line.startswith("stat::")
    )
    if status == 0:
        print(f"{target}: {stats['number_of_executed_units'].strip()} inputs, nothing found")
        return True
    print(*said[-60:], sep="\n")
    print(
        f"{target}: failed. The input is in {found}; again with it: {sys.executable} {HERE}/fuzz.py {target} FILE"
    )
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(
            f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}"
        )
    _need_atheris()
    share = max(1, options.seconds // len(options.targets))
    results = [_run(target, share) for target in options.targets]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
