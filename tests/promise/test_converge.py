"""A machine that dirties memory nearly as fast as the link carries it gets across, whole; no time is judged here."""

import pytest

from whimbrel_testing.harness import Pair
from whimbrel_testing.pacing import Direction, Link
from whimbrel_testing.stress import StressConfig

MIB = 1 << 20
CONFIG = StressConfig(ram=32 * MIB, rate=12e6)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_busy_machine_converges_over_a_thin_link(kind, tmp_path):
    listen = "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/m.sock"
    with Pair(CONFIG, settings={"max-bandwidth": 0, "downtime-limit": 100}) as pair:
        pair.source.call("boot")
        target = pair.destination.call("incoming", uri=listen)["addresses"][0]
        before = pair.source.call("report")["writes"]
        with Link(target, rate=30e6) as link:
            pair.source.call("migrate", uri=link.uri)
            result = pair.source.call("wait", timeout=60)
            assert result["outcome"] == "completed", result
            passed = link.passed[Direction.FORWARD]
        after = pair.destination.call("ticked")
        proof = pair.destination.call("verify")
        assert proof["holds"], proof["text"]
        assert pair.running() == ["destination"]
        assert pair.violations() == []
        # It really was busy, and really went over the link, more than once over what changed.
        assert after["writes"] > before
        assert passed >= result["transferred"] > CONFIG.ram
        assert pair.source.call("query")["ram"]["dirty-sync-count"] > 2
        assert after["felt_downtime"] > 0
