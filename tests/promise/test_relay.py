"""A relay between the two: whatever it dies of, and whichever of its links is lost, never two running copies."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from whimbrel_testing.harness import AppError, Pair
from whimbrel_testing.pacing import Direction, Link, Trigger

from .conftest import CONFIG, SETTINGS, World
from .test_cut_link import BEFORE_COMMIT, SHUT, VMDESCRIPTION, trigger_at

BACK, FORWARD = Direction.BACK, Direction.FORWARD
PATIENCE = 20


class Relayed:
    """source - (link) - migctl relay - (link) - destination; a link is there where triggers were given for it."""

    def __init__(self, world, before=None, behind=None, direct=False):
        self._open = contextlib.ExitStack()
        address = world.destination.call("incoming", uri="tcp:127.0.0.1:0")["addresses"][0]
        if behind is not None:
            address = self._open.enter_context(Link(address, triggers=behind)).uri
            address = address.replace(",direct=off", "") if direct else address
        program = shutil.which("migctl", path=str(Path(sys.executable).parent))
        self.process = subprocess.Popen(
            [program, "relay", "tcp:127.0.0.1:0", address, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        address = self.event("listening")["addresses"][0]
        if before is not None:
            address = self._open.enter_context(Link(address, triggers=before)).uri
        world.source.call("migrate", uri=address)

    def event(self, name):
        line = self.process.stdout.readline()
        event = json.loads(line or "{}")
        assert event.get("event") == name, (line, self.process.stderr.read())
        return event

    def ends(self, status):
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == status, errors
        assert "Traceback" not in errors
        return errors

    def kill(self, *_):
        self.process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self._open.close()


def test_it_passes(world):
    with Relayed(world) as relay:
        assert world.ends(world.source, "completed")["acknowledged"]
        world.ends(world.destination, "completed")
        assert relay.event("relayed")["acknowledged"]
        relay.ends(0)
    world.runs_only_at(world.destination)


@pytest.mark.parametrize("side", ["before", "behind"])
@pytest.mark.parametrize("phase", BEFORE_COMMIT.values(), ids=BEFORE_COMMIT)
def test_a_link_that_is_cut_before_the_point_of_no_return(shared, phase, side):
    trigger = trigger_at(phase, Link.cut)
    with Relayed(shared, **{side: [trigger]}) as relay:
        shared.fired(trigger)
        shared.ends(shared.source, "failed")
        # The destination may not have been reached yet.
        if shared.destination.call("query")["status"] == "setup" and side == "before":
            with contextlib.suppress(AppError):  # it may be reached, and left, just now
                shared.destination.call("cancel")
            ended = shared.destination.call("wait", timeout=20)["outcome"]
            assert ended in ("cancelled", "failed")
        else:
            shared.ends(shared.destination, "failed")
        relay.ends(1)
    shared.runs_only_at(shared.source)


AT_SWITCHOVER = list(BEFORE_COMMIT)[list(BEFORE_COMMIT).index("at the stop") :]


@pytest.mark.parametrize("name", AT_SWITCHOVER)
def test_a_relay_that_is_killed_before_the_point_of_no_return(shared, name):
    relays = []
    trigger = trigger_at(BEFORE_COMMIT[name], lambda _: relays[0].kill())
    with Relayed(shared, behind=[trigger]) as relay:
        relays.append(relay)
        shared.fired(trigger)
        shared.ends(shared.source, "failed")
        shared.ends(shared.destination, "failed")
    shared.runs_only_at(shared.source)


@pytest.mark.parametrize("phase", [(BACK, SHUT, True, 1), (FORWARD, VMDESCRIPTION, False, 1)])
def test_a_relay_that_is_killed_behind_it_leaves_the_source_in_doubt(world, phase):
    """The source is connected to the relay itself: that its end is gone proves nothing of the destination."""
    relays = []
    trigger = trigger_at(phase, lambda _: relays[0].kill())
    with Relayed(world, behind=[trigger]) as relay:
        relays.append(relay)
        world.fired(trigger)
        world.ends(world.source, "unknown", "OutcomeUnknown")
        world.ends(world.destination, "completed")
        world.runs_only_at(world.destination)


@pytest.mark.parametrize("phase", [(BACK, SHUT, True, 1), (FORWARD, VMDESCRIPTION, False, 1)])
def test_the_link_behind_it_is_lost_when_the_destination_has_taken_over(world, phase):
    """The relay keeps the source waiting, and says so; it goes when it is told to."""
    trigger = trigger_at(phase, Link.cut)
    with Relayed(world, behind=[trigger]) as relay:
        world.fired(trigger)
        assert "look whether" in relay.event("unknown")["error"].lower()
        world.ends(world.destination, "completed")
        world.runs_only_at(world.destination)
        relay.process.send_signal(signal.SIGINT)
        world.ends(world.source, "unknown", "OutcomeUnknown")
        relay.ends(6)
    world.runs_only_at(world.destination)


def test_a_destination_that_dies_behind_it_leaves_the_machine_at_the_source():
    """The relay is connected to it directly, so that its end is proof: the relay says so in its place."""
    config = attrs.evolve(
        CONFIG, line_every=100_000
    )  # what the dead one may have said is not tested

    def die(link):
        pair.destination.kill()
        link.cut()  # as the system does for a process that is gone; the answer was never sent

    with Pair(config, settings=SETTINGS) as pair:
        world = World(pair)
        pair.source.call("boot")
        with Relayed(world, behind=[Trigger(BACK, SHUT, do=die)], direct=True) as relay:
            world.ends(pair.source, "failed", "PeerError")
            relay.ends(1)
        world.runs_only_at(pair.source)
