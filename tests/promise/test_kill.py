"""kill -9 of either side at a random moment: never two running copies, and who survives is whole.

WHIMBREL_KILLS says how many (20 unless told otherwise; `make stress` takes 200), WHIMBREL_SEED which moments.
"""

import contextlib
import os
import random
import threading

import attrs
import pytest

from whimbrel_testing.harness import AppError, Pair
from whimbrel_testing.pacing import Direction, Trigger

from .conftest import CONFIG, SETTINGS, World

SHUT = b"\x00\x01\x00\x04\x00\x00\x00\x00"

KILLS = int(os.environ.get("WHIMBREL_KILLS", "20"))
SEED = int(os.environ.get("WHIMBREL_SEED", "1"))

#: Longer than a migration of this machine takes.
WHOLE = 0.6


def moment(number):
    """(what to wait for, seconds after it): anywhere in the migration, or about the switchover."""
    rng = random.Random(SEED * 1_000_003 + number)
    if number % 4 < 2:
        return None, rng.uniform(0, WHOLE)
    return "device", rng.expovariate(1 / 0.003)


def kill_at(world, victim, number):
    """Migrate, and kill the victim at its moment."""
    event, after = moment(number)
    world.go(link=False, kind="tcp" if number % 3 else "unix")
    if event is not None:
        world.source.wait_status(event, "completed", "failed")
    threading.Event().wait(after)  # the moment is the point of the test
    victim.kill()


@pytest.mark.parametrize("number", range(0, KILLS, 2))
def test_a_destination_that_is_killed(world, number):
    kill_at(world, world.destination, number)
    result = world.source.call("wait", timeout=20)
    if result["outcome"] == "completed":  # it had said that it has the machine, which died with it
        assert result["acknowledged"]
        world.runs_nowhere()
        return
    assert result["outcome"] == "failed", result
    world.runs_only_at(world.source)


@pytest.mark.parametrize("number", range(1, KILLS, 2))
def test_a_source_that_is_killed(world, number):
    kill_at(world, world.source, number)
    if world.destination.call("query")["status"] == "setup":  # nobody came, and nobody will
        with contextlib.suppress(AppError):
            world.destination.call("cancel")
    result = world.destination.call("wait", timeout=20)
    if result["outcome"] == "completed":
        world.runs_only_at(world.destination)
    else:
        assert result["outcome"] in ("failed", "cancelled"), result
        world.runs_nowhere()


def test_the_moments_reach_every_part_of_a_migration():
    """The short form is no weaker than chance: early, late, and about the switchover."""
    moments = [moment(number) for number in range(20)]
    anywhere = [after for event, after in moments if event is None]
    assert min(anywhere) < WHOLE / 4
    assert max(anywhere) > WHOLE * 3 / 4
    assert any(after < 0.002 for event, after in moments if event == "device")


@pytest.mark.parametrize("fence", [False, True], ids=["no fence", "fence"])
def test_a_destination_that_dies_between_taking_over_and_saying_so(fence):
    """The end of a direct connection proves that it is gone: the machine runs on at the source, and can go elsewhere."""
    config = attrs.evolve(
        CONFIG, line_every=100_000
    )  # what the dead one may have said is not what is tested
    with Pair(config, settings=SETTINGS, fence=fence) as pair:
        world = World(pair)
        pair.source.call("boot")

        def die(link):
            pair.destination.kill()
            link.cut()  # as the system does for a process that is gone; the answer was never sent

        with world.go(triggers=[Trigger(Direction.BACK, SHUT, do=die)], direct=True):
            world.ends(pair.source, "failed", "EndOfStream")
        world.runs_only_at(pair.source)
        pair.renew_destination()
        with world.go():
            world.ends(pair.source, "completed")
        world.runs_only_at(pair.destination)
