"""kill -9 of either side at a random moment: never two running copies, and who survives is whole.

WHIMBREL_KILLS says how many (20 unless told otherwise; `make stress` takes 200), WHIMBREL_SEED which moments.
"""

import contextlib
import os
import random
import threading

import pytest

from whimbrel_testing.harness import AppError

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
