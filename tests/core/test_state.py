"""The table of states, over all pairs."""

import itertools
import threading

import pytest

from whimbrel import MigrationState, RunParams, Status
from whimbrel.state import TRANSITIONS, diagram


def at(status, **options):
    state = MigrationState(**options)
    state._status = status
    return state


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Status, Status)))
def test_only_edges_of_the_table_exist(old, new):
    changes = []
    state = at(old, on_change=lambda a, b: changes.append((a, b)))
    if new in TRANSITIONS.get(old, ()):
        assert state.transition(old, new)
        assert state.status is new
        assert changes == [(old, new)]
    else:
        with pytest.raises(ValueError, match="no transition"):
            state.transition(old, new)
        assert state.status is old
        assert changes == []


def test_compare_and_set_changes_nothing_when_the_status_is_another():
    changes = []
    state = at(Status.ACTIVE, on_change=lambda *c: changes.append(c))
    assert not state.transition(Status.SETUP, Status.ACTIVE)
    assert state.status is Status.ACTIVE
    assert changes == []


@pytest.mark.parametrize("final", [Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.NONE])
@pytest.mark.parametrize("new", list(Status))
def test_a_final_state_is_left_by_a_new_run_only(final, new):
    state = at(final)
    assert not state.leave(new)
    assert state.status is final


def test_of_many_threads_one_wins():
    state = at(Status.ACTIVE)
    wins = []
    go = threading.Barrier(8)

    def race():
        go.wait()
        wins.append(state.transition(Status.ACTIVE, Status.COMPLETED))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wins.count(True) == 1


@pytest.mark.parametrize("status", list(Status))
def test_what_a_state_means(status):
    state = at(status)
    assert state.in_setup == (status is Status.SETUP)
    assert state.has_failed == (status in (Status.FAILED, Status.CANCELLED))
    assert state.has_finished == (state.has_failed or status is Status.COMPLETED)
    assert state.is_running == (not state.has_finished and status is not Status.NONE)


def test_every_state_can_be_reached_and_left():
    reached = {new for to in TRANSITIONS.values() for new in to}
    assert reached == set(Status) - {Status.NONE}
    assert set(TRANSITIONS) == set(Status)


def test_reset_starts_anew():
    state = at(Status.FAILED)
    state.error = ValueError("old")
    state.figures.transferred = 7
    state.reset(RunParams(blk=True))
    assert state.error is None
    assert state.figures.transferred == 0
    assert state.params.blk


def test_waiting_for_a_state():
    state = at(Status.SETUP)
    assert not state.wait_for(lambda s: s is Status.ACTIVE, 0)
    threading.Timer(0.01, lambda: state.transition(Status.SETUP, Status.ACTIVE)).start()
    assert state.wait_for(lambda s: s is Status.ACTIVE, 5)


def test_the_diagram_has_every_edge():
    edges = sum(len(to) for to in TRANSITIONS.values())
    assert diagram().count("-->") == edges
