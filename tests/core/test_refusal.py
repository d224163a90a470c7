"""What migrate() refuses, in which order, and what outlives a run."""

import threading

import pytest

from whimbrel import (
    BlockedError,
    PluginError,
    RunState,
    StateError,
    Status,
    UriError,
    What,
    hookimpl,
)

from .conftest import Live, Number, ScriptedDestination, answer_pong, answer_shut


@pytest.fixture
def side(world):
    return world.side(Number("a"))


def test_refusals_come_in_their_order(world):
    """All reasons hold at once; each is met in turn as the one before is taken away."""
    device = Number("a")
    device.unmigratable = "passes through a real card"
    side = world.side(device)
    blocker = side.kernel.blockers.add("a debugger is attached")
    side.machine.run_state = RunState.INMIGRATE
    with pytest.raises(StateError, match="waiting for an incoming"):
        side.kernel.migrate("nonsense:")
    side.machine.run_state = RunState.POSTMIGRATE
    with pytest.raises(StateError, match="second copy"):
        side.kernel.migrate("nonsense:")
    side.machine.run_state = RunState.RUNNING
    with pytest.raises(BlockedError, match="passes through a real card"):
        side.kernel.migrate("nonsense:")
    device.unmigratable = None
    with pytest.raises(BlockedError, match="debugger"):
        side.kernel.migrate("nonsense:")
    side.kernel.blockers.remove(blocker)
    assert side.kernel.state.status is Status.NONE
    with pytest.raises(UriError, match="unknown migration protocol 'nonsense'; known are pair"):
        side.kernel.migrate("nonsense:")
    assert side.kernel.state.status is Status.FAILED


def test_one_at_a_time(world):
    side = world.side(Number("a"), Live(1 << 28))
    run = side.kernel.migrate("pair:")
    with pytest.raises(StateError, match="in progress"):
        side.kernel.migrate("pair:")
    with pytest.raises(StateError, match="in progress"):
        side.kernel.incoming("pair:")
    run.cancel()


def test_not_before_the_clean_up_has_ended(world, side):
    """The status is final before handlers and channel are released: a start in between is refused."""
    release, refused = threading.Event(), []

    class Slow(Number):
        def cleanup(self, outcome):
            assert side.kernel.state.status is Status.COMPLETED
            side.machine.run_state = RunState.RUNNING
            try:
                side.kernel.migrate("pair:")
            except StateError as error:
                refused.append(str(error))
            release.set()

    side.machine.register(Slow("slow"))
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))
    side.kernel.migrate("pair:").wait(5)
    assert release.is_set()
    assert "cleaned up" in refused[0]


def test_who_sees_that_one_is_over_may_begin_the_next(world, side):
    seen, cleaned = threading.Event(), threading.Event()

    class Slow(Number):
        def cleanup(self, outcome):
            seen.set()
            assert waiting.wait(5)
            cleaned.set()

    waiting = threading.Event()
    side.machine.register(Slow("slow"))
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))
    side.kernel.migrate("pair:")
    assert seen.wait(5)
    side.kernel.cont()
    threading.Timer(0.01, waiting.set).start()
    with pytest.raises(UriError, match="nonsense"):
        side.kernel.migrate("nonsense:")
    assert cleaned.is_set()


def test_an_unknown_scheme_says_what_to_install(side):
    errors = []
    side.kernel.notifiers.add(lambda n: n.what is What.ERROR and errors.append(n.state.error))
    with pytest.raises(UriError, match="whimbrel-carrier") as caught:
        side.kernel.migrate("carrier:pigeon")
    assert errors == [caught.value]
    assert side.kernel.query() == {
        "status": "failed",
        "error-desc": str(caught.value),
        "x-outcome": "failed",
    }


def test_all_blockers_are_listed_and_the_newest_is_the_message(side):
    for reason in ("first", "second"):
        side.kernel.blockers.add(reason)
    with pytest.raises(BlockedError, match="^second$") as caught:
        side.kernel.migrate("pair:")
    assert caught.value.reasons == ("second", "first")
    assert side.kernel.query() == {"blocked-reasons": ["second", "first"]}


def test_blockers_are_removed_by_identity(side):
    one, other = side.kernel.blockers.add("same words"), side.kernel.blockers.add("same words")
    side.kernel.blockers.remove(one)
    assert list(side.kernel.blockers) == [other]


def test_too_late_to_block_a_running_migration(world):
    side = world.side(Live(1 << 28))
    run = side.kernel.migrate("pair:")
    with pytest.raises(StateError, match="too late"):
        side.kernel.blockers.add("me")
    run.cancel()


def test_preflight_collects_all_reasons_of_all_plugins(world, side):
    class Careful:
        whimbrel_api = (1, 0)

        def __init__(self, *reasons):
            self.reasons = reasons

        @hookimpl
        def preflight(self, uri):
            return [f"{r} for {uri}" for r in self.reasons]

    world.plugins.register(Careful("no disk", "no net"), "one")
    world.plugins.register(Careful("no time"), "two")
    with pytest.raises(BlockedError) as caught:
        side.kernel.migrate("pair:")
    assert sorted(caught.value.reasons) == [
        "no disk for pair:",
        "no net for pair:",
        "no time for pair:",
    ]


def test_two_claims_on_one_section_are_refused(world, side):
    class Claims:
        whimbrel_api = (1, 0)

        @hookimpl
        def savevm_handlers(self, machine):
            return [Number("a")]

    world.plugins.register(Claims(), "greedy")
    with pytest.raises(PluginError, match="'a' instance 0 is claimed by the machine and greedy"):
        side.kernel.migrate("pair:")


def test_what_outlives_a_run_and_what_does_not(world, side):
    settings = side.kernel.settings
    settings.update({"max-bandwidth": "7MiB/s", "downtime-limit": "0.2s"})
    calls = []
    side.kernel.notifiers.add(lambda n: calls.append(n.what))
    with pytest.raises(BlockedError, match="no disk"):
        side.kernel.migrate("nonsense:", blk=True)
    disk = Number("disk")
    disk.copies_disks = True
    side.machine.register(disk)
    with pytest.raises(UriError):
        side.kernel.migrate("nonsense:", blk=True, inc=True)
    assert side.kernel.state.params.blk
    assert side.kernel.state.error is not None
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))
    side.kernel.migrate("pair:").wait(5)
    assert not side.kernel.state.params.blk
    assert side.kernel.state.error is None
    assert settings["max-bandwidth"] == 7 << 20
    assert settings["downtime-limit"] == 200
    assert calls.count(What.CLEANUP) == 1


def test_a_notifier_may_remove_itself_and_may_fail(world, side):
    called = []

    def once(n):
        called.append("once")
        side.kernel.notifiers.remove(once)

    def broken(n):
        called.append("broken")
        raise RuntimeError("broken")

    for notifier in (once, broken, lambda n: called.append("last")):
        side.kernel.notifiers.add(notifier)
    with pytest.raises(UriError):
        side.kernel.migrate("nonsense:")
    assert called[:3] == ["once", "broken", "last"]
    assert called.count("once") == 1
    assert called.count("broken") == called.count("last")


def test_a_hook_is_told_the_same_as_notifiers_and_may_fail(world, side):
    seen, told = [], []
    side.kernel.notifiers.add(lambda n: told.append(n.what))

    class Broken:
        whimbrel_api = (1, 0)

        @hookimpl
        def state_changed(self, notification):
            seen.append(notification.what)
            raise RuntimeError("broken")

    world.plugins.register(Broken(), "broken")
    ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))
    side.kernel.migrate("pair:").wait(5)
    assert seen == told
    assert {What.SETUP, What.STATE, What.CLEANUP} <= set(seen)


def test_capabilities_are_fixed_while_a_migration_runs_and_bandwidth_is_not(world):
    side = world.side(Live(1 << 28))
    run = side.kernel.migrate("pair:")
    with pytest.raises(StateError, match="in progress"):
        side.kernel.settings["return-path"] = False
    side.kernel.settings["max-bandwidth"] = 1
    run.cancel()


def test_a_deferred_destination_waits_and_then_listens(world, side):
    side.kernel.defer_incoming()
    assert side.machine.run_state is RunState.INMIGRATE
    incoming = side.kernel.incoming("pair:")
    assert side.kernel.query()["x-addresses"] == ["pair:"]
    world.side(Number("a", 4)).kernel.migrate("pair:").wait(5)
    incoming.wait(5)
    assert side.machine.run_state is RunState.RUNNING
