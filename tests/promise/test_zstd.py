"""The promise holds through zstd::, whose link carries other bytes: cut after so many of them, or at an answer.

An answer is too short to be made shorter: its frame holds it as it is.
"""

import pytest

from whimbrel_testing.pacing import Direction, Link, Trigger

from .test_cut_link import BACK, COMMIT_PONG, SHUT


class AtByte(Trigger):
    """Acts before byte `at` of its direction."""

    def __init__(self, at, do, direction=Direction.FORWARD):
        super().__init__(direction, b"", do)
        self.left = at

    def place(self, data):
        place, self.left = self.left, self.left - len(data)
        return place if place < len(data) else None

    def held(self, data):
        return 0


class AfterPong(Trigger):
    """Acts behind the frame of the PONG at switchover, which ends with a checksum."""

    def __init__(self, do):
        super().__init__(BACK, COMMIT_PONG, do, before=False)

    def place(self, data):
        found = super().place(data)
        return None if found is None else found + 4


@pytest.mark.parametrize("do", [Link.cut, Link.reset], ids=["cut", "reset"])
@pytest.mark.parametrize("at", [0, 1, 5, 20, 500, 100_000, 2_000_000, 4_000_000])
def test_cut_within_the_stream_the_source_runs_on(shared, at, do):
    trigger = AtByte(at, do)
    with shared.go(triggers=[trigger], filters="zstd::"):
        shared.fired(trigger)
        shared.ends(shared.source, "failed")
        shared.ends(shared.destination, "failed")
    shared.runs_only_at(shared.source)


@pytest.mark.parametrize("at", [0, 20, 100_000, 4_000_000])
def test_silence_within_the_stream_can_be_cancelled(shared, at):
    trigger = AtByte(at, Link.hang)
    with shared.go(triggers=[trigger], filters="zstd::"):
        shared.fired(trigger)
        shared.source.call("cancel")
        shared.ends(shared.source, "cancelled", "Cancelled")
        shared.runs_only_at(shared.source)
    shared.ends(shared.destination, "failed")


@pytest.mark.parametrize("do", [Link.cut, Link.reset], ids=["cut", "reset"])
def test_cut_before_the_pong_the_source_runs_on(shared, do):
    trigger = Trigger(BACK, COMMIT_PONG, do=do)
    with shared.go(triggers=[trigger], filters="zstd::"):
        shared.fired(trigger)
        shared.ends(shared.source, "failed")
        shared.ends(shared.destination, "failed")
    shared.runs_only_at(shared.source)


@pytest.mark.parametrize("do", [Link.cut, Link.hang], ids=["cut", "hang"])
def test_between_pong_and_eof_it_is_unknown_and_nobody_runs_until_resolved(world, do):
    world.impatient()
    trigger = AfterPong(do)
    with world.go(triggers=[trigger], filters="zstd::") as link:
        world.ends(world.source, "unknown", "OutcomeUnknown")
        world.runs_nowhere()
        link.cut()
        world.ends(world.destination, "failed")
    world.runs_nowhere()
    world.source.call("resolve", run_here=True)
    world.runs_only_at(world.source)


@pytest.mark.parametrize("do", [Link.cut, Link.hang], ids=["cut", "hang"])
def test_between_eof_and_shut_it_is_unknown_while_the_destination_runs(world, do):
    world.impatient()
    trigger = Trigger(BACK, SHUT, do=do)
    with world.go(triggers=[trigger], filters="zstd::"):
        world.ends(world.source, "unknown", "OutcomeUnknown")
        world.ends(world.destination, "completed")
        world.runs_only_at(world.destination)


def test_a_destination_killed_behind_eof_is_proof_that_it_is_gone(world):
    """The end between two frames on a direct link: the source takes its machine back."""
    trigger = AfterPong(lambda _: world.destination.kill())
    with world.go(triggers=[trigger], filters="zstd::", direct=True):
        world.fired(trigger)
        world.ends(world.source, "failed")
        world.runs_only_at(world.source)
