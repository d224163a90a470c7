"""query-migrate by state, and what else a monitor needs of the kernel."""

import os

import attrs
import pytest

from whimbrel import Kernel, LocalError, Machine, PluginError, StateError, Status, hookimpl

from .conftest import Live, Number, ScriptedDestination, answer_pong, answer_shut

TIMES = {"total-time", "setup-time"}


class Counting(Live):
    def query(self):
        return {"live": {"looks": self.looks}}


@pytest.fixture
def side(world):
    return world.side(Number("a"), Counting())


def peer(world):
    return ScriptedDestination(world.transport.peer(), on_ping=answer_pong, on_eof=answer_shut(0))


def test_nothing_before_the_first_migration(side):
    assert side.kernel.query() == {}


def test_setup_is_a_status_alone(world, side):
    world.transport.hang_connect = True
    run = side.kernel.migrate("pair:")
    assert side.kernel.query() == {"status": "setup"}
    run.cancel()


def test_active_and_what_follows(world, side):
    seen = {}
    side.kernel.notifiers.add(lambda n: seen.setdefault(str(n.new), side.kernel.query()))
    side.kernel.settings["pause-before-switchover"] = True
    side.kernel.settings["downtime-limit"] = 217
    peer(world)
    run = side.kernel.migrate("pair:")
    assert side.kernel.state.wait_for(lambda s: s is Status.PRE_SWITCHOVER, 5)
    side.kernel.migrate_continue("pre-switchover")
    run.wait(5)
    members = {"status", "expected-downtime", "live"} | TIMES
    assert set(seen["active"]) == set(seen["pre-switchover"]) == set(seen["device"]) == members
    assert seen["active"]["expected-downtime"] == 217  # until a second look knows more
    assert all(isinstance(seen["active"][name], int) for name in TIMES)


def test_completed(world, side):
    peer(world)
    side.kernel.migrate("pair:").wait(5)
    info = side.kernel.query()
    assert set(info) == {"status", "downtime", "live", "x-outcome", "x-acknowledged"} | TIMES
    assert (info["status"], info["x-outcome"], info["x-acknowledged"]) == (
        "completed",
        "completed",
        True,
    )
    assert side.kernel.query() == info  # total-time stands still


def test_cancelled_is_a_status_alone(world, side):
    side.machine.register(Number("b"))
    run = side.kernel.migrate("pair:")
    run.cancel()
    with pytest.raises(LocalError):
        run.wait(5)
    assert side.kernel.query() == {"status": "cancelled", "x-outcome": "cancelled"}


def test_blocked_reasons_in_any_state(world, side):
    peer(world)
    side.kernel.migrate("pair:").wait(5)
    side.kernel.blockers.add("no")
    assert side.kernel.query()["blocked-reasons"] == ["no"]


def test_a_destination_tells_where_it_listens_and_its_status(tmp_path):
    where = str(tmp_path / "in")
    there = Kernel(Machine("m"))
    incoming = there.incoming(f"unix:{where}")
    assert there.query() == {
        "status": "setup",
        "x-addresses": [f"unix:{where}"],
        "socket-address": [{"type": "unix", "path": where}],
    }
    Kernel(Machine("m")).migrate(incoming.addresses[0]).wait(5)
    incoming.wait(5)
    assert there.query() == {
        "status": "completed",
        "x-outcome": "completed",
        "x-acknowledged": True,
    }


def test_a_port_that_the_system_chose_is_told_as_text():
    there = Kernel(Machine("m"))
    incoming = there.incoming("tcp:127.0.0.1:0")
    (address,) = there.query()["socket-address"]
    port = address.pop("port")
    assert address == {"type": "inet", "host": "127.0.0.1", "ipv4": True}
    assert incoming.addresses == (f"tcp:127.0.0.1:{port}",)
    incoming.cancel()


def test_a_second_incoming_migration_is_refused(side):
    incoming = side.kernel.incoming("pair:")
    with pytest.raises(StateError, match="already been started"):
        side.kernel.incoming("pair:")
    with pytest.raises(StateError, match="waiting for an incoming migration"):
        side.kernel.migrate("pair:")
    incoming.cancel()


# ---- descriptors by name


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_name_that_is_given_again_closes_what_had_it(side):
    first, second = os.pipe()
    side.kernel.register_fd("mig", first)
    side.kernel.register_fd("mig", first)
    assert is_open(first)
    side.kernel.register_fd("mig", second)
    assert not is_open(first)
    side.kernel.close_fd("mig")
    assert not is_open(second)
    with pytest.raises(LocalError, match="^File descriptor named 'mig' not found$"):
        side.kernel.close_fd("mig")


# ---- monitors


@attrs.define
class Serves:
    """A plugin that serves a monitor at addresses of one scheme."""

    scheme: str
    opened: list = attrs.field(factory=list)
    whimbrel_api = (1, 0)

    @hookimpl
    def monitors(self, kernel, address):
        if not address.startswith(self.scheme):
            return None
        return lambda: self.opened.append((kernel, address)) or self


def test_a_monitor_is_opened_by_the_plugin_that_serves_the_address(world, side):
    other, mine = Serves("other:"), Serves("mine:")
    for plugin in (other, mine):
        world.plugins.register(plugin, plugin.scheme)
    assert side.kernel.monitor("mine:here") is mine
    assert mine.opened == [(side.kernel, "mine:here")]
    assert other.opened == []


def test_without_a_plugin_it_says_what_to_install(side):
    with pytest.raises(PluginError, match="whimbrel-monitor"):
        side.kernel.monitor("unix:/run/app.qmp")


def test_two_that_serve_one_address_are_refused_and_neither_opens(world, side):
    both = Serves("mine:"), Serves("mi")
    for plugin in both:
        world.plugins.register(plugin, f"the {plugin.scheme}")
    with pytest.raises(PluginError, match="the mine: of .* and the mi of "):
        side.kernel.monitor("mine:here")
    assert [p.opened for p in both] == [[], []]
