"""A link that is cut, or falls silent, in every phase: never two running copies, never none without saying so.

The patterns are bytes of the stream (all integers big-endian): section headers `type u32-id`, footers `7e u32-id`,
commands `08 u16-number u16-length data`, answers `u16-type u16-length data`.
"""

import pytest

from whimbrel_testing.harness import AppError
from whimbrel_testing.pacing import Direction, Link, Trigger

from .conftest import SETTINGS

FORWARD, BACK = Direction.FORWARD, Direction.BACK

#: The ram section is the fifth: four devices were added before it.
RAM = b"\x00\x00\x00\x05"
PART = b"\x7e" + RAM + b"\x02" + RAM
END = b"\x7e" + RAM + b"\x03" + RAM
COMMIT_PING = b"\x08\x00\x02\x00\x04\x80\x00\x00"
COMMIT_PONG = b"\x00\x02\x00\x04\x80\x00\x00\x01"
SHUT = b"\x00\x01\x00\x04\x00\x00\x00\x00"
VMDESCRIPTION = b'{"page_size"'

#: Name: direction, pattern, whether before or after it, which occurrence. All are before the point of no return.
BEFORE_COMMIT = {
    "connect": (FORWARD, b"QEVM", True, 1),
    "in the file header": (FORWARD, b"QEVM", False, 1),
    "in the configuration": (FORWARD, b"whimbrel-stress", False, 1),
    "before the first answer": (BACK, b"\x00\x02\x00\x04\x00\x00\x00\x01", True, 1),
    "before setup": (FORWARD, b"\x01" + RAM, True, 1),
    "in setup": (FORWARD, b"stress.small", False, 1),
    "in the first pass": (FORWARD, PART, False, 1),
    "in a later round": (FORWARD, PART, True, 2),
    "at the stop": (FORWARD, END, True, 1),
    "in the last pass": (FORWARD, END, False, 1),
    "before the devices": (FORWARD, b"\x0cstress-clock", True, 1),
    "within a device": (FORWARD, b"\x0bstress-work", False, 1),
    "in the last section": (FORWARD, b"\x0bglobalstate", False, 1),
    "before the PING": (FORWARD, COMMIT_PING, True, 1),
    "after the PING": (FORWARD, COMMIT_PING + b"\x01", False, 1),
    "before the PONG": (BACK, COMMIT_PONG, True, 1),
}


def trigger_at(phase, do):
    direction, pattern, before, occurrence = phase
    return Trigger(direction, pattern, do=do, before=before, occurrence=occurrence)


@pytest.mark.parametrize("do", [Link.cut, Link.reset], ids=["cut", "reset"])
@pytest.mark.parametrize("phase", BEFORE_COMMIT.values(), ids=BEFORE_COMMIT)
def test_cut_before_the_point_of_no_return_the_source_runs_on(shared, phase, do):
    trigger = trigger_at(phase, do)
    with shared.go(triggers=[trigger]):
        shared.fired(trigger)
        result = shared.ends(shared.source, "failed")
        assert result["error"]["type"] in ("ChannelError", "EndOfStream", "PeerError")
        shared.ends(shared.destination, "failed")
    shared.runs_only_at(shared.source)


@pytest.mark.parametrize("phase", BEFORE_COMMIT.values(), ids=BEFORE_COMMIT)
def test_silence_before_the_point_of_no_return_can_be_cancelled(shared, phase):
    trigger = trigger_at(phase, Link.hang)
    with shared.go(triggers=[trigger]):
        shared.fired(trigger)
        shared.source.call("cancel")
        shared.ends(shared.source, "cancelled", "Cancelled")
        shared.runs_only_at(shared.source)
    shared.ends(shared.destination, "failed")
    shared.runs_only_at(shared.source)


AT_SWITCHOVER = list(BEFORE_COMMIT)[list(BEFORE_COMMIT).index("at the stop") :]


@pytest.mark.parametrize("name", AT_SWITCHOVER)
def test_silence_at_switchover_ends_by_itself_and_the_source_runs_on(shared, name):
    """The destination may have everything but EOF: it must not start, however long it waits."""
    trigger = trigger_at(BEFORE_COMMIT[name], Link.hang)
    shared.impatient()
    with shared.go(triggers=[trigger]) as link:
        shared.fired(trigger)
        shared.ends(shared.source, "failed", "DeadlineExceeded")
        shared.runs_only_at(shared.source)
        link.resume()  # what was under way arrives after all
        shared.ends(shared.destination, "failed")
    shared.runs_only_at(shared.source)


def test_after_all_of_that_the_machine_can_still_move(shared):
    shared.source.call("set", **SETTINGS)
    with shared.go():
        shared.ends(shared.source, "completed")
        shared.ends(shared.destination, "completed")
    shared.runs_only_at(shared.destination)


# ---- behind the point of no return


@pytest.mark.parametrize("do", [Link.cut, Link.reset, Link.hang], ids=["cut", "reset", "hang"])
def test_between_pong_and_eof_it_is_unknown_and_nobody_runs_until_resolved(world, do):
    world.impatient()
    trigger = Trigger(BACK, COMMIT_PONG, do=do, before=False)
    with world.go(triggers=[trigger]) as link:
        world.ends(world.source, "unknown", "OutcomeUnknown")
        world.runs_nowhere()
        link.cut()
        world.ends(world.destination, "failed")
    world.runs_nowhere()
    assert world.source.call("report")["run_state"] == "finish-migrate"
    with pytest.raises(AppError, match="unknown"):
        world.source.call("migrate", uri="tcp:127.0.0.1:1")
    world.source.call("resolve", run_here=True)
    world.runs_only_at(world.source)


@pytest.mark.parametrize("do", [Link.cut, Link.reset, Link.hang], ids=["cut", "reset", "hang"])
def test_between_eof_and_shut_it_is_unknown_while_the_destination_runs(world, do):
    world.impatient()
    trigger = Trigger(BACK, SHUT, do=do)
    with world.go(triggers=[trigger]):
        world.ends(world.source, "unknown", "OutcomeUnknown")
        world.ends(world.destination, "completed")
        world.runs_only_at(world.destination)
    world.source.call("resolve", run_here=False)
    assert world.source.call("report")["run_state"] == "postmigrate"
    with pytest.raises(AppError, match="second copy"):
        world.source.call("migrate", uri="tcp:127.0.0.1:1")
    world.runs_only_at(world.destination)


@pytest.mark.parametrize("do", [Link.cut, Link.reset], ids=["cut", "reset"])
def test_cut_within_the_vmdescription_the_destination_has_taken_over(world, do):
    trigger = Trigger(FORWARD, VMDESCRIPTION, do=do)
    with world.go(triggers=[trigger]):
        world.ends(world.source, "unknown", "OutcomeUnknown")
        world.ends(world.destination, "completed")
    world.runs_only_at(world.destination)


def test_behind_the_point_of_no_return_cancel_is_refused(world):
    trigger = Trigger(BACK, SHUT, do=Link.hang)
    with world.go(triggers=[trigger]) as link:
        world.fired(trigger)
        with pytest.raises(AppError, match="too late to cancel"):
            world.source.call("cancel")
        link.resume()
        assert world.ends(world.source, "completed")["acknowledged"]
    world.runs_only_at(world.destination)


def test_after_shut_a_cut_changes_nothing(world):
    trigger = Trigger(BACK, SHUT, do=Link.cut, before=False)
    with world.go(triggers=[trigger]):
        assert world.ends(world.source, "completed")["acknowledged"]
        world.ends(world.destination, "completed")
    world.runs_only_at(world.destination)


def test_a_direct_link_that_delays_what_follows_eof_makes_no_second_copy(world):
    """The destination runs from EOF on, and what it waits for behind it comes too late. A direct link is faithful: the
    end of the connection that the source sees in the end is the destination's own, which is alive and runs.
    """
    trigger = Trigger(FORWARD, VMDESCRIPTION, do=Link.hang)
    with world.go(triggers=[trigger], direct=True) as link:
        world.fired(trigger)
        world.ends(world.destination, "completed")  # it gave up waiting for the rest
        assert world.pair.running() == ["destination"]
        link.resume()
        world.ends(world.source, "completed")
    world.runs_only_at(world.destination)


# ---- the same with a fence: it settles what would be unknown


@pytest.mark.parametrize("do", [Link.cut, Link.reset, Link.hang], ids=["cut", "reset", "hang"])
def test_with_a_fence_the_source_takes_back_what_never_arrived(fenced, do):
    fenced.impatient()
    trigger = Trigger(BACK, COMMIT_PONG, do=do, before=False)
    with fenced.go(triggers=[trigger]) as link:
        fenced.ends(fenced.source, "failed")
        fenced.runs_only_at(fenced.source)
        link.resume()  # after a mere silence EOF comes late: the destination finds the fence taken
        fenced.ends(fenced.destination, "failed", "MachineError" if do is Link.hang else None)
    fenced.runs_only_at(fenced.source)
    with fenced.go():  # and a later migration has a generation of its own
        fenced.ends(fenced.source, "completed")
    fenced.runs_only_at(fenced.destination)


@pytest.mark.parametrize("do", [Link.cut, Link.reset, Link.hang], ids=["cut", "reset", "hang"])
def test_with_a_fence_the_source_leaves_it_to_the_destination_that_has_it(fenced, do):
    fenced.impatient()
    trigger = Trigger(BACK, SHUT, do=do)
    with fenced.go(triggers=[trigger]):
        result = fenced.ends(fenced.source, "completed")
        assert not result["acknowledged"]
    fenced.runs_only_at(fenced.destination)
