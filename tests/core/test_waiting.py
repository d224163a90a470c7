"""Waiting ends by what is waited for, the deadline, or a cancel."""

from __future__ import annotations

import math
import os
import select
import threading
import time

import pytest

from whimbrel import Cancelled, ChannelError, DeadlineExceeded
from whimbrel.waiting import Gate, call_in_thread, pause, wait_any, wait_fd
from whimbrel_testing.transport_suite import Task, nothing_left_behind

PATIENCE = 10.0


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


@pytest.fixture
def event():
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@pytest.fixture
def cancel():
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def test_what_is_ready_is_said(event, cancel):
    os.eventfd_write(event, 1)
    assert wait_any((event, cancel), select.POLLIN) == {event}


def test_far_deadlines_are_no_trouble(event):
    os.eventfd_write(event, 1)
    for deadline in (None, math.inf, time.monotonic() + 1e12):
        wait_fd(event, select.POLLIN, deadline=deadline)


def test_the_deadline(event):
    for deadline in (-math.inf, time.monotonic() - 1, time.monotonic() + 0.02):
        with pytest.raises(DeadlineExceeded, match="timed out waiting for godot"):
            wait_fd(event, select.POLLIN, deadline=deadline, what="godot")


def test_what_is_ready_is_taken_even_after_the_deadline(event):
    os.eventfd_write(event, 1)
    wait_fd(event, select.POLLIN, deadline=time.monotonic() - 1)


def test_cancel_comes_first(event, cancel):
    os.eventfd_write(event, 1)
    os.eventfd_write(cancel, 1)
    with pytest.raises(Cancelled, match="cancelled while waiting for godot"):
        wait_fd(event, select.POLLIN, cancel_fd=cancel, what="godot")


def test_pause(cancel):
    pause(0.001, what="x")
    pause(0.001, deadline=time.monotonic() + PATIENCE, cancel_fd=cancel, what="x")
    with pytest.raises(DeadlineExceeded):
        pause(PATIENCE, deadline=time.monotonic() + 0.01, what="x")
    os.eventfd_write(cancel, 1)
    with pytest.raises(Cancelled):
        pause(PATIENCE, cancel_fd=cancel, what="x")


def test_a_call_in_a_thread():
    assert call_in_thread(lambda: 42, what="x") == 42
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 // 0, what="x")


@pytest.mark.parametrize("kind", [Cancelled, DeadlineExceeded])
def test_a_call_that_hangs_is_left_behind(kind, cancel):
    release = threading.Event()
    if kind is Cancelled:
        os.eventfd_write(cancel, 1)
    with pytest.raises(kind):
        call_in_thread(release.wait, deadline=time.monotonic() + 0.02, cancel_fd=cancel, what="x")
    release.set()  # the thread must now end without harm: _clean looks for it


def test_a_gate_lets_nobody_in_once_closed():
    gate = Gate("it")
    with gate.inside():
        pass
    assert gate.signal()
    with pytest.raises(ChannelError, match="it was aborted"), gate.inside():
        pytest.fail("inside")
    assert gate.close()
    assert not gate.close()
    assert not gate.signal()
    with pytest.raises(ChannelError, match="it is closed"), gate.inside():
        pytest.fail("inside")


def test_closing_a_gate_waits_for_those_inside():
    gate = Gate("it")
    leave = threading.Event()

    def stay():
        with gate.inside():
            wait_fd(gate.fd, select.POLLIN)
            leave.wait()

    staying = Task(stay)
    staying.until_blocked(PATIENCE)
    closing = Task(gate.close)
    closing.until_blocked(PATIENCE)
    assert closing.thread.is_alive()
    leave.set()
    assert closing.result(PATIENCE)
    staying.result(PATIENCE)
