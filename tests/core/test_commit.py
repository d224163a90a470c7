"""Never lost, never twice: what the source does when the destination answers, refuses, dies or falls silent."""

import threading
import time

import pytest

from whimbrel import (
    Cancelled,
    ChannelError,
    EndOfStream,
    MachineError,
    MigrationError,
    Outcome,
    OutcomeUnknown,
    PeerError,
    RunState,
    StateError,
    Status,
)
from whimbrel.wire.return_path import encode_shut

from .conftest import Live, Number, ScriptedDestination, answer_pong, answer_shut, hang_up


@pytest.fixture
def source(world):
    side = world.side(Number("a", 5))
    side.kernel.settings["commit-timeout"] = 300
    return side


def runs_on(side):
    return side.machine.run_state is RunState.RUNNING and side.calls[-1] == "start"


def test_shut_0_completes(world, source):
    peer = ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))
    result = source.kernel.migrate("pair:").wait(5)
    assert result.acknowledged
    assert peer.got_eof.is_set()
    assert source.machine.run_state is RunState.POSTMIGRATE


def test_eof_is_held_back_until_the_pong(world, source):
    peer = ScriptedDestination(world.transport.peer())
    with pytest.raises(MigrationError, match="timed out"):
        source.kernel.migrate("pair:").wait(5)
    assert peer.got_commit.is_set()
    assert not peer.got_eof.is_set()
    assert runs_on(source)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"on_ping": hang_up}, EndOfStream),
        ({"on_ping": lambda s, v: s.sendall(encode_shut(1))}, PeerError),
        ({"on_ping": lambda s, v: s.sendall(encode_shut(0))}, MigrationError),
        ({"on_ping": lambda s, v: s.sendall(b"\x00\x63\x00\x00")}, MigrationError),
        ({"on_ping": lambda s, v: s.sendall(b"\x00\x01\xff\xff")}, MigrationError),
        (
            {"on_ping": lambda s, v: s.sendall(b"\x00")},
            MigrationError,
        ),  # half an answer, then silence
        ({"on_ping": answer_pong, "on_eof": answer_shut(1)}, PeerError),
        ({"on_ping": answer_pong, "on_eof": hang_up}, EndOfStream),  # its process is gone
    ],
)
def test_the_source_runs_on(world, source, options, error):
    ScriptedDestination(world.transport.peer(), **options)
    run = source.kernel.migrate("pair:")
    with pytest.raises(error):
        run.wait(5)
    assert runs_on(source)
    assert source.kernel.state.status is Status.FAILED
    assert run.result.outcome is Outcome.FAILED


def test_silence_after_eof_is_unknown_and_nobody_starts(world, source):
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong)
    run = source.kernel.migrate("pair:")
    with pytest.raises(OutcomeUnknown, match="resolve"):
        run.wait(5)
    assert run.result.outcome is Outcome.UNKNOWN
    assert source.machine.run_state is RunState.FINISH_MIGRATE
    assert source.calls[-1] == "invalidate"
    with pytest.raises(StateError, match="unknown"):
        source.kernel.migrate("pair:")


def test_end_of_a_channel_that_proves_nothing_is_unknown(world, source):
    world.transport.eof_means_peer_gone = False
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=hang_up)
    with pytest.raises(OutcomeUnknown):
        source.kernel.migrate("pair:").wait(5)
    source.kernel.resolve(run_here=True)
    assert runs_on(source)
    assert source.calls[-2:] == ["activate", "start"]
    with pytest.raises(StateError):
        source.kernel.resolve(run_here=True)


def test_resolved_as_gone_it_is_in_postmigrate(world, source):
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong)
    with pytest.raises(OutcomeUnknown):
        source.kernel.migrate("pair:").wait(5)
    source.kernel.resolve(run_here=False)
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert "start" not in source.calls


@pytest.mark.parametrize("mine", [True, False])
def test_a_fence_settles_it(world, mine):
    asked = []

    def fence(generation):
        asked.append(generation)
        return mine

    side = world.side(Number("a"), fence=fence)
    side.kernel.settings["commit-timeout"] = 300
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong)
    run = side.kernel.migrate("pair:")
    if mine:
        with pytest.raises(MigrationError, match="timed out"):
            run.wait(5)
        assert runs_on(side)
    else:
        assert not run.wait(5).acknowledged
        assert side.machine.run_state is RunState.POSTMIGRATE
    assert asked == [1]


def test_a_fence_that_fails_leaves_it_unknown(world):
    def fence(generation):
        raise OSError("the lock server is down")

    side = world.side(Number("a"), fence=fence)
    side.kernel.settings["commit-timeout"] = 300
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong)
    with pytest.raises(OutcomeUnknown):
        side.kernel.migrate("pair:").wait(5)
    assert "start" not in side.calls


def test_the_destination_asks_its_fence_for_the_generation_of_the_source(world):
    asked = []
    source = world.side(Number("a"))
    source.machine.generation = 41
    destination = world.side(Number("a"), fence=lambda g: asked.append(g) or False)
    incoming = destination.kernel.incoming("pair:")
    with pytest.raises(PeerError):
        source.kernel.migrate("pair:").wait(5)
    with pytest.raises(MachineError, match="generation 42"):
        incoming.wait(5)
    assert asked == [42]
    assert runs_on(source)
    assert "start" not in destination.calls


# ---- without a way back


def test_without_a_way_back_completed_means_finished(world, source):
    world.transport.way_back = False
    peer = ScriptedDestination(world.transport.peer())
    result = source.kernel.migrate("pair:").wait(5)
    assert not result.acknowledged
    peer.join(5)
    assert b"\x08\x00\x01" not in peer.got  # no OPEN_RETURN_PATH


def test_without_a_way_back_an_error_after_eof_is_unknown(world, source, monkeypatch):
    """A destination without a way back closes when it runs the machine as well as when it dies."""
    world.transport.way_back = False
    original = world.transport._end

    def end(number):
        channel = original(number)

        def finish(deadline=None):
            raise ChannelError("connection reset")

        channel.finish = finish
        return channel

    world.transport._end = end
    ScriptedDestination(world.transport.peer())
    with pytest.raises(OutcomeUnknown):
        source.kernel.migrate("pair:").wait(5)
    assert "start" not in source.calls


def test_return_path_off_sends_no_commands(world, source):
    source.kernel.settings["return-path"] = False
    peer = ScriptedDestination(world.transport.peer())
    assert not source.kernel.migrate("pair:").wait(5).acknowledged
    peer.join(5)
    assert b"\x08\x00\x01" not in peer.got


# ---- cancel


def cancels_within_a_second(run):
    began = time.monotonic()
    run.cancel()
    with pytest.raises(Cancelled):
        run.wait(5)
    # Not a claim about speed but the contract: a peer that hangs does not hold up a cancel.
    assert time.monotonic() - began < 1


def test_cancel_in_connect(world, source):
    world.transport.hang_connect = True
    run = source.kernel.migrate("pair:")
    cancels_within_a_second(run)
    assert source.kernel.state.status is Status.CANCELLED
    assert source.calls == []


def test_cancel_while_the_peer_does_not_read(world):
    side = world.side(Number("a"), Live(1 << 28))
    side.kernel.settings["max-bandwidth"] = 0
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.ACTIVE, 5)
    cancels_within_a_second(run)
    assert side.machine.run_state is RunState.RUNNING


def test_cancel_while_rate_limited(world):
    side = world.side(Number("a"), live := Live(1 << 28))
    side.kernel.settings["max-bandwidth"] = 1 << 20
    ScriptedDestination(world.transport.peer())
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.ACTIVE, 5)
    cancels_within_a_second(run)
    assert live.outcomes == [Outcome.CANCELLED]


def test_cancel_between_ping_and_pong(world, source):
    source.kernel.settings["commit-timeout"] = 60_000
    peer = ScriptedDestination(world.transport.peer())
    run = source.kernel.migrate("pair:")
    assert peer.got_commit.wait(5)
    cancels_within_a_second(run)
    assert runs_on(source)
    assert not peer.got_eof.is_set()


def test_cancel_after_eof_is_refused(world, source):
    source.kernel.settings["commit-timeout"] = 60_000
    go = threading.Event()

    def shut_later(sock):
        assert go.wait(5)
        sock.sendall(encode_shut(0))

    peer = ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=shut_later)
    run = source.kernel.migrate("pair:")
    assert peer.got_eof.wait(5)
    with pytest.raises(StateError, match="too late"):
        run.cancel()
    go.set()
    assert run.wait(5).outcome is Outcome.COMPLETED


def test_cancel_when_it_is_over_changes_nothing(world, source):
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))
    run = source.kernel.migrate("pair:")
    run.wait(5)
    run.cancel()
    source.kernel.cancel()
    assert source.kernel.state.status is Status.COMPLETED


def test_cancel_of_the_2013_profile_has_no_state_in_between(world):
    side = world.side(Number("a"), Live(1 << 28), profile="2013")
    seen = []
    side.kernel.notifiers.add(lambda n: seen.append(n.new))
    ScriptedDestination(world.transport.peer())
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.ACTIVE, 5)
    cancels_within_a_second(run)
    assert Status.CANCELLING not in seen
    assert side.kernel.state.status is Status.CANCELLED


def test_cancel_of_an_incoming_migration_that_nobody_comes_to(world):
    destination = world.side(Number("a"))
    incoming = destination.kernel.incoming("pair:")
    cancels_within_a_second(incoming)
    assert destination.machine.run_state is RunState.INMIGRATE
    world.transport.renew()
    again = destination.kernel.incoming("pair:")
    world.side(Number("a", 8)).kernel.migrate("pair:").wait(5)
    again.wait(5)
    assert destination.machine.run_state is RunState.RUNNING
