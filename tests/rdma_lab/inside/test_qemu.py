"""With a real QEMU 7.2 as the other side: its RAM is then ours, byte for byte."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from whimbrel import Kernel, Machine, MigrationError, RunState
from whimbrel.savevm import SaveVMHandler, TailTaken
from whimbrel_ram import RAMBlock
from whimbrel_rdma.link import Link
from whimbrel_rdma.protocol import Message
from whimbrel_testing.peers import QemuFactory, wait_until
from whimbrel_testing.qemu_guest import MIB, FilledGuest

pytestmark = pytest.mark.interop
MACHINE = "pc-i440fx-7.2"
#: Blocks of that machine beside its RAM, with -nodefaults.
OTHERS = {
    "/rom@etc/acpi/tables": 0x20000,
    "pc.bios": 0x40000,
    "pc.rom": 0x20000,
    "/rom@etc/table-loader": 0x1000,
    "/rom@etc/acpi/rsdp": 0x1000,
}
GUEST = FilledGuest(size=16 * MIB, filled=6 * MIB)
pinned = pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (False, False),
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)


def prepared(ram: Path | None, pin_all: bool) -> Kernel:
    machine = Machine(
        MACHINE, run_state=RunState.RUNNING if ram is not None else RunState.PRELAUNCH
    )
    memory = bytearray(ram.read_bytes() if ram is not None else GUEST.size)
    machine.add(RAMBlock("ram", memory=memory))
    for name, size in OTHERS.items():
        machine.add(RAMBlock(name, size))
    kernel = Kernel(machine)
    kernel.settings.update({"rdma-pin-all": pin_all, "max-bandwidth": 0})
    return kernel


@pinned
def test_a_qemu_takes_ours(
    qemu: QemuFactory, tmp_path: Path, uri: str, ours: bool, theirs: bool
) -> None:
    here, there = tmp_path / "ours", tmp_path / "theirs"
    GUEST.fill(here, seed=3)
    GUEST.fill(there, seed=4)
    target = qemu(
        *GUEST.args(there, MACHINE),
        version="7.2",
        incoming=uri,
        capabilities={"rdma_pin_all": theirs},
    )
    kernel = prepared(here, ours)
    result = kernel.migrate(uri).wait(60)
    assert not result.acknowledged  # this QEMU takes no second connection
    target.wait_migration("completed")
    target.kill()
    assert there.read_bytes() == here.read_bytes()
    assert kernel.query()["x-rdma"]["pin-all"] is ours


@pytest.mark.slow
def test_a_qemu_that_can_answers(qemu: QemuFactory, tmp_path: Path, uri: str) -> None:
    """10.0 takes the second connection."""
    here, there = tmp_path / "ours", tmp_path / "theirs"
    GUEST.fill(here, seed=3)
    target = qemu(
        *GUEST.args(there, MACHINE),
        version="10.0",
        incoming=uri,
        capabilities={"return_path": True},
    )
    kernel = prepared(here, False)
    assert kernel.migrate(uri).wait(60).acknowledged
    target.wait_migration("completed")
    target.kill()
    assert there.read_bytes() == here.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("pin_all", [False, True])
def test_a_qemu_is_killed_while_it_takes_ours(
    qemu: QemuFactory, tmp_path: Path, uri: str, pin_all: bool
) -> None:
    here, there = tmp_path / "ours", tmp_path / "theirs"
    GUEST.fill(here, seed=3)
    target = qemu(*GUEST.args(there, MACHINE), version="7.2", incoming=uri)
    kernel = prepared(here, pin_all)
    kernel.settings["max-bandwidth"] = MIB
    migration = kernel.migrate(uri)
    wait_until(lambda: kernel.query().get("x-rdma", {}).get("writes"), "writes")
    target.kill()
    with pytest.raises(MigrationError):
        migration.wait(30)
    assert kernel.machine.is_running


@pytest.mark.slow
def test_a_qemu_is_killed_while_we_take_its(qemu: QemuFactory, tmp_path: Path, uri: str) -> None:
    there = tmp_path / "theirs"
    GUEST.fill(there, seed=5)
    kernel = prepared(None, False)
    incoming = kernel.incoming(uri, autostart=False)
    source = qemu(*GUEST.args(there, MACHINE), version="7.2")
    source.migrate(uri, max_bandwidth=MIB)
    wait_until(lambda: source.migration().get("ram", {}).get("normal"), "pages")
    source.kill()
    with pytest.raises(MigrationError):
        incoming.wait(30)
    assert not kernel.machine.is_running


class Rest(SaveVMHandler):
    """Device sections, which nobody here can read: all that follows RAM."""

    idstr = "rest"
    version_id = 1 << 31
    optional = True

    def save(self, out: object) -> None:
        raise NotImplementedError

    def load(self, inp: object, header: object) -> None:
        while not inp.at_end():  # type: ignore[attr-defined]
            inp.consume(len(inp.buffered()))  # type: ignore[attr-defined]
        raise TailTaken


@pinned
def test_we_take_a_qemu_s(
    qemu: QemuFactory,
    tmp_path: Path,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ours: bool,
    theirs: bool,
) -> None:
    there = tmp_path / "theirs"
    GUEST.fill(there, seed=5)
    kernel = prepared(None, ours)
    # A foreign machine: its devices are left out, and with them the end of the stream.
    monkeypatch.setattr(
        "whimbrel.incoming.Incoming._unknown_section", lambda self, header, inp: Rest()
    )
    incoming = kernel.incoming(uri, autostart=False)
    source = qemu(*GUEST.args(there, MACHINE), version="7.2")
    source.capabilities(rdma_pin_all=theirs)
    source.migrate(uri, max_bandwidth=1 << 40)
    source.wait_migration("completed")
    incoming.wait(60)
    block = kernel.machine.parts(RAMBlock)[0]
    assert bytes(block.buffer) == there.read_bytes()
    bios = next(b for b in kernel.machine.parts(RAMBlock) if b.idstr == "pc.bios")
    assert any(bios.buffer)


def steps(kinds: list[str]) -> set[tuple[str, str]]:
    """Which kind of message follows which."""
    return set(itertools.pairwise(kinds))


@pytest.mark.slow
@pytest.mark.parametrize("pin_all", [False, True])
def test_our_messages_follow_each_other_as_a_qemu_s_do(
    qemu: QemuFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, uri: str, pin_all: bool
) -> None:
    """The same RAM, sent by a QEMU and by us: zero and random in turn, 4 MiB each."""
    ram, log = tmp_path / "ram", tmp_path / "trace"
    random = np.random.default_rng(1).bytes(4 * MIB)
    ram.write_bytes((bytes(4 * MIB) + random) * 2)
    monkeypatch.setattr(
        "whimbrel.incoming.Incoming._unknown_section", lambda self, header, inp: Rest()
    )
    taking = prepared(None, False)
    incoming = taking.incoming(uri, autostart=False)
    source = qemu(
        *GUEST.args(ram, MACHINE), "-trace", "qemu_rdma_post_send_control", "-D", str(log),
        version="7.2", capabilities={"rdma_pin_all": pin_all},
    )  # fmt: skip
    source.migrate(uri, max_bandwidth=1 << 40)
    source.wait_migration("completed")
    incoming.wait(60)
    source.kill()
    theirs = re.findall(r"CONTROL: sending ([A-Z ]+)\.\.", log.read_text())

    ours: list[str] = []
    say = Link.say

    def saying(link: Link, message: Message) -> None:
        ours.append(message.kind.name.replace("_", " "))
        say(link, message)

    monkeypatch.setattr(Link, "say", saying)
    sending, taking = prepared(ram, pin_all), prepared(None, False)
    sending.settings["return-path"] = False
    incoming = taking.incoming(uri)
    sending.migrate(uri).wait(60)
    incoming.wait(60)
    assert {"RAM BLOCKS REQUEST", "REGISTER FINISHED", "QEMU FILE"} <= set(theirs)
    assert set(ours) == set(theirs)
    assert ours[:3] == theirs[:3]
    # Behind which message a round ends is a matter of time, for both.
    ends = {(kind, "REGISTER FINISHED") for kind in ours}
    assert steps(ours) - ends <= steps(theirs), steps(ours) - steps(theirs)
