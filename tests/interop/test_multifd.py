"""multifd with real QEMUs of both versions, as source and as destination: their RAM is then ours, byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel import Kernel, Machine, MigrationError
from whimbrel.savevm import SaveVMHandler, TailTaken
from whimbrel_qemu import receive
from whimbrel_ram import RAMBlock, RamHandler
from whimbrel_ram.plugin import _page_transport
from whimbrel_testing.peers import Qemu, QemuFactory
from whimbrel_testing.qemu_guest import MIB, FilledGuest

pytestmark = pytest.mark.interop
#: QEMU, and a machine type of its own: from 8.1 on, markers have records of their own; from 9.0 on, zero pages packets.
PEERS = [("7.2", "pc-i440fx-7.2"), ("10.0", "pc-i440fx-7.2"), ("10.0", "pc-i440fx-10.0")]
peers = pytest.mark.parametrize(("version", "machine_type"), PEERS)
methods = pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
CHANNELS = 3
UUID = "b1e5c1d0-6a50-4c4e-9d0c-3d2f6f0a7a11"


def prepared(machine: Machine, method: str, zero: str = "legacy") -> Kernel:
    kernel = Kernel(machine)
    kernel.settings.update(
        {
            "multifd": True,
            "multifd-channels": CHANNELS,
            "multifd-compression": method,
            "zero-page-detection": zero,
            "max-bandwidth": 0,
        }
    )
    return kernel


@peers
@methods
def test_a_qemu_takes_ours(
    qemu: QemuFactory, tmp_path: Path, version: str, machine_type: str, method: str
) -> None:
    guest = FilledGuest(size=16 * MIB)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    guest.fill(ours, seed=3)
    guest.fill(theirs, seed=4)
    machine = Machine(machine_type)
    block = machine.add(RAMBlock("ram", memory=bytearray(ours.read_bytes())))
    target = qemu(
        *guest.args(theirs, machine_type), "-incoming", "defer", version=version,
    )  # fmt: skip
    target.capabilities(multifd=True)
    target.qmp("migrate-set-parameters", multifd_channels=CHANNELS, multifd_compression=method)
    target.qmp("migrate-incoming", uri="tcp:127.0.0.1:0")
    address = target.qmp("query-migrate")["socket-address"][0]
    kernel = prepared(machine, method)
    result = kernel.migrate(f"tcp:127.0.0.1:{address['port']}").wait(60)
    assert result.acknowledged
    target.wait_migration("completed")
    target.kill()
    assert theirs.read_bytes() == bytes(block.buffer)


@methods
def test_zero_pages_in_packets_arrive(qemu: QemuFactory, tmp_path: Path, method: str) -> None:
    guest = FilledGuest(size=16 * MIB)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    guest.fill(ours, seed=3)
    machine = Machine("pc-i440fx-10.0")
    block = machine.add(RAMBlock("ram", memory=bytearray(ours.read_bytes())))
    target = qemu(*guest.args(theirs, "pc-i440fx-10.0"), "-incoming", "defer", version="10.0")
    target.capabilities(multifd=True)
    target.qmp("migrate-set-parameters", multifd_channels=CHANNELS, multifd_compression=method)
    target.qmp("migrate-incoming", uri=f"unix:{tmp_path}/m")
    kernel = prepared(machine, method, "multifd")
    kernel.migrate(f"unix:{tmp_path}/m").wait(60)
    assert kernel.query()["ram"]["duplicate"] > 100
    target.wait_migration("completed")
    target.kill()
    assert theirs.read_bytes() == bytes(block.buffer)


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


@peers
@methods
def test_we_take_a_qemu_s(
    qemu: QemuFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    version: str,
    machine_type: str,
    method: str,
) -> None:
    guest = FilledGuest(size=16 * MIB)
    theirs = tmp_path / "theirs"
    guest.fill(theirs, seed=5)
    machine = Machine(machine_type)
    kernel = prepared(machine, method)
    ram = RamHandler(
        (), adopt=256 * MIB, find_pages=lambda channel: _page_transport(kernel, channel)
    )
    machine.register(ram)
    # A foreign machine: its devices are left out, and with them the end of the stream.
    monkeypatch.setattr(
        "whimbrel.incoming.Incoming._unknown_section", lambda self, header, inp: Rest()
    )
    incoming = kernel.incoming("tcp:127.0.0.1:0", autostart=False)
    source = qemu(*guest.args(theirs, machine_type), version=version)
    source.capabilities(multifd=True)
    source.qmp("migrate-set-parameters", multifd_channels=CHANNELS, multifd_compression=method)
    source.migrate(incoming.addresses[0], max_bandwidth=1 << 40)
    figures = source.wait_migration("completed")["ram"]
    incoming.wait(60)
    assert figures["multifd-bytes"] > 0
    (block,) = [b for b in ram.blocks if b.idstr == "ram"]
    assert bytes(block.buffer) == theirs.read_bytes()


def switches(method: str) -> list[str]:
    """The same for migctl."""
    return [
        *("--set", "multifd=on", "--set", f"multifd-channels={CHANNELS}"),
        *("--set", f"multifd-compression={method}"),
    ]


def switch(peer: Qemu, method: str) -> None:
    peer.capabilities(multifd=True, return_path=True)
    peer.qmp("migrate-set-parameters", multifd_channels=CHANNELS, multifd_compression=method)


@peers
@methods
def test_a_guest_becomes_a_file_and_runs_on_over_several_channels(
    qemu: QemuFactory,
    migctl: Callable[..., Any],
    tmp_path: Path,
    *,
    version: str,
    machine_type: str,
    method: str,
) -> None:
    guest = FilledGuest(size=16 * MIB)
    before, after, file = tmp_path / "before", tmp_path / "after", tmp_path / "guest.mig"
    guest.fill(before, seed=6)
    source = qemu(*guest.args(before, machine_type), "-uuid", UUID, version=version)
    switch(source, method)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file, *switches(method))
    source.migrate(receiver.address(), max_bandwidth=1 << 40)
    received = receiver.succeeded("received")
    assert received["acknowledged"]
    assert source.wait_migration("completed")["ram"]["multifd-bytes"] > 0
    # Nothing in a stream says the UUID, which a QEMU compares with that of each channel: the target has none.
    target = qemu(*guest.args(after, machine_type), "-incoming", "defer", version=version)
    switch(target, method)
    target.qmp("migrate-incoming", uri=f"unix:{tmp_path}/in")
    sent = migctl("send", file, f"unix:{tmp_path}/in", *switches(method)).succeeded("sent")
    assert sent["acknowledged"]
    target.wait_migration("completed")
    target.kill()
    assert after.read_bytes() == before.read_bytes()


@pytest.mark.parametrize(
    ("here", "said"),
    [(CHANNELS - 1, "multifd channel"), (CHANNELS + 1, "3 of 4 multifd channels came")],
    ids=["fewer", "more"],
)
def test_another_number_of_channels_is_told_and_nothing_is_kept(
    qemu: QemuFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: int, said: str
) -> None:
    monkeypatch.setattr("whimbrel_ram.multifd.receiving.PATIENCE", 2.0)
    guest = FilledGuest(size=16 * MIB)
    guest.fill(tmp_path / "before", seed=7)
    source = qemu(*guest.args(tmp_path / "before"), version="10.0")
    switch(source, "none")
    settings = {"multifd": "on", "multifd-channels": here}
    with pytest.raises(MigrationError, match=said):
        receive(
            "tcp:127.0.0.1:0",
            tmp_path / "guest.mig",
            settings=settings,
            on_listening=lambda uris: source.migrate(uris[0], max_bandwidth=1 << 40),
        )
    source.wait_migration("failed")
    assert not list(tmp_path.glob("guest.mig*"))
