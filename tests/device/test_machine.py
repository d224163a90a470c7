"""Devices as parts of a machine: which sections they become, and that they travel."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from whimbrel.channel import MemoryChannel
from whimbrel.errors import LocalError, StreamError
from whimbrel.machine import Machine
from whimbrel.savevm import LoadDriver, Mode, Priority, SaveDriver
from whimbrel.state import RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire.format import Dialect
from whimbrel.wire.items import Configuration
from whimbrel_device import DeviceHandler, device, handlers_for, plugin, u8, u64, vmdesc


@device("counter", version_id=3, minimum_version_id=2)
class Counter:
    ticks: int = u64()


@device("serial", instance_id=lambda s: s.base, unmigratable=lambda s: s.reason)
class Serial:
    base: int | None = None
    reason: str | None = None
    x: int = u8()


@device(
    "bridge",
    vmsd_name="pci-bridge",
    priority=Priority.PCI_BUS,
    path=lambda b: b.address,
    early_setup=True,
    optional=True,
    unmigratable="it is glued to the wall",
    instance_id=5,
)
class Bridge:
    address: str | None = None
    x: int = u8()


def machine(*parts: object) -> Machine:
    made = Machine("m-1.0")
    for part in parts:
        made.add(part)
    return made


def ids(*parts: object) -> list[tuple[str, int]]:
    return [(h.idstr, h.instance_id) for h in handlers_for(machine(*parts))]


def test_devices_become_handlers_in_the_order_of_adding():
    assert ids(Counter(), "no device", Serial(), Counter(), SimpleNamespace()) == [
        ("counter", 0),
        ("serial", 0),
        ("counter", 1),
    ]


def test_numbers_that_are_taken_are_left_out():
    assert ids(Serial(), Serial(base=1), Serial(), Serial(base=0x3F8)) == [
        ("serial", 0),
        ("serial", 1),
        ("serial", 2),
        ("serial", 0x3F8),
    ]


def test_two_devices_with_one_number_are_refused():
    with pytest.raises(LocalError, match=r"two devices want instance_id 7.*base=7") as caught:
        ids(Serial(base=7), Serial(base=7))
    assert caught.value.section == "serial"
    with pytest.raises(LocalError, match="32 bits"):
        ids(Serial(base=1 << 32))
    with pytest.raises(LocalError, match="32 bits"):
        ids(Serial(base=-1))


def test_equal_devices_are_not_the_same():
    """Value equality of the class says nothing about identity in the machine."""
    one = Serial(base=7)
    assert ids(one) == [("serial", 7)]
    with pytest.raises(LocalError):
        ids(one, attrs.evolve(one))


def test_what_the_decorator_says_is_what_the_handler_says():
    (handler,) = handlers_for(machine(Bridge("0000:00:1e.0")))
    assert (handler.idstr, handler.instance_id) == ("0000:00:1e.0/bridge", 5)
    assert handler.priority == Priority.PCI_BUS
    assert handler.early_setup
    assert handler.optional
    assert handler.unmigratable == "it is glued to the wall"
    (handler,) = handlers_for(machine(Bridge()))
    assert handler.idstr == "bridge"
    (handler,) = handlers_for(machine(Counter()))
    assert (handler.version_id, handler.minimum_version_id) == (3, 2)
    assert handler.unmigratable is None
    (handler,) = handlers_for(machine(Serial(reason="busy")))
    assert handler.unmigratable == "busy"


@pytest.mark.parametrize("address", ["a" * 250, "käfer"])
def test_a_name_that_no_section_can_have(address):
    with pytest.raises(LocalError, match="cannot be the name"):
        ids(Bridge(address))


def test_only_devices_have_handlers():
    with pytest.raises(TypeError, match="is no device"):
        DeviceHandler(SimpleNamespace())


def stream(source: Machine) -> bytes:
    out = OutStream(MemoryChannel())
    driver = SaveDriver(out, source, handlers_for(source), Dialect())
    driver.header(Configuration(machine_type=source.machine_type))
    driver.setup(RunParams())
    driver.complete(Mode.PRECOPY)
    out.write(driver.tail())
    out.flush()
    channel: Any = out.channel
    return bytes(channel.data)


def load(data: bytes, destination: Machine) -> None:
    LoadDriver(destination, handlers_for(destination), Dialect()).load(
        InStream(MemoryChannel(data))
    )


def test_a_machine_of_devices_travels():
    parts = (Counter(ticks=5), Serial(x=1), Counter(ticks=6), Bridge(x=9))
    data = stream(machine(*parts))
    fresh = (Counter(), Serial(), Counter(), Bridge())
    load(data, machine(*fresh))
    assert fresh == parts
    found = vmdesc.find(data)
    assert found is not None
    names = [(d.name, d.instance_id) for d in vmdesc.parse(found[1]).devices]
    assert names == [("bridge", 5), ("counter", 0), ("serial", 0), ("counter", 1)]


def test_a_failed_section_leaves_the_later_ones_as_they_were():
    data = stream(machine(Counter(ticks=5), Serial(x=1), Counter(ticks=6)))
    fresh = (Counter(), Serial(), Counter())
    with pytest.raises(StreamError, match="unknown section 'serial'"):
        load(data, machine(fresh[0], fresh[2]))
    assert fresh == (Counter(ticks=5), Serial(), Counter())


def test_the_plugin_finds_the_devices():
    kernel: Any = None
    handlers = plugin.savevm_handlers(kernel, machine(Counter(), object()))
    assert [h.idstr for h in handlers] == ["counter"]
    assert plugin.whimbrel_sections == ("*",)


def test_a_running_machine_migrates(tmp_path: Path):
    from whimbrel import Kernel

    counter = Counter(ticks=41)
    source = machine(counter, Serial(x=3))
    there = Counter()
    destination = machine(there, Serial())
    incoming = Kernel(destination).incoming(f"unix:{tmp_path}/m.sock")
    outgoing = Kernel(source).migrate(f"unix:{tmp_path}/m.sock")
    assert outgoing.wait(30).acknowledged
    incoming.wait(30)
    assert there.ticks == 41
    assert destination.is_running
    assert not source.is_running


def test_an_unmigratable_device_refuses_the_migration(tmp_path: Path):
    from whimbrel import Kernel, MigrationError

    with pytest.raises(MigrationError, match="glued to the wall"):
        Kernel(machine(Bridge())).migrate(f"unix:{tmp_path}/m.sock").wait(30)


def test_the_example_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = Path(plugin.__file__).parents[2]
    text = (root / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    module: dict[str, object] = {"__name__": "readme"}
    sys.stdout.flush()
    exec(compile(code, "README.md", "exec"), module)
    shown = text.split("```text\n")[1].split("```")[0]
    assert capsys.readouterr().out == shown
