"""Two real processes, a machine that writes to its RAM and to its disk, and the proof that nothing was lost."""

import os
import random
import threading

import pytest

from whimbrel_testing.harness import AppError, AppProcess, Pair
from whimbrel_testing.peers import wait_until
from whimbrel_testing.stress import StressConfig

MIB = 1 << 20
CONFIG = StressConfig(ram=4 * MIB, rate=3e6, disk=12 * MIB)
SETTINGS = {"max-bandwidth": 40 * MIB}


@pytest.fixture
def pair():
    with Pair(CONFIG, settings=SETTINGS) as pair:
        yield pair


def begin(pair):
    pair.source.call("boot")
    address = pair.destination.call("incoming", uri="tcp:127.0.0.1:0")["addresses"][0]
    pair.source.call("migrate", uri=address, blk=True)


def runs_whole(app):
    """It goes on writing to its disk, and all is there."""
    before = app.call("ticked")["disk_writes"]
    wait_until(lambda: app.call("report")["disk_writes"] > before, "further write to the disk")
    proof = app.call("verify")
    assert proof["holds"], proof["text"]
    assert proof["disk_writes"] > before


def slow(pair):
    """So slow that the copy is under way until somebody ends it."""
    pair.source.call("set", **{"max-bandwidth": 4 * MIB})


def sending(pair):
    """Wait until some of the disk is over there."""
    wait_until(
        lambda: pair.source.call("query").get("disk", {}).get("transferred", 0) > 2 * MIB,
        "beginning of the copy",
    )


def refuses_its_disk(pair):
    """A destination that starts anew cannot run from the disk that it got."""
    with AppProcess("destination", pair._options) as again, pytest.raises(AppError) as error:
        again.call("boot")
    assert "half-written" in str(error.value)


def test_a_machine_moves_with_its_disk_while_it_writes(pair):
    begin(pair)
    result = pair.source.call("wait")
    assert result["outcome"] == "completed", result
    assert result["transferred"] > CONFIG.disk
    assert pair.running() == ["destination"]
    runs_whole(pair.destination)
    assert pair.violations() == []


def test_and_back(pair):
    begin(pair)
    assert pair.source.call("wait")["outcome"] == "completed"
    address = pair.source.call("incoming", uri="tcp:127.0.0.1:0")["addresses"][0]
    pair.destination.call("wait")
    pair.destination.call("migrate", uri=address, blk=True)
    assert pair.destination.call("wait")["outcome"] == "completed"
    runs_whole(pair.source)
    assert pair.running() == ["source"]
    assert pair.violations() == []


def test_a_killed_destination_leaves_a_disk_that_is_refused(pair):
    slow(pair)
    begin(pair)
    sending(pair)
    pair.destination.kill()
    assert pair.source.call("wait")["outcome"] == "failed"
    assert pair.running() == ["source"]
    runs_whole(pair.source)
    refuses_its_disk(pair)


def test_a_killed_source_starts_nothing(pair):
    slow(pair)
    begin(pair)
    sending(pair)
    pair.source.kill()
    assert pair.destination.call("wait")["outcome"] == "failed"
    assert pair.running() == []
    with pytest.raises(AppError, match="half-written"):
        pair.destination.call("verify")
    pair.destination.close()
    refuses_its_disk(pair)


def test_a_cancelled_migration_can_be_begun_again(pair):
    slow(pair)
    begin(pair)
    sending(pair)
    pair.source.call("cancel")
    assert pair.source.call("wait")["outcome"] == "cancelled"
    pair.destination.call("wait")
    pair.source.call("set", **SETTINGS)
    address = pair.destination.call("incoming", uri="tcp:127.0.0.1:0")["addresses"][0]
    pair.source.call("migrate", uri=address, blk=True)
    assert pair.source.call("wait")["outcome"] == "completed"
    runs_whole(pair.destination)
    assert pair.violations() == []


@pytest.mark.parametrize("victim", ["source", "destination"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("WHIMBREL_KILLS", "6")) // 2))
def test_killed_at_any_moment(victim, seed):
    """Never two machines; and the one that runs, if one does, has its whole disk."""
    with Pair(CONFIG, settings=SETTINGS) as pair:
        begin(pair)
        pair.source.wait_status("active")
        threading.Event().wait(random.Random(f"{victim}{seed}").uniform(0, 0.5))
        app = {"source": pair.source, "destination": pair.destination}
        app.pop(victim).kill()
        ((role, left),) = app.items()
        outcome = left.call("wait")["outcome"]
        assert pair.violations() == []
        if outcome != "unknown" and (outcome == "completed") == (role == "destination"):
            assert pair.running() == [role]
            runs_whole(left)
        else:
            assert pair.running() == []
            assert role == "source" or left.call("report")["disk_refused"]
