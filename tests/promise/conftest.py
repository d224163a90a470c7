"""Two real processes with a stress machine, and a link between them that the tests cut."""

import pytest

from whimbrel_testing.harness import Pair
from whimbrel_testing.pacing import Link
from whimbrel_testing.stress import StressConfig

MIB = 1 << 20
#: Small, and slow enough that there are several rounds.
CONFIG = StressConfig(ram=4 * MIB, rate=3e6)
SETTINGS = {"max-bandwidth": 20 * MIB, "downtime-limit": 30, "commit-timeout": 60_000}


class World:
    """A pair, and what must be true of it at any time."""

    def __init__(self, pair):
        self.pair = pair
        self.source = pair.source

    @property
    def destination(self):
        return self.pair.destination

    def go(self, *, triggers=(), direct=False, link=True, kind="tcp", filters=""):
        """Start a migration through a link with these triggers; returns the link (None without). filters: `zstd::`."""
        uri = "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{self.pair.directory}/m.sock"
        address = self.destination.call("incoming", uri=filters + uri)["addresses"][0]
        if not link:
            self.source.call("migrate", uri=address)
            return None
        between = Link(address.removeprefix(filters), triggers=triggers)
        uri = between.uri.replace(",direct=off", "") if direct else between.uri
        self.source.call("migrate", uri=filters + uri)
        return between

    def impatient(self):
        """The source waits for each answer at switchover for a second only."""
        self.source.call("set", **{"commit-timeout": 1000})

    def fired(self, trigger):
        assert trigger.fired.wait(20), f"{trigger.pattern!r} did not pass"

    def runs_only_at(self, app):
        """It runs there and nowhere else, whole, and never did two copies run."""
        assert self.pair.running() == [app.role]
        app.call("ticked")
        proof = app.call("verify")
        assert proof["holds"], proof["text"]
        assert self.pair.violations() == []

    def runs_nowhere(self):
        assert self.pair.running() == []
        assert self.pair.violations() == []

    def ends(self, app, outcome, error=None):
        """The migration on that side ends so."""
        result = app.call("wait", timeout=20)
        assert result["outcome"] == outcome, result
        found = result["error"] and result["error"]["type"]
        assert (found is None) == (outcome == "completed"), result
        assert error in (None, found), result
        return result


@pytest.fixture
def world():
    with Pair(CONFIG, settings=SETTINGS) as pair:
        pair.source.call("boot")
        yield World(pair)


@pytest.fixture
def fenced():
    with Pair(CONFIG, settings=SETTINGS, fence=True) as pair:
        pair.source.call("boot")
        yield World(pair)


@pytest.fixture(scope="module")
def shared():
    """One world for many migrations that all fail: it must bear them, one after the other."""
    with Pair(CONFIG, settings=SETTINGS) as pair:
        pair.source.call("boot")
        yield World(pair)
