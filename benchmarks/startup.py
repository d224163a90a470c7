"""How long `migctl --version` and `--help` take, beside a bare interpreter: the median and the slowest of RUNS runs.

    python benchmarks/startup.py [RUNS]        exit status 1 when a median is over 0.2 s (--help: 0.3 s)

Where the time goes: python -X importtime -c 'from whimbrel_cli.main import main; main()' --version
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMITS = {"migctl --version": 0.2, "migctl --help": 0.3}  # seconds
MIGCTL = Path(sys.executable).with_name("migctl")


def seconds(*command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    commands = {
        "python -c pass": (sys.executable, "-c", "pass"),
        "migctl --version": (MIGCTL, "--version"),
        "migctl --help": (MIGCTL, "--help"),
        "migctl --plugins": (MIGCTL, "--plugins"),
    }
    for command in commands.values():  # warm the page cache and the .pyc files
        seconds(*command)
    median = {}
    for name, command in commands.items():
        times = [seconds(*command) for _ in range(runs)]
        median[name] = statistics.median(times)
        print(f"{name:18} median {median[name]:.3f} s   slowest {max(times):.3f} s")
    return any(median[name] > limit for name, limit in LIMITS.items())


if __name__ == "__main__":
    sys.exit(main())
