"""Thousands of damaged streams: each is taken or refused, in bounded time and memory, and what is kept comes back."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from whimbrel_testing.wrong import all_cases
from whimbrel_testing.wrong.loaders import App, ClosedSource, keep
from whimbrel_testing.wrong.mutate import Mutator, keep_and_take_again, outcome

from .conftest import CORPUS, capture

pytestmark = pytest.mark.timeout(300)

COUNT = int(os.environ.get("WHIMBREL_MUTATIONS", "5000"))
GOOD = next(case for case in all_cases() if case.name == "legal-plain").data()


def run(files, first, count, folder):
    command = [sys.executable, "-m", "whimbrel_testing.wrong.mutate", *map(str, files)]
    command += ["--first", str(first), "--count", str(count), "--keep", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, errors = process.communicate(timeout=280)
    assert process.returncode in (0, 1), errors
    report = json.loads(out)
    assert not report["wrong"], "\n\n".join(f"{w['what']}\n{w['said']}" for w in report["wrong"])
    return report["counts"]


@pytest.mark.interop
def test_each_is_taken_or_refused(corpus, tmp_path):
    """In two processes: memory is bounded for each as a whole, so that a length that is believed fails there."""
    hand = tmp_path / "hand"
    hand.write_bytes(GOOD)
    files = [hand, *corpus.values()]
    halves = [run(files, first, COUNT // 2, tmp_path) for first in (0, COUNT // 2)]
    for counts in map(finish, halves):
        assert sum(counts.values()) == 2 * (COUNT // 2)  # two loaders
        for kind in ("keep taken", "keep refused", "app taken", "app refused"):
            assert counts.get(kind, 0) > COUNT // 50  # the damage is neither too much nor none


def test_the_damage_is_the_same_for_the_same_number():
    once, again = (Mutator([GOOD, GOOD[:500]]) for _ in range(2))
    assert [once(n) for n in range(50)] == [again(n) for n in range(50)]
    assert len({once(n)[0] for n in range(50)}) > 40


def test_what_a_loader_must_not_do_is_noticed():
    def hang(_):
        while True:
            pass

    def swallow(_):
        with contextlib.suppress(Exception):
            hang(_)

    def fail(_):
        raise KeyError("section")

    for load, said in ((fail, "KeyError"), (hang, "TooLong"), (swallow, "TooLong")):
        verdict, text = outcome(load, b"", seconds=0.1)
        assert verdict == "wrong"
        assert said in text
    assert outcome(lambda _: None, b"") == ("taken", "")


def test_a_length_that_is_believed_runs_out_of_memory(tmp_path):
    code = (
        "from whimbrel_testing.wrong.mutate import MEMORY, limit_memory, outcome\n"
        "limit_memory()\n"
        "print(outcome(lambda _: bytearray(2 * MEMORY), b''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MemoryError" in done.stdout


@pytest.mark.interop
@pytest.mark.parametrize("name", CORPUS)
def test_what_real_peers_send_is_kept_and_comes_back(corpus, name):
    keep_and_take_again(corpus[name].read_bytes())


@pytest.mark.interop
def test_a_device_that_comes_before_ram_is_kept(binaries, tmp_path):
    """virtio-mem: its first section must be there when RAM comes, and is described like those behind RAM."""
    sent, kept = tmp_path / "sent", tmp_path / "kept"
    memory = "-object memory-backend-ram,id=m,size=128M -device virtio-mem-pci,memdev=m"
    capture(binaries["10.0"], sent, *f"-M pc -m 32M,maxmem=256M {memory}".split())
    assert keep(ClosedSource(sent.read_bytes()), kept, max_ram=256 << 20) == sent.read_bytes()


@pytest.mark.interop
@pytest.mark.parametrize("name", [name for name in CORPUS if name.startswith("none")])
def test_an_app_takes_the_smallest_machine_of_a_qemu(corpus, name):
    app = App()
    app.load(ClosedSource(corpus[name].read_bytes()), dialect=None)
    assert app.machine.received_run_state == "prelaunch"
