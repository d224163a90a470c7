"""Lines that fit: long addresses, names in other scripts, long errors, narrow and wide terminals."""

import fcntl
import io
import os
import pty
import struct
import termios

import pytest
from hypothesis import given, strategies as st
from rich.cells import cell_len
from rich.console import Console

from whimbrel_cli import display, screen
from whimbrel_cli.logs import folded
from whimbrel_cli.looking import Look
from whimbrel_cli.progress import Disk, Estimator
from whimbrel_cli.screen import Screen

PAGE = 4096
TITLE = (
    "unix:/var/lib/machines/gäste/東京-サーバー/monitor.qmp -> tcp:ziel.beispiel.example:4444" * 2
)


@given(st.text(max_size=120), st.integers(1, 100))
def test_a_shortened_text_fits_and_keeps_both_ends(text, columns):
    short = display.shortened(text, columns)
    assert cell_len(short) <= columns
    if "…" in short and "…" not in text:
        head, tail = short.split("…")
        whole = display.shortened(text, 10_000)
        assert whole.startswith(head)
        assert whole.endswith(tail)


def reading(*, excess=False, disk=False):
    estimator = Estimator(0.3)
    for tick in range(30):
        answer = {
            "status": "active",
            "total-time": tick * 1000,
            "expected-downtime": 4000,
            "cpu-throttle-percentage": 20,
            "ram": {
                "page-size": PAGE,
                "total": 1 << 42,
                "remaining": 1 << 41,
                "normal": 250_000_000 + tick * 25_600,
                "transferred": (1 << 41) + tick * 25_600 * PAGE,
                "dirty-sync-count": 4,
                "dirty-pages-rate": 60_000 if excess else 10_000,
            },
        }
        if disk:
            answer["disk"] = {"total": 1 << 42, "remaining": 1 << 40}
        last = estimator.feed(answer, float(tick))
    return last


def drawn(renderable, columns, **kwargs):
    console = Console(file=io.StringIO(), width=columns, height=24, highlight=False, **kwargs)
    console.print(renderable(console) if callable(renderable) else renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("excess", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_the_live_display_fits(columns, excess, disk):
    now = reading(excess=excess, disk=disk)
    lines = drawn(display.render(TITLE, now, columns), columns).splitlines()
    assert max(map(cell_len, lines)) <= columns
    assert lines[0].startswith("unix:/var/lib")
    assert "4444" in lines[0]
    assert ("of it, disks" in lines[2]) == disk
    assert any("not converging: memory gets dirty 2.3 times" in line for line in lines) == excess


@pytest.mark.parametrize("columns", [80, 150, 200])
def test_a_screen_of_many_machines_fits(columns):
    looks = [
        Look(address=TITLE, run_state="running", reading=reading()),
        Look(address="unix:/b", run_state="running", reading=reading(excess=True)),
        Look(address=f"unix:/{'c' * 300}", trouble="it serves another program " * 9),
        Look(address="東京" * 60, run_state="guest-panicked"),
        *(Look(address=f"unix:/vm-{n}", run_state="running") for n in range(100)),
    ]

    def drawing(console):
        view = Screen(console, [look.address for look in looks])
        for look in looks:
            view.show(look)
        return view.render()

    lines = drawn(drawing, columns).splitlines()
    assert len(lines) <= 24
    assert max(map(cell_len, lines)) <= columns
    assert "104 machines, 2 migrating, 1 without an answer" in lines[0]
    assert "(1 of " in lines[-1]
    figures = [line for line in lines if "%" in line]
    assert len(figures) == 2
    assert "never" in figures[1]
    assert {line.index("%") for line in figures} == {lines[1].index("done") + 3}


@pytest.mark.parametrize("no_color", [False, True])
def test_without_colours_the_bar_is_still_one(no_color):
    text = drawn(
        display.render("a", reading(), 80), 80, force_terminal=True, no_color=no_color
    ).splitlines()[1]
    assert ("\x1b[38;5" in text or "\x1b[9" in text or "\x1b[3" in text) != no_color
    if no_color:
        assert 0 < text.count("━") < 30  # what is to come is left blank


def test_disks_without_a_size_are_no_bar():
    import attrs

    now = attrs.evolve(reading(), disk=Disk(0, 0))
    assert "disks" not in drawn(display.render("a", now, 80), 80)


def test_long_errors_break_at_words_on_a_terminal_only():
    text = "migctl: error: " + "a rather long sentence about unix:/run/vm.qmp, " * 5
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        with os.fdopen(theirs, "w", closefd=False) as stream:
            lines = folded(text, stream, indent=4).split("\n")
            path = "x" * 200
            assert folded(path, stream) == path  # what somebody copies stays whole
    finally:
        os.close(ours)
        os.close(theirs)
    assert len(lines) > 2
    assert all(len(line) < 80 for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == text.strip()
    assert folded(text, io.StringIO()) == text


def test_each_display_tells_the_same_forecast():
    now = reading()
    assert now.switchover is not None
    told = display.switchover(now.switchover, now.downtime, now.eta_range)
    assert told in " ".join(drawn(display.render("a", now, 80), 80).split())
    assert display.switchover(now.switchover, now.downtime) in screen.line(
        Look(address="a", run_state="running", reading=now)
    )
    assert display.members(now)["switchover"] == pytest.approx(now.switchover)
    late = reading(excess=True)
    assert display.divergence(late) in screen.line(
        Look(address="a", run_state="running", reading=late)
    )
    assert display.members(late)["switchover"] is None
