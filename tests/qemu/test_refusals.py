"""Destinations of another version of QEMU that refuse a guest, for every reason that one can: what we say of it.

Each case is foreseen by the comparison, told by the answers alone, and explained from QEMU's own words.
"""

import contextlib
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from whimbrel import MigrationError, OutStream
from whimbrel.channel import MemoryChannel
from whimbrel_qemu import (
    Incompatible,
    Refused,
    Verdict,
    compare,
    load,
    sample,
    send,
    write_guest,
)
from whimbrel_testing.peers import Qemu, QemuBinaries, QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

pytestmark = pytest.mark.interop

#: From, to.
BOTH_WAYS = pytest.mark.parametrize(
    "ways", [("7.2", "10.0"), ("10.0", "7.2")], ids=["7.2->10.0", "10.0->7.2"]
)
MACHINE = ("-machine", "pc-i440fx-7.2", "-m", "16M", "-S")
RNG = ("-device", "virtio-rng-pci,addr=6")
E1000 = ("-device", "e1000,addr=5,rombar=0")
#: Bytes of a command without data, and of a PING.
COMMAND, PING = 5, 9
REFUSED = Verdict.REFUSED
DEV5, DEV6 = "0000:00:05.0", "0000:00:06.0"


@attrs.frozen(kw_only=True)
class Case:
    """A guest, a destination, and what must be said of it."""

    name: str
    source: tuple[str, ...] = MACHINE
    target: tuple[str, ...]
    section: str
    instance: int | None = 0
    field: str | None = None
    what: str
    hint: str
    #: What the comparison says of the section, None if it cannot know.
    foreseen: Verdict | None = Verdict.REFUSED


CASES = [
    Case(
        name="another machine type",
        target=("-machine", "pc-i440fx-7.1", "-m", "16M", "-S"),
        section="configuration",
        instance=None,
        field="machine type",
        what="pc-i440fx-7.2, the destination's is pc-i440fx-7.1",
        hint="-machine pc-i440fx-7.2",
    ),
    Case(
        name="another UUID",
        source=(*MACHINE, "-uuid", "00112233-4455-6677-8899-aabbccddeeff"),
        target=(*MACHINE, "-uuid", "00000000-0000-0000-0000-000000000001"),
        section="configuration",
        instance=None,
        field="uuid",
        what="00112233-4455-6677-8899-aabbccddeeff",
        hint="-uuid 00112233-4455-6677-8899-aabbccddeeff",
    ),
    Case(
        name="more memory",
        target=("-machine", "pc-i440fx-7.2", "-m", "32M", "-S"),
        section="ram",
        field="pc.ram",
        what="16 MiB in the guest and 32 MiB there",
        hint="-m 16M",
    ),
    Case(
        name="less video memory",
        source=(*MACHINE, "-device", "VGA,vgamem_mb=16"),
        target=(*MACHINE, "-device", "VGA,vgamem_mb=8"),
        section="ram",
        field="0000:00:02.0/vga.vram",
        what="16 MiB in the guest and 8 MiB there",
        hint="at PCI address 02.0",
    ),
    Case(
        name="a device with a ROM is missing",
        source=(*MACHINE, "-device", "e1000,addr=5"),
        target=MACHINE,
        section="ram",
        field=f"{DEV5}/e1000.rom",
        what="no RAM block",
        hint="at PCI address 05.0",
    ),
    Case(
        name="a device is missing",
        source=(*MACHINE, *RNG, *E1000),
        target=(*MACHINE, *E1000),
        section=f"{DEV6}/virtio-rng",
        what="no section",
        hint="at PCI address 06.0",
    ),
    Case(
        name="a device in another slot",
        source=(*MACHINE, *E1000),
        target=(*MACHINE, "-device", "e1000,addr=7,rombar=0"),
        section=f"{DEV5}/e1000",
        what="no section",
        hint="addr=",
    ),
    Case(
        name="a device on a bus is missing",
        source=(*MACHINE, "-device", "piix3-usb-uhci,addr=8", "-device", "usb-tablet"),
        target=(*MACHINE, "-device", "piix3-usb-uhci,addr=8"),
        section="0000:00:08.0/1/usb-ptr",
        what="no section",
        hint="at PCI address 08.0, port 1",
    ),
    Case(
        name="fewer CPUs",
        source=(*MACHINE, "-smp", "4"),
        target=(*MACHINE, "-smp", "2"),
        section="cpu_common",
        instance=2,
        what="no section 'cpu_common' instance 2",
        hint="-smp 4",
    ),
    Case(
        name="the board has less",
        target=("-machine", "pc-i440fx-7.2,hpet=off", "-m", "16M", "-S"),
        section="hpet",
        what="no section",
        hint="hpet=on",
    ),
    Case(
        name="another model",
        source=(*MACHINE, *E1000),
        target=(*MACHINE, "-device", "e1000-82544gc,addr=5,rombar=0"),
        section=f"{DEV5}/e1000",
        field="parent_obj.config",
        what="byte 0x02 of its PCI configuration (device ID) is 0e in the guest and 0c there",
        hint="model",
    ),
    Case(
        name="another number of queues",
        source=(*MACHINE, *RNG),
        target=(*MACHINE, "-device", "virtio-rng-pci,addr=6,vectors=7"),
        section=f"{DEV6}/virtio-rng",
        field="virtio.config",
        what="(number of MSI-X vectors) is 01 in the guest and 06 there",
        hint="properties",
    ),
    Case(
        name="another number of ports",
        source=(*MACHINE, "-device", "qemu-xhci,addr=9,p2=4,p3=4"),
        target=(*MACHINE, "-device", "qemu-xhci,addr=9,p2=8,p3=8"),
        section="0000:00:09.0/xhci",
        what="longer or shorter",
        hint="layout",
        foreseen=Verdict.DOUBTFUL,
    ),
    Case(
        name="a port has gone",
        source=(
            *(*MACHINE, "-device", "virtio-serial-pci,addr=9"),
            *("-chardev", "null,id=c", "-device", "virtserialport,chardev=c"),
        ),
        target=(*MACHINE, "-device", "virtio-serial-pci,addr=9"),
        section="0000:00:09.0/virtio-console",
        field="virtio",
        what="could not take a field",
        hint="ports",
        foreseen=Verdict.DOUBTFUL,
    ),
]


def log_of(target: Qemu) -> Path:
    """Its standard error output, a file without a name."""
    return Path(f"/proc/{target.process.pid}/fd/2")


def refusal(file: Path, uri: str, **options: Any) -> Refused:
    content = file.read_bytes()
    with pytest.raises(Refused) as caught:
        send(file, uri, **options)
    assert file.read_bytes() == content
    return caught.value


@BOTH_WAYS
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_refusal_is_foreseen_located_and_explained(
    qemu: QemuFactory,
    keep: Callable[..., Path],
    tmp_path: Path,
    case: Case,
    ways: tuple[str, str],
) -> None:
    here, there = ways
    checked = {"validate_uuid": case.field == "uuid"}
    file = keep(here, case.source, **checked)
    comparison = compare(load(file), load(keep(there, case.target, **checked)))
    found = comparison.about(case.section, case.instance)
    assert case.foreseen in {d.verdict for d in found}
    assert bool(comparison.refused) is (case.foreseen is Verdict.REFUSED)

    uri = f"unix:{tmp_path}/told"
    target = qemu(*case.target, version=there, incoming=uri, capabilities=checked)
    error = refusal(file, uri, log_file=log_of(target))
    assert target.wait_exit() == 1
    assert (error.section, error.instance_id, error.field) == (
        case.section,
        case.instance,
        case.field,
    )
    assert case.what in error.what
    assert case.hint in str(error.hint)
    assert error.words
    assert all(line in target.stderr for line in error.words)
    # The answers alone name the same section.
    assert error.reached is not None
    assert error.reached.section == case.section
    assert error.reached.instance_id == case.instance
    if case.section not in ("configuration", "ram"):
        assert error.offset == offset_of(file, case)


def offset_of(file: Path, case: Case) -> int:
    """Where the section begins in the stream that was sent: where it does in the file as we write it, and as many bytes
    of commands further on.
    """
    guest = load(file)
    assert guest.tail is not None
    sections = guest.tail.split()
    n = [(s.device.name, s.device.instance_id) for s in sections].index(
        (case.section, case.instance)
    )
    channel = MemoryChannel()
    write_guest(guest, OutStream(channel))
    at = bytes(channel.data).index(guest.tail.sections) + sum(len(s.data) for s in sections[:n])
    return at + COMMAND + PING * (n + 3)  # the first, behind the list of blocks, before each device


def test_name_without_a_version_is_another_machine_in_each_version(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path
) -> None:
    args = ("-machine", "pc", "-m", "16M", "-S")
    file = keep("7.2", args)
    target = qemu(*args, version="10.0", incoming=f"unix:{tmp_path}/in")
    error = refusal(file, f"unix:{tmp_path}/in", log_file=log_of(target))
    assert (error.section, error.field) == ("configuration", "machine type")
    assert "pc-i440fx-7.2, the destination's is pc-i440fx-10.0" in error.what
    assert "-machine pc-i440fx-7.2" in str(error.hint)


def test_guest_of_the_newest_machine_gets_the_stream_of_that(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path
) -> None:
    """Its command SWITCHOVER_START, which a file does not keep."""
    command = b"\x08\x00\x0b\x00\x00"
    args = ("-machine", "pc-i440fx-10.0", "-m", "16M", "-S")
    file, sent = keep("10.0", args), tmp_path / "sent"
    assert file.read_bytes().count(command) == 1
    send(file, f"exec:cat >{sent}")
    assert sent.read_bytes().count(command) == 1
    target = qemu(*args, version="10.0", incoming=f"unix:{tmp_path}/in")
    assert send(sent, f"unix:{tmp_path}/in").acknowledged
    target.wait_migration("completed")


# ---- what no option of these two versions brings about, done to the file


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


@attrs.frozen(kw_only=True)
class Edit:
    """What is done to the file, and what must be said of it."""

    name: str
    section: str = f"{DEV5}/e1000"
    #: Bytes behind the section's name.
    old: bytes
    new: bytes
    field: str
    what: str


EDITS = [
    Edit(
        name="newer section",
        old=u32(0) + u32(2),  # instance, version
        new=u32(0) + u32(3),
        field="version_id",
        what="version 3, the destination knows it up to version 2",
    ),
    Edit(
        name="larger number",
        old=u32(0) + u32(2) + u32(2),
        new=u32(0) + u32(2) + u32(9),
        field="parent_obj.version_id",
        what="9 in the guest, and at most 2 there",
    ),
    Edit(
        name="other constant",
        section="vmmouse",
        old=u32(0x400),
        new=u32(0x500),
        field="queue_size",
        what="500 (hex) in the guest and 400",
    ),
]


@BOTH_WAYS
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name.replace(" ", "-"))
def test_guest_of_a_newer_qemu(
    qemu: QemuFactory,
    keep: Callable[..., Path],
    tmp_path: Path,
    ways: tuple[str, str],
    edit: Edit,
) -> None:
    here, there = ways
    args = (*MACHINE, *E1000)
    file, other = keep(here, args), load(keep(there, args))
    data = file.read_bytes()
    at = data.index(bytes((len(edit.section),)) + edit.section.encode()) + 1 + len(edit.section)
    at = data.index(edit.old, at)
    file.write_bytes(data[:at] + edit.new + data[at + len(edit.old) :])

    refused = compare(load(file), other).refused
    assert [(d.section, d.field) for d in refused] == [(edit.section, edit.field)]
    target = qemu(*args, version=there, incoming=f"unix:{tmp_path}/in")
    error = refusal(file, f"unix:{tmp_path}/in", log_file=log_of(target))
    assert (error.section, error.field) == (edit.section, edit.field)
    assert edit.what in error.what
    assert error.reached is not None
    assert error.reached.section == edit.section
    with pytest.raises(Incompatible, match="Nothing was sent") as caught:
        send(file, f"unix:{tmp_path}/nobody", against=other)
    assert caught.value.section == edit.section


@BOTH_WAYS
def test_subsection_that_the_destination_does_not_know(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path, ways: tuple[str, str]
) -> None:
    """QEMU does not name it. The guest's own description does."""
    here, there = ways
    args = (*MACHINE, *E1000)
    file = keep(here, args)
    content = file.read_bytes()
    file.write_bytes(
        content.replace(b"e1000/tx_tso_state", b"e1000/tx_tso_stale")
    )  # description too
    comparison = compare(load(file), load(keep(there, args)))
    assert "e1000/tx_tso_stale" in {d.field for d in comparison.of(Verdict.DOUBTFUL)}
    target = qemu(*args, version=there, incoming=f"unix:{tmp_path}/in")
    error = refusal(file, f"unix:{tmp_path}/in", log_file=log_of(target))
    assert error.section == f"{DEV5}/e1000"
    assert "does not know" in error.what
    assert "e1000/tx_tso_stale" in error.what


# ---- where the words come from


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_without_words_the_answers_say_where(
    qemu: QemuFactory, keep: Callable[..., Path], version: str
) -> None:
    """Over TCP, where the end of the destination may be a reset."""
    file = keep("7.2", (*MACHINE, *RNG, *E1000))
    target = qemu(*MACHINE, *RNG, version=version, incoming="tcp:127.0.0.1:0")
    (address,) = target.migration()["socket-address"]
    error = refusal(file, f"tcp:127.0.0.1:{address['port']}")
    assert error.section == f"{DEV5}/e1000"
    assert error.words == ()
    assert "at PCI address 05.0" in str(error.hint)
    assert "--log" in str(error.hint)


def test_comparison_and_words_are_told_together(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path
) -> None:
    """What is doubtful is tried; if it was refused, the doubts are the hint."""
    ports = ("-device", "qemu-xhci,addr=9,p2={0},p3={0}")
    few, many = ((*MACHINE, *(p.format(n) for p in ports)) for n in (4, 8))
    file = keep("7.2", few)
    target = qemu(*many, version="10.0", incoming=f"unix:{tmp_path}/in")
    error = refusal(file, f"unix:{tmp_path}/in", against=load(keep("10.0", many)))
    assert error.section == "0000:00:09.0/xhci"
    assert "portsc: 8 uint32 of 4 bytes in the guest, 16 uint32" in str(error.hint)
    assert target.wait_exit() == 1


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_words_of_a_command(
    qemu_binaries: QemuBinaries, keep: Callable[..., Path], version: str
) -> None:
    """There is no way back, but the end of exec: has QEMU's last words."""
    file = keep("7.2", (*MACHINE, *RNG))
    arguments = " ".join((*MACHINE, "-nodefaults", "-display", "none", "-incoming", "fd:0"))
    error = refusal(file, f"exec:{qemu_binaries.find(version)} {arguments}")
    assert error.section == f"{DEV6}/virtio-rng"
    assert "no section" in error.what
    assert error.reached is None
    assert any(line.startswith("qemu-system-x86_64: Unknown savevm") for line in error.words)


def test_destination_that_dies_is_not_said_to_have_refused_for_a_reason(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path
) -> None:
    file = keep("7.2", MACHINE)
    target = qemu(*MACHINE, incoming=f"unix:{tmp_path}/in")
    sending = []

    def kill() -> None:
        with contextlib.suppress(MigrationError):
            sending.append(send(file, f"unix:{tmp_path}/in", max_bandwidth=200_000))

    thread = threading.Thread(target=kill)
    thread.start()
    wait_until(lambda: target.migration().get("status") == "active", "an active target")
    target.kill()
    thread.join()
    assert sending == []


# ---- what is accepted


@BOTH_WAYS
def test_what_only_the_destination_has_is_taken_in_silence_and_foreseen(
    qemu: QemuFactory, keep: Callable[..., Path], tmp_path: Path, ways: tuple[str, str]
) -> None:
    here, there = ways
    more = (*MACHINE, "-smp", "2", *RNG, "-device", "e1000,addr=5")
    file, other = keep(here, MACHINE), load(keep(there, more))
    silent = {(d.section, d.field) for d in compare(load(file), other).of(Verdict.SILENT)}
    assert {("cpu", None), (f"{DEV6}/virtio-rng", None), ("ram", f"{DEV5}/e1000.rom")} <= silent
    target = qemu(*more, version=there, incoming=f"unix:{tmp_path}/in")
    sent = send(file, f"unix:{tmp_path}/in", against=other)
    assert sent.acknowledged
    assert sent.comparison is not None
    target.wait_migration("completed")


def test_same_machine_of_two_versions_differs_in_nothing(
    qemu: QemuFactory, keep: Callable[..., Path]
) -> None:
    """Versions describe one layout in different ways: other names, arrays taken apart."""
    rich = (
        *(*MACHINE, "-smp", "2", *RNG, *E1000, "-device", "VGA", "-device", "qemu-xhci,addr=9"),
        *("-device", "usb-tablet", "-device", "virtio-net-pci,addr=8", "-device", "lsi53c895a"),
    )
    old, new = load(keep("7.2", rich)), load(keep("10.0", rich))
    for differences in (compare(old, new).differences, compare(new, old).differences):
        assert [d for d in differences if d.verdict is not Verdict.HARMLESS] == []
        # ROMs of the two packages are not the same.
        assert {d.section for d in differences} <= {"ram"}


@BOTH_WAYS
def test_running_guest_goes_on_in_another_version_and_was_foreseen_to(
    qemu: QemuFactory, tmp_path: Path, ways: tuple[str, str], keep: Callable[..., Path]
) -> None:
    here, there = ways
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    source = qemu(*guest.args(before), version=here)
    wait_counting(before)
    file = tmp_path / "guest.mig"
    source.migrate(f"exec:cat >{file}", max_bandwidth=0)
    source.wait_migration("completed")
    other = load(keep(there, (*guest.args(tmp_path / "never.log"), "-S")))
    target = qemu(*guest.args(after), version=there, incoming=f"unix:{tmp_path}/in")
    sent = send(file, f"unix:{tmp_path}/in", against=other)
    assert sent.acknowledged
    assert sent.comparison is not None
    assert sent.comparison.refused == ()
    wait_counting(before, after, beyond=last_number(before))
    target.qmp("stop")
    check_count(before, after)


def test_sample_may_come_over_any_transport(keep: Callable[..., Path]) -> None:
    file = keep("10.0", MACHINE)
    assert compare(sample(f"exec:cat {file}"), load(file)).differences == ()


#: Machines that QEMU itself does not keep compatible: what it says of the guest's CPU.
FOREIGN_CPUS = {
    ("aarch64", "10.0", "7.2"): (
        ("-machine", "virt-7.2", "-cpu", "cortex-a57", "-m", "64M", "-S"),
        "cpreg_vmstate_array_len",
        "at most",
    ),
    ("ppc64", "10.0", "7.2"): (
        ("-machine", "pseries-7.2", "-m", "256M", "-S"),
        "cpu/slb",
        "too new",
    ),
}


@pytest.mark.parametrize("where", FOREIGN_CPUS, ids="-".join)
def test_cpu_of_another_architecture_that_became_another(
    qemu: QemuFactory, tmp_path: Path, where: tuple[str, str, str]
) -> None:
    arch, here, there = where
    args, field, what = FOREIGN_CPUS[where]
    files = []
    for version in (here, there):
        files.append(tmp_path / version)
        source = qemu(*args, version=version, arch=arch)
        source.migrate(f"exec:cat >{files[-1]}", max_bandwidth=0)
        source.wait_migration("completed")
    (foreseen,) = compare(*map(load, files)).refused
    assert (foreseen.section, foreseen.field) == ("cpu", field)
    target = qemu(*args, version=there, arch=arch, incoming=f"unix:{tmp_path}/in")
    error = refusal(files[0], f"unix:{tmp_path}/in", log_file=log_of(target))
    assert (error.section, error.instance_id, error.field) == ("cpu", 0, field)
    assert what in error.what
    assert error.reached is not None
    assert error.reached.section == "cpu"
