"""Who stops and starts the machine: the migration, and whoever else may while one goes on."""

import threading

import pytest

from whimbrel import (
    Cancelled,
    MachineError,
    Outcome,
    RunState,
    StateError,
    Status,
    What,
)

from .conftest import (
    Live,
    Number,
    ScriptedDestination,
    answer_pong,
    answer_shut,
    hang_up,
)


class Told:
    """What a monitor would tell as events, in order."""

    def __init__(self, kernel):
        self.events = []
        kernel.notifiers.add(self._note)

    def _note(self, n):
        if n.what is What.STATE:
            self.events.append(str(n.new))
        elif n.what is What.PASS:
            self.events.append(f"PASS {n.pass_number}")
        elif n.what in (What.STOP, What.RESUME):
            self.events.append(n.what.name)


@pytest.fixture
def side(world):
    side = world.side(Number("a"))
    side.told = Told(side.kernel)
    return side


def peer(world, **options):
    options = {"on_ping": answer_pong, "on_eof": answer_shut(0)} | options
    return ScriptedDestination(world.transport.peer(), **options)


def pauses(side):
    """A migration in pre-switchover."""
    side.kernel.settings["pause-before-switchover"] = True
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.PRE_SWITCHOVER, 5)
    return run


def test_events_of_a_machine_that_runs(world, side):
    peer(world)
    side.kernel.migrate("pair:").wait(5)
    assert side.told.events == [
        "setup",
        "PASS 1",
        "active",
        "STOP",
        "device",
        "PASS 2",
        "completed",
    ]


def test_events_of_a_machine_that_stands_still(world, side):
    side.machine.run_state = RunState.PAUSED
    side.machine.register(live := Live(1 << 20))
    peer(world)
    run = side.kernel.migrate("pair:")
    assert run.wait(5).figures.passes == 2
    assert live.looks == 1  # nothing can have changed before the last
    assert side.told.events == ["setup", "PASS 1", "active", "device", "PASS 2", "completed"]


def test_events_of_a_cancel_while_it_runs(world, side):
    side.machine.register(Live(1 << 28))
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.ACTIVE, 5)
    run.cancel()
    with pytest.raises(Cancelled):
        run.wait(5)
    assert side.told.events == ["setup", "PASS 1", "active", "cancelling", "cancelled"]


def test_events_of_a_failure_after_the_stop(world, side):
    peer(world, on_ping=hang_up)
    with pytest.raises(Exception, match="without an answer"):
        side.kernel.migrate("pair:").wait(5)
    assert side.told.events[-4:] == ["device", "PASS 2", "RESUME", "failed"]


def test_a_destination_tells_that_its_machine_runs(world):
    destination = world.side(Number("a"))
    told = Told(destination.kernel)
    incoming = destination.kernel.incoming("pair:")
    world.side(Number("a")).kernel.migrate("pair:").wait(5)
    incoming.wait(5)
    assert told.events == ["setup", "active", "RESUME", "completed"]


# ---- pre-switchover


def test_it_waits_with_the_machine_stopped_until_told(world, side):
    peer(world)
    run = pauses(side)
    assert side.machine.run_state is RunState.FINISH_MIGRATE
    assert not run.done
    side.kernel.migrate_continue("pre-switchover")
    run.wait(5)
    assert side.told.events == (
        ["setup", "PASS 1", "active", "STOP", "pre-switchover", "device", "PASS 2", "completed"]
    )


def test_the_downtime_counts_from_the_stop(world, side):
    peer(world)
    run = pauses(side)
    threading.Event().wait(0.02)  # the shortest time that it stands still
    side.kernel.migrate_continue("pre-switchover")
    assert run.wait(5).figures.downtime >= 0.02


@pytest.mark.parametrize("state", ["active", "none"])
def test_continuing_names_the_state_that_it_is_in(world, side, state):
    with pytest.raises(StateError, match="^Migration not in expected state: none$"):
        side.kernel.migrate_continue("pre-switchover")
    peer(world)
    run = pauses(side)
    with pytest.raises(StateError, match="^Migration not in expected state: pre-switchover$"):
        side.kernel.migrate_continue(state)
    run.cancel()


def test_continuing_before_it_waits_does_not_count(world, side):
    side.kernel.migrate_continue("none")
    peer(world)
    run = pauses(side)
    with pytest.raises(TimeoutError):
        run.wait(0.05)
    run.cancel()


def test_a_cancel_there_lets_the_machine_run(world, side):
    peer(world)
    run = pauses(side)
    run.cancel()
    with pytest.raises(Cancelled):
        run.wait(5)
    assert side.machine.run_state is RunState.RUNNING
    assert side.told.events[-5:] == ["STOP", "pre-switchover", "cancelling", "RESUME", "cancelled"]


def test_a_destination_that_dies_there_does_not_leave_the_machine_stopped(world, side):
    peer(world)
    run = pauses(side)
    hang_up(world.transport.peer())
    with pytest.raises(Exception, match="without an answer"):
        run.wait(5)
    assert run.result.outcome is Outcome.FAILED
    assert side.machine.run_state is RunState.RUNNING


def test_the_2013_profile_pauses_too(world):
    side = world.side(Number("a"), profile="2013")
    told = Told(side.kernel)
    run = pauses(side)
    side.kernel.migrate_continue("pre-switchover")
    peer(world)
    run.wait(5)
    assert told.events[-4:] == ["pre-switchover", "device", "PASS 2", "completed"]


# ---- stop and cont


def test_stop_and_cont(side):
    for _ in range(2):
        side.kernel.stop()
        assert side.machine.run_state is RunState.PAUSED
    for _ in range(2):
        side.kernel.cont()
        assert side.machine.run_state is RunState.RUNNING
    assert side.calls == ["stop", "start"]
    assert side.told.events == ["STOP", "RESUME"]


def test_a_stop_while_it_migrates_ends_it_soon_and_it_arrives_paused(world, side):
    """The machine writes more than the limit lets through, until somebody stops it."""

    class Busy(Live):
        def pending(self, exact):
            if side.machine.is_running:
                self.left = 1 << 20
            return super().pending(exact)

    side.machine.register(busy := Busy())
    side.kernel.settings.update({"max-bandwidth": 8 << 20, "downtime-limit": 0})
    destination = world.side(Number("a"), Live(0))
    incoming = destination.kernel.incoming("pair:")
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.ACTIVE, 5)
    side.kernel.stop()
    run.wait(5), incoming.wait(5)
    assert busy.left == 0
    assert destination.machine.run_state is RunState.PAUSED
    assert side.told.events.count("STOP") == 1


def test_a_stop_during_the_switchover_is_remembered_on_both_sides(world, side):
    destination = world.side(Number("a"))
    incoming = destination.kernel.incoming("pair:")
    run = pauses(side)
    side.kernel.stop()
    side.kernel.migrate_continue("pre-switchover")
    run.wait(5), incoming.wait(5)
    assert destination.machine.run_state is RunState.PAUSED


def test_a_stop_during_the_switchover_is_remembered_by_a_cancel(world, side):
    peer(world)
    run = pauses(side)
    side.kernel.stop()
    run.cancel()
    with pytest.raises(Cancelled):
        run.wait(5)
    assert side.machine.run_state is RunState.PAUSED
    assert "RESUME" not in side.told.events


def test_cont_is_refused_during_the_switchover(world, side):
    peer(world)
    run = pauses(side)
    with pytest.raises(StateError, match="Migration is not finalized yet"):
        side.kernel.cont()
    run.cancel()


@pytest.mark.parametrize(
    ("words", "arrives"), [(("stop",), "paused"), (("stop", "cont"), "running")]
)
def test_what_is_to_happen_after_an_incoming_migration(world, words, arrives):
    destination = world.side(Number("a"))
    destination.kernel.defer_incoming()
    for word in words:
        getattr(destination.kernel, word)()
    incoming = destination.kernel.incoming("pair:")
    assert destination.machine.run_state is RunState.INMIGRATE
    world.side(Number("a")).kernel.migrate("pair:").wait(5)
    incoming.wait(5)
    assert destination.machine.run_state == arrives
    assert destination.calls.count("start") == (arrives == "running")


def test_a_stop_counts_for_one_incoming_migration_only(world):
    destination = world.side(Number("a"))
    for word, arrives in (("stop", "paused"), ("collect_handlers", "running")):
        incoming = destination.kernel.incoming("pair:")
        getattr(destination.kernel, word)()
        world.side(Number("a")).kernel.migrate("pair:").wait(5)
        incoming.wait(5)
        assert destination.machine.run_state == arrives
        world.transport.renew()


def test_cont_after_a_migration_takes_the_machine_back(world, side):
    peer(world)
    side.kernel.migrate("pair:").wait(5)
    with pytest.raises(StateError, match="paused due to previous migration"):
        side.kernel.migrate("pair:")
    side.calls.clear()
    side.kernel.cont()
    assert side.calls == ["activate", "start"]
    assert side.machine.generation == 2
    world.transport.renew()
    peer(world)
    side.kernel.migrate("pair:").wait(5)


def test_cont_after_a_migration_asks_the_fence(world):
    side = world.side(Number("a"), fence=lambda generation: False)
    peer(world)
    side.kernel.migrate("pair:").wait(5)
    with pytest.raises(MachineError, match="the destination has the machine"):
        side.kernel.cont()
    assert side.machine.run_state is RunState.POSTMIGRATE
    assert "start" not in side.calls


def test_cont_is_refused_while_the_outcome_is_unknown(world, side):
    world.transport.eof_means_peer_gone = False
    peer(world, on_eof=hang_up)
    with pytest.raises(Exception, match="resolve"):
        side.kernel.migrate("pair:").wait(5)
    with pytest.raises(StateError, match="unknown"):
        side.kernel.cont()
    side.kernel.stop()
    side.kernel.resolve(run_here=True)
    assert side.machine.run_state is RunState.RUNNING


def test_cont_tries_again_what_a_failure_left(world):
    """The machine could not take its disks back: they are taken before it starts."""
    faults = [RuntimeError("the disk is busy")]

    def activate():
        if faults:
            raise faults.pop()

    side = world.side(Number("a"), activate=activate)
    peer(world, on_eof=answer_shut(1))
    with pytest.raises(Exception, match="refused"):
        side.kernel.migrate("pair:").wait(5)
    assert side.machine.run_state is RunState.INTERNAL_ERROR
    side.kernel.cont()
    assert side.machine.run_state is RunState.RUNNING
    assert side.calls[-3:] == ["activate", "activate", "start"]


def test_cont_after_a_shutdown_is_refused(side):
    side.machine.run_state = RunState.SHUTDOWN
    with pytest.raises(StateError, match="Resetting the Virtual Machine is required"):
        side.kernel.cont()


def test_nobody_waits_for_a_callback_of_the_machine(world):
    """The app's thread asks for a stop while the migration waits for that thread to stop the machine."""
    stopping, refused = threading.Event(), threading.Event()

    def stop():
        stopping.set()
        assert refused.wait(5)

    side = world.side(Number("a"), stop=stop)
    peer(world)
    run = side.kernel.migrate("pair:")
    assert stopping.wait(5)
    for word in (side.kernel.stop, side.kernel.cont):
        with pytest.raises(StateError, match="just being stopped or started"):
            word()
    refused.set()
    assert run.wait(5).outcome is Outcome.COMPLETED
