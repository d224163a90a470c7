"""An app that is a QEMU's machine: examples/microvm goes into real QEMUs, and comes back."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from whimbrel import Machine
from whimbrel_device import decode, encode
from whimbrel_qemu import load
from whimbrel_testing.peers import PATIENCE, QemuFactory
from whimbrel_testing.qemu_guest import check_count, last_number, wait_counting

from .passage import Passage

pytestmark = pytest.mark.interop

EXAMPLE = Path(__file__).parents[2] / "examples/microvm"
MACHINE = ("-machine", "microvm,pic=off,pit=off,rtc=off,acpi=off", "-cpu", "486", "-m", "1")
both = pytest.mark.parametrize("version", ["7.2", "10.0"])


def qemu_args(serial: Path) -> list[str]:
    return [*MACHINE, "-chardev", f"file,id=s,path={serial}", "-serial", "chardev:s"]


class App:
    """The example, as a user runs it."""

    def __init__(self, command: str, uri: str, serial: Path) -> None:
        with serial.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLE / "microvm.py"), command, uri],
                stdout=file,
                stderr=subprocess.PIPE,
                text=True,
            )

    def said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def ended(self) -> str:
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors
        return errors

    def close(self) -> None:
        self.process.kill()
        with contextlib.suppress(ValueError):  # its pipe was read to the end
            self.process.communicate()


@pytest.fixture
def app() -> Iterator[Callable[..., App]]:
    with contextlib.ExitStack() as running:

        def start(command: str, uri: str, serial: Path) -> App:
            return running.enter_context(contextlib.closing(App(command, uri, serial)))

        yield start


@both
@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
def test_it_counts_here_then_in_qemu_then_here(
    version: str, qemu: QemuFactory, app: Callable[..., App], tmp_path: Path, *, return_path: bool
) -> None:
    here, there, again = logs = [tmp_path / name for name in ("here", "there", "again")]
    peer = qemu(
        *qemu_args(there),
        version=version,
        incoming=f"unix:{tmp_path}/qemu",
        capabilities={"return_path": return_path},
    )
    leaving = app("go", f"unix:{tmp_path}/qemu", here)
    assert leaving.ended().startswith("postmigrate at 0x7c")
    peer.wait_status("running")
    wait_counting(here, there, beyond=last_number(here))

    arriving = app("wait", f"unix:{tmp_path}/back", again)
    address = arriving.said().removeprefix("waiting at ").strip()
    peer.migrate(address)
    peer.wait_migration("completed")
    assert arriving.said().startswith("running at 0x7c")
    reached = last_number(here, there)
    wait_counting(*logs, beyond=reached)
    arriving.close()
    assert check_count(*logs) > reached > check_count(here) > 0
    assert peer.status() == "postmigrate"


def test_qemu_refuses_it_and_it_runs_on(
    qemu: QemuFactory, app: Callable[..., App], tmp_path: Path
) -> None:
    """That QEMU has no serial port: the machine stays here, and has lost nothing."""
    peer = qemu(*MACHINE, incoming=f"unix:{tmp_path}/qemu")
    log = tmp_path / "log"
    staying = app("go", f"unix:{tmp_path}/qemu", log)
    reason = staying.said()
    while not (line := staying.said()).startswith("running at 0x7c"):
        reason += line
    assert "migration to unix:" in reason
    wait_counting(log, beyond=last_number(log))
    staying.close()
    check_count(log)
    assert peer.wait_exit() == 1
    assert "serial" in peer.stderr


# ---- its devices are those of QEMU


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("microvm", EXAMPLE / "microvm.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("devices", None)


@both
@pytest.mark.parametrize("running", [True, False], ids=["running", "reset"])
def test_every_section_of_qemu_is_described_by_hand(
    version: str, passage: Passage, example: ModuleType, app: Callable[..., App], *, running: bool
) -> None:
    """Each payload decoded and encoded is the same bytes; so is the text that QEMU describes it with."""
    serial = passage.folder / "log"
    if running:
        peer = passage.qemu(
            *qemu_args(serial), version=version, incoming=f"unix:{passage.folder}/qemu"
        )
        app("go", f"unix:{passage.folder}/qemu", passage.folder / "here").ended()
        wait_counting(passage.folder / "here", serial)
    else:
        peer = passage.qemu(*qemu_args(serial), "-S", version=version)
    passage.receive(peer)
    guest = load(passage.file)
    assert guest.tail is not None
    assert guest.tail.vmdescription is not None
    described = json.loads(guest.tail.vmdescription)["devices"]
    machine: Machine = example.MicroVM().machine
    assert {(b.idstr, b.size) for b in guest.blocks} == {
        ("microvm.ram", 1 << 20),
        ("pc.bios", 1 << 16),
    }
    parts = {type(part).__name__.lower(): part for part in machine.all_parts}
    for section, text in zip(guest.tail.split(), described, strict=True):
        name = section.device.name
        if name == "globalstate":
            continue
        part = parts[name.replace("_", "")]
        decode(part, section.payload, version=section.version_id)
        payload, members = encode(part)
        assert payload == section.payload, name
        del text["name"], text["instance_id"]
        assert json.dumps(members) == json.dumps(text)
