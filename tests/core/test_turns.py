"""Turns on the interpreter are short while a migration moves, and the app's own before and after."""

import sys

import pytest

from whimbrel import Kernel, Machine
from whimbrel.turns import SHORT, ShortTurns
from whimbrel_ram import RAMBlock


@pytest.fixture(autouse=True)
def interval():
    """One that is nobody's default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    yield
    sys.setswitchinterval(before)


def now():
    return pytest.approx(sys.getswitchinterval(), abs=2e-6)


def test_short_until_the_last_has_let_go():
    turns = ShortTurns()
    turns.hold()
    turns.hold()
    assert now() == SHORT
    turns.release()
    assert now() == SHORT
    turns.release()
    assert now() == 0.004
    turns.hold()
    assert now() == SHORT


def test_shorter_ones_are_left():
    sys.setswitchinterval(0.0001)
    turns = ShortTurns()
    turns.hold()
    assert now() == 0.0001
    turns.release()
    assert now() == 0.0001


def test_what_the_app_sets_meanwhile_stays():
    turns = ShortTurns()
    turns.hold()
    sys.setswitchinterval(0.002)
    turns.release()
    assert now() == 0.002


@pytest.mark.parametrize("fails", [False, True])
def test_around_what_moves(tmp_path, fails):
    """Not while a destination waits for its source; and over with the run, however it ended."""
    seen = []
    source, destination = Machine("m-1", stop=lambda: seen.append(now())), Machine("m-1")
    source.add(RAMBlock("ram", 1 << 20))
    destination.add(RAMBlock("ram", 2 << 20 if fails else 1 << 20))
    incoming = Kernel(destination).incoming(f"unix:{tmp_path}/m")
    assert now() == 0.004
    kernel = Kernel(source)
    outgoing = kernel.migrate(f"unix:{tmp_path}/m")
    for run in (outgoing, incoming):
        try:
            run.wait(60)
        except Exception:
            assert fails
    assert seen == [SHORT] or fails
    assert now() == 0.004
