"""A machine moves from one kernel to another."""

import asyncio
import threading

import pytest

from whimbrel import MachineError, Outcome, RunState, Status, What

from .conftest import Live, Number


def migrate(world, source, destination, **options):
    incoming = destination.kernel.incoming("pair:", **options)
    outgoing = source.kernel.migrate("pair:")
    return outgoing, incoming


def test_a_machine_moves(world):
    source = world.side(Number("a", 7), Live())
    destination = world.side(b := Number("a"), live := Live(0))
    outgoing, incoming = migrate(world, source, destination)
    sent, received = outgoing.wait(10), incoming.wait(10)
    assert (b.value, live.received) == (7, 1 << 20)
    assert sent.outcome is received.outcome is Outcome.COMPLETED
    assert sent.acknowledged
    assert sent.figures.transferred == received.figures.transferred
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert destination.machine.run_state is RunState.RUNNING
    assert source.calls == ["wakeup", "stop", "invalidate"]
    assert destination.calls == ["activate", "announce", "start"]


@pytest.mark.parametrize("state", [RunState.PAUSED, RunState.PRELAUNCH])
def test_a_machine_that_stood_still_arrives_standing_still(world, state):
    source, destination = world.side(), world.side()
    source.machine.run_state = state
    outgoing, incoming = migrate(world, source, destination)
    outgoing.wait(10), incoming.wait(10)
    assert source.calls == ["wakeup", "stop", "invalidate"]
    assert destination.machine.run_state is state
    assert destination.calls == ["activate"]


def test_without_autostart_it_stays_paused(world):
    source, destination = world.side(), world.side()
    outgoing, incoming = migrate(world, source, destination, autostart=False)
    outgoing.wait(10), incoming.wait(10)
    assert destination.machine.run_state is RunState.PAUSED


def test_there_and_back_again(world):
    source, destination = world.side(Number("a", 1)), world.side(Number("a"))
    for here, there in ((source, destination), (destination, source)):
        world.transport.renew()
        outgoing, incoming = migrate(world, here, there)
        outgoing.wait(10), incoming.wait(10)
    assert source.machine.run_state is RunState.RUNNING
    assert source.machine.generation == destination.machine.generation == 2


def test_states_in_order_and_setup_before_the_thread(world):
    source, destination = world.side(Number("a")), world.side(Number("a"))
    seen = []

    def note(n):
        seen.append((n.what, n.pass_number if n.what is What.PASS else n.new))
        if n.what is What.SETUP:
            assert not any(t.name == "whimbrel-migration" for t in threading.enumerate())

    source.kernel.notifiers.add(note)
    outgoing, incoming = migrate(world, source, destination)
    outgoing.wait(10), incoming.wait(10)
    assert seen == [
        (What.STATE, Status.SETUP),
        (What.SETUP, None),
        (What.PASS, 1),
        (What.STATE, Status.ACTIVE),
        (What.STOP, None),
        (What.STATE, Status.DEVICE),
        (What.PASS, 2),
        (What.STATE, Status.COMPLETED),
        (What.CLEANUP, None),
    ]


def test_it_can_be_awaited(world):
    source, destination = world.side(), world.side()

    async def both():
        outgoing, incoming = migrate(world, source, destination)
        return await asyncio.wait_for(asyncio.gather(outgoing, incoming), 10)

    sent, received = asyncio.run(both())
    assert sent.outcome is received.outcome is Outcome.COMPLETED


def test_callbacks_run_where_the_machine_wants_them(world):
    where = []

    def call(function):
        result = []
        thread = threading.Thread(target=lambda: result.append(function()), name="owner")
        thread.start()
        thread.join()
        where.append(thread.name)
        return result[0]

    source, destination = world.side(call=call), world.side()
    outgoing, incoming = migrate(world, source, destination)
    outgoing.wait(10), incoming.wait(10)
    assert where == ["owner"] * 3


def test_a_stop_that_fails_fails_the_migration_and_the_machine_goes_on(world):
    def stop():
        raise RuntimeError("the disk is stuck")

    source, destination = world.side(stop=stop), world.side()
    outgoing, incoming = migrate(world, source, destination)
    with pytest.raises(MachineError, match="the disk is stuck"):
        outgoing.wait(10)
    assert source.machine.run_state is RunState.RUNNING
    with pytest.raises(Exception, match="ended early"):
        incoming.wait(10)
    assert destination.machine.run_state is RunState.INMIGRATE
    assert "start" not in destination.calls


def test_an_activation_that_fails_gives_the_machine_back(world):
    def activate():
        raise RuntimeError("the lease is taken")

    source, destination = world.side(Number("a", 3)), world.side(Number("a"), activate=activate)
    outgoing, incoming = migrate(world, source, destination)
    with pytest.raises(Exception, match="refused"):
        outgoing.wait(10)
    with pytest.raises(MachineError, match="the lease is taken"):
        incoming.wait(10)
    assert source.machine.run_state is RunState.RUNNING
    assert source.calls == ["wakeup", "stop", "invalidate", "activate", "start"]
    assert "start" not in destination.calls


def test_the_2013_profile_moves_a_machine_without_answers(world):
    source = world.side(Number("a", 9), profile="2013")
    destination = world.side(b := Number("a"), profile="2013")
    outgoing, incoming = migrate(world, source, destination)
    result = outgoing.wait(10)
    incoming.wait(10)
    assert b.value == 9
    assert not result.acknowledged
    assert source.kernel.query()["x-acknowledged"] is False
    # magic, version, then the FULL section at once: no configuration, footer or vmdescription
    assert result.figures.transferred == 8 + (1 + 4 + 2 + 8) + 8 + 1


def test_every_handler_is_told_the_outcome_once(world):
    source = world.side(a := Number("a"), live := Live())
    destination = world.side(b := Number("a"), Live())
    outgoing, incoming = migrate(world, source, destination)
    outgoing.wait(10), incoming.wait(10)
    assert a.outcomes == b.outcomes == live.outcomes == [Outcome.COMPLETED]


def test_a_wrapper_that_fails_changes_nothing(world):
    from whimbrel import hookimpl

    class Tracer:
        whimbrel_api = (1, 0)

        @hookimpl(wrapper=True)
        def wrap_migration(self):
            result = yield
            raise RuntimeError("the tracer is broken")
            return result

    world.plugins.register(Tracer(), "tracer")
    source, destination = world.side(), world.side()
    outgoing, incoming = migrate(world, source, destination)
    assert outgoing.wait(10).outcome is incoming.wait(10).outcome is Outcome.COMPLETED
    assert source.machine.run_state is RunState.POSTMIGRATE
    assert destination.machine.run_state is RunState.RUNNING
