"""How far a destination got: what is sent to know it, and what is not sent where nobody answers."""

import contextlib
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from whimbrel import (
    Kernel,
    LocalError,
    Machine,
    MigrationError,
    PeerError,
    RunState,
    SaveVMHandler,
)
from whimbrel.channel import MemoryChannel
from whimbrel.state import RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import Command
from whimbrel.wire.items import SectionHeader
from whimbrel_qemu import Refused, Verdict, compare, load, receive, relay, send, write_guest
from whimbrel_qemu.milestones import Milestones, is_milestone
from whimbrel_ram import RAMBlock
from whimbrel_testing.peers import QemuFactory

MIB = 1 << 20


class Device(SaveVMHandler):
    """Eight bytes, under any name; a destination may refuse them."""

    def __init__(self, idstr: str, *, refuses: bool = False) -> None:
        self.idstr = idstr
        self._refuses = refuses

    def save(self, out: OutStream) -> None:
        out.u64(7)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        if inp.u64() != 7 or self._refuses:
            raise LocalError(f"{self.idstr} does not want it")


NAMES = ("timer", "net", "disk", "sound")


def machine(*names: str, refuses: str | None = None, run_state: RunState) -> Machine:
    made = Machine("app-1.0", run_state=run_state)
    made.add(RAMBlock("low", MIB))
    for name in names:
        made.register(Device(name, refuses=name == refuses))
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An app's machine, kept."""
    path, listening = tmp_path / "app.mig", threading.Event()
    receiver = threading.Thread(
        target=receive,
        args=(f"unix:{tmp_path}/in", path),
        kwargs={"on_listening": lambda _: listening.set()},
    )
    receiver.start()
    assert listening.wait(30)
    Kernel(machine(*NAMES, run_state=RunState.PAUSED)).migrate(f"unix:{tmp_path}/in").wait(30)
    receiver.join()
    return path


def test_without_answers_nothing_is_asked(file: Path, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    send(file, f"exec:cat >{sent}")
    channel = MemoryChannel()
    write_guest(load(file), OutStream(channel))
    assert len(sent.read_bytes()) == len(
        channel.data
    )  # only the number of the section ram is another
    one, other = load(sent), load(file)
    assert one.tail == other.tail
    assert [bytes(b.memory) for b in one.blocks] == [bytes(b.memory) for b in other.blocks]


def test_each_section_costs_the_nine_bytes_of_a_ping(file: Path, tmp_path: Path) -> None:
    one_way = send(file, f"exec:cat >{tmp_path}/sent").stream_bytes
    target = Kernel(machine(*NAMES, run_state=RunState.INMIGRATE))
    run = target.incoming(f"unix:{tmp_path}/app")
    both_ways = send(file, f"unix:{tmp_path}/app").stream_bytes
    run.wait(30)
    opening = len(items.encode_command(Command.OPEN_RETURN_PATH))
    ping = len(items.encode_command(Command.PING, struct.pack(">I", 1)))
    sections = load(file).sections
    assert sections == len(NAMES) + 1  # globalstate
    # The first, behind the list of blocks, before each section, before the end.
    assert both_ways - one_way == opening + ping * (1 + 1 + sections + 1)


@pytest.mark.parametrize("refuses", NAMES)
def test_any_destination_that_answers_is_located(file: Path, tmp_path: Path, refuses: str) -> None:
    target = Kernel(machine(*NAMES, refuses=refuses, run_state=RunState.INMIGRATE))
    run = target.incoming("tcp:127.0.0.1:0")
    with pytest.raises(Refused) as caught:
        send(file, run.addresses[0])
    error = caught.value
    assert (error.section, error.instance_id) == (refuses, 0)
    assert isinstance(error, PeerError)
    with pytest.raises(LocalError, match=refuses):
        run.wait(30)


def test_what_is_kept_again_has_no_trace_of_the_questions(file: Path, tmp_path: Path) -> None:
    """A `receive` answers them as well, so that nobody waits in vain."""
    again, listening = tmp_path / "again.mig", threading.Event()
    receiver = threading.Thread(
        target=receive,
        args=(f"unix:{tmp_path}/again", again),
        kwargs={"on_listening": lambda _: listening.set()},
    )
    receiver.start()
    assert listening.wait(30)
    assert send(file, f"unix:{tmp_path}/again").acknowledged
    receiver.join()
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.interop
def test_section_of_devices_behind_one_that_nobody_can_read(
    qemu: QemuFactory, tmp_path: Path
) -> None:
    """ppc64's page table is a live section of its own kind; what is behind it is told apart all the same."""
    args = ("-machine", "pseries", "-m", "256M", "-S", "-vga", "none")
    rng = ("-device", "virtio-rng-pci,addr=6")
    kept = tmp_path / "kept.mig"
    source = qemu(*args, *rng, arch="ppc64")
    source.migrate(f"exec:cat >{kept}", max_bandwidth=0)
    source.wait_migration("completed")
    guest = load(kept)
    assert guest.rest is not None
    (unknown,) = compare(guest, guest).differences
    assert (unknown.verdict, unknown.section) == (Verdict.DOUBTFUL, "ram")
    for options, section in ((rng, None), ((), "virtio-rng")):
        uri = f"unix:{tmp_path}/{len(options)}"
        target = qemu(*args, *options, arch="ppc64", incoming=uri)
        if section is None:
            assert send(kept, uri).acknowledged
            target.wait_migration("completed")
            continue
        with pytest.raises(Refused) as caught:
            send(kept, uri)
        assert str(caught.value.section).endswith(section)
        assert target.wait_exit() == 1


@pytest.mark.interop
@pytest.mark.parametrize("version", ["7.2", "10.0"])
@pytest.mark.parametrize("fits", [True, False], ids=["fits", "refuses"])
def test_answers_come_through_a_relay(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path, version: str, fits: bool
) -> None:
    """It holds back what may be the end of the stream; a question never is."""
    machine = ("-machine", "pc-i440fx-7.2", "-m", "16M", "-S")
    # More than 64 sections, so that the questions have many numbers.
    rng = [
        ("-device", f"virtio-rng-pci,addr={3 + n // 8}.{n % 8},multifunction=on") for n in range(40)
    ]
    args = (*machine, *(word for device in rng for word in device))
    kept = keep("7.2", args)
    target = qemu(*(args if fits else args[:-2]), version=version, incoming=f"unix:{tmp_path}/out")
    listening = threading.Event()
    relaying = threading.Thread(
        target=passed,
        args=(f"unix:{tmp_path}/relay", f"unix:{tmp_path}/out", listening.set),
    )
    relaying.start()
    assert listening.wait(30)
    if fits:
        assert send(kept, f"unix:{tmp_path}/relay").acknowledged
        target.wait_migration("completed")
    else:
        with pytest.raises(Refused) as caught:
            send(kept, f"unix:{tmp_path}/relay")
        assert caught.value.section == "0000:00:07.7/virtio-rng"
        assert "behind it" not in str(caught.value)
    relaying.join()


def passed(source: str, destination: str, listening: Callable[[], None]) -> None:
    with contextlib.suppress(MigrationError):
        relay(source, destination, on_listening=lambda _: listening())


def test_questions_are_numbered_without_a_byte_that_may_be_the_end() -> None:
    channel = MemoryChannel()
    out = OutStream(channel)
    milestones = Milestones()
    values: list[int] = []
    milestones.setup(
        out, RunParams(wait_for_pong=lambda value, _: bool(values.append(value)) or True)
    )
    for n in range(1000):
        milestones.mark(out, "timer", n)
    assert len(set(values)) == 1000
    assert all(is_milestone(value) for value in values)
    assert not {0, 6} & {byte for value in values for byte in value.to_bytes(4, "big")}
    for n in (0, 1, 127, 128, 999):
        piece = milestones.reached(values[n])
        assert piece is not None
        assert piece.instance_id == n
    for other in (0, 1, 0x4D53_8080 ^ 0x80, 0x8000_0001, 0x7265_6C79):
        assert not is_milestone(other)
    assert milestones.reached(0x8000_0001) is None


def test_nobody_is_asked_again_who_did_not_answer() -> None:
    out = OutStream(MemoryChannel())
    milestones = Milestones()
    asked: list[int] = []
    milestones.setup(out, RunParams(wait_for_pong=lambda value, _: bool(asked.append(value))))
    milestones.mark(out, "timer")
    milestones.mark(out, "net")
    assert len(asked) == 1
    assert not milestones.exact
    assert milestones.offset_of("net", 0) == out.position == 18


@pytest.mark.interop
def test_sections_that_nothing_describes_are_asked_for_once(
    qemu: QemuFactory, tmp_path: Path
) -> None:
    args = ("-machine", "pc-i440fx-2.0", "-m", "16M", "-S")
    kept = tmp_path / "kept.mig"
    source = qemu(*args, "-device", "virtio-rng-pci")
    source.migrate(f"exec:cat >{kept}", max_bandwidth=0)
    source.wait_migration("completed")
    (unknown,) = compare(load(kept), load(kept)).differences
    assert (unknown.verdict, unknown.section) == (Verdict.DOUBTFUL, "(devices)")
    qemu(*args, incoming=f"unix:{tmp_path}/in")
    with pytest.raises(Refused, match="first device, or behind it") as caught:
        send(kept, f"unix:{tmp_path}/in")
    assert caught.value.section == "timer"
