"""Disks that move within the stream, with real QEMUs at either end. Only QEMU 7.2 has this section."""

import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import attrs
import pytest

from whimbrel import Kernel, Machine, MigrationError, Plugins, RunState, hookimpl
from whimbrel.wire import dialects
from whimbrel.wire.format import GlobalStateForm
from whimbrel_block import BlockDevice, QemuImage
from whimbrel_qemu.ram import AdoptingRam
from whimbrel_qemu.tail import ForeignTail
from whimbrel_testing.guest import writer
from whimbrel_testing.peers import PATIENCE, missing_peer
from whimbrel_testing.qemu_guest import MIB, check_count, last_number, wait_counting

pytestmark = pytest.mark.interop

MACHINE = "pc-i440fx-7.2"
SIZE = 12 * MIB + 3 * 512
ZERO_BLOCKS = pytest.mark.parametrize("zero_blocks", [False, True], ids=["full", "zero-blocks"])


def guest_args(disk, serial, form="raw"):
    return [
        *("-machine", MACHINE, "-m", "16M"),
        *("-drive", f"if=none,id=drv0,format={form},file={disk}"),
        *("-device", "virtio-blk-pci,drive=drv0"),
        *("-chardev", f"file,id=serial,path={serial}", "-serial", "chardev:serial"),
    ]


def make_disk(path, data=2):
    """The guest that keeps writing, `data` MiB of random data behind its ring, and holes."""
    with path.open("wb") as file:
        file.write(writer.boot_sector())
        file.seek(4 * MIB)
        file.write(os.urandom(data * MIB))
        file.truncate(SIZE)
    return path


def garbage(path):
    path.write_bytes(b"\xaa" * SIZE)
    return path


def content(path):
    """What a guest sees of an image."""
    if path.suffix == ".qcow2":
        raw = path.with_suffix(".raw")
        run("qemu-img", "convert", "-U", "-O", "raw", path, raw)
        path = raw
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command):
    if shutil.which(command[0]) is None:
        missing_peer(f"no {command[0]}; .ci/run installs all peers (qemu-utils)")
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)


def overlay(path, base):
    run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", base, path)
    return path


class Halfway:
    """A guest of QEMU that whimbrel received with its disk, and sends on."""

    whimbrel_api = (1, 0)

    def __init__(self, device):
        self.device = device
        self.tail = None

    @hookimpl
    def unknown_section(self, kernel, header, inp):
        self.tail = ForeignTail()
        return self.tail

    def receive(self, uri):
        plugins = Plugins.load()
        plugins.register(self, "halfway")
        machine = Machine(MACHINE)
        machine.add(self.device)
        self.ram = AdoptingRam(64 * MIB, lambda: None)
        machine.register(self.ram)
        return Kernel(machine, plugins=plugins).incoming(uri, autostart=False)

    def kernel(self):
        """One that sends it."""
        machine = Machine(MACHINE, run_state=RunState.PAUSED)
        machine.add(self.device)
        for block in self.ram.blocks:
            machine.add(block)
        machine.register(ForeignTail(self.tail.tail))
        dialect = attrs.evolve(dialects.for_machine(MACHINE), globalstate=GlobalStateForm.NEVER)
        return Kernel(machine, dialect=dialect)


def pass_through(qemu, folder, *, source_disk, halfway, target_disk, zero_blocks, inc):
    """QEMU → whimbrel → QEMU, the guest writing to its disk. Returns the bytes of both streams."""
    logs = folder / "before.log", folder / "after.log"
    form = source_disk.suffix[1:]
    capabilities = {"return_path": True, "zero_blocks": zero_blocks}
    source = qemu(*guest_args(source_disk, logs[0], form), version="7.2", capabilities=capabilities)
    wait_counting(logs[0])

    incoming = halfway.receive(f"unix:{folder}/one")
    source.qmp("migrate-set-parameters", max_bandwidth=40 * MIB, downtime_limit=50)
    source.qmp("migrate", uri=incoming.addresses[0], blk=True, inc=inc)
    first = incoming.wait(PATIENCE).figures
    source.wait_migration("completed")
    assert content(source_disk) == content(Path(halfway.device.image.name))

    target = qemu(
        *guest_args(target_disk, logs[1], form),
        "-S",
        version="7.2",
        incoming=f"unix:{folder}/two",
    )
    kernel = halfway.kernel()
    kernel.settings["zero-blocks"] = zero_blocks
    result = kernel.migrate(f"unix:{folder}/two", blk=True, inc=inc).wait(PATIENCE)
    assert result.acknowledged
    target.wait_status("paused", "prelaunch")
    target.qmp("human-monitor-command", command_line="qemu-io drv0 flush")  # qcow2's own tables
    assert content(target_disk) == content(source_disk)
    target.qmp("cont")
    wait_counting(*logs, beyond=last_number(logs[0]), what="counting on")
    target.qmp("stop")
    check_count(*logs)
    return first.transferred, result.figures.transferred


@ZERO_BLOCKS
def test_a_guest_passes_with_its_disk(qemu, tmp_path, zero_blocks):
    """Into whimbrel and out again; the disk it goes to held something else before."""
    sent = pass_through(
        qemu,
        tmp_path,
        source_disk=make_disk(tmp_path / "source.raw"),
        halfway=Halfway(BlockDevice("drv0", garbage(tmp_path / "halfway.img"))),
        target_disk=garbage(tmp_path / "target.raw"),
        zero_blocks=zero_blocks,
        inc=False,
    )
    # 13 chunks, of which the ring and the random data are in 5; RAM comes on top.
    assert (sent[1] < 10 * MIB) == zero_blocks


def test_a_guest_passes_with_what_differs_from_a_base(qemu, tmp_path):
    base = make_disk(tmp_path / "base.img", data=8)
    shutil.copy(base, tmp_path / "halfway.img")
    sent = pass_through(
        qemu,
        tmp_path,
        source_disk=overlay(tmp_path / "source.qcow2", base),
        halfway=Halfway(BlockDevice("drv0", tmp_path / "halfway.img", base=base)),
        target_disk=overlay(tmp_path / "target.qcow2", base),
        zero_blocks=True,
        inc=True,
    )
    assert sent[1] < 8 * MIB


@ZERO_BLOCKS
def test_an_app_that_keeps_writing_hands_its_disk_to_qemu(qemu, tmp_path, zero_blocks):
    """A QEMU can boot from it then: the guest on it was part of what the app had."""
    device = BlockDevice("drv0", make_disk(tmp_path / "app.img"))
    halt = threading.Event()

    def write():
        n = 0
        while not halt.wait(0.001):
            device.pwrite(n.to_bytes(8) * 512, 9 * MIB + n % 512 * 4096)
            n += 1

    thread = threading.Thread(target=write)

    def stop():
        halt.set()
        thread.join()

    machine = Machine(MACHINE, stop=stop)
    machine.add(device)
    target_disk, log = garbage(tmp_path / "target.raw"), tmp_path / "serial.log"
    target = qemu(
        *guest_args(target_disk, log), "-S", version="7.2", incoming=f"unix:{tmp_path}/in"
    )
    thread.start()
    try:
        kernel = Kernel(machine)
        kernel.settings["zero-blocks"] = zero_blocks
        kernel.settings["max-bandwidth"] = 20 * MIB
        assert kernel.migrate(f"unix:{tmp_path}/in", blk=True).wait(PATIENCE).acknowledged
    finally:
        stop()
    target.wait_status("paused", "prelaunch")
    assert content(target_disk) == content(tmp_path / "app.img")
    target.kill()
    qemu(*guest_args(target_disk, log), version="7.2")
    wait_counting(log)


def test_a_copy_that_qemu_ends_early_is_not_taken_for_whole(qemu, tmp_path):
    """QEMU 7.2 counts a part of what is left only, and hands over in the middle of a fast copy."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(40 * MIB))
    source = qemu(
        *guest_args(disk, tmp_path / "log"),
        "-S",
        version="7.2",
        capabilities={"return_path": True},
    )
    halfway = Halfway(BlockDevice("drv0", tmp_path / "halfway.img", create=40 * MIB))
    incoming = halfway.receive(f"unix:{tmp_path}/in")
    source.qmp("migrate", uri=incoming.addresses[0], blk=True)
    try:
        incoming.wait(PATIENCE)
    except MigrationError as error:
        assert "the source sent only a part of disk 'drv0'" in str(error)
        assert "downtime-limit is 1" in str(error)
        source.wait_migration("failed")
        source.qmp("cont")
        source.wait_status("running")
        assert halfway.device.half_written
    else:  # it depends on how fast the link seems to be
        assert content(Path(halfway.device.image.name)) == content(disk)


def test_images_of_other_formats(tmp_path):
    """From one qcow2 to another, through the tool that QEMU has for that."""
    if shutil.which("qemu-storage-daemon") is None or not Path("/dev/fuse").exists():
        missing_peer("no qemu-storage-daemon, or no /dev/fuse; .ci/run installs all peers")
    machines = []
    for name in ("source", "target"):
        run("qemu-img", "create", "-f", "qcow2", tmp_path / f"{name}.qcow2", str(64 * MIB))
        machines.append(Machine("disks-1"))
        machines[-1].add(BlockDevice("drv0", QemuImage(tmp_path / f"{name}.qcow2")))
    here, there = (machine.parts(BlockDevice)[0] for machine in machines)
    try:
        here.pwrite(os.urandom(2 * MIB), 30 * MIB)
        here.pwrite(b"discarded", 5 * MIB)
        here.discard(5 * MIB, MIB)
        incoming = Kernel(machines[1]).incoming(f"unix:{tmp_path}/in")
        kernel = Kernel(machines[0])
        assert kernel.migrate(incoming.addresses[0], blk=True).wait(PATIENCE).acknowledged
        incoming.wait(PATIENCE)
        assert kernel.query()["disk"]["transferred"] < 4 * MIB, "holes were sent"
        assert there.pread(64 * MIB, 0) == here.pread(64 * MIB, 0)
        with pytest.raises(OSError, match="lock"):
            QemuImage(tmp_path / "source.qcow2")
    finally:
        here.close()
        there.close()
    assert content(tmp_path / "target.qcow2") == content(tmp_path / "source.qcow2")
    assert not (tmp_path / "target.qcow2.incoming").exists()
    with pytest.raises(OSError, match="does not exist"):
        QemuImage(tmp_path / "nothing.qcow2")
