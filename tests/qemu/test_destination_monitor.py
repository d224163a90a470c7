"""The monitor of the destination: asked before something is sent, and after it was refused."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from whimbrel import ChannelError, LocalError
from whimbrel_qemu import Refused, send
from whimbrel_testing.peers import Qemu, QemuFactory

pytestmark = pytest.mark.interop

MACHINE = ("-machine", "pc-i440fx-7.2", "-m", "16M", "-S")
RNG = ("-device", "virtio-rng-pci,addr=6")
VERSIONS = pytest.mark.parametrize("version", ["7.2", "10.0"])


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def start(qemu: QemuFactory, qmp: Path) -> Callable[..., Qemu]:
    """A QEMU with a second monitor, at `qmp`."""

    def run(version: str, *args: str, incoming: str | None = None) -> Qemu:
        more = ("-qmp", f"unix:{qmp},server=on,wait=off")
        return qemu(*args, *more, version=version, incoming=incoming)

    return run


@VERSIONS
def test_destination_is_told_to_listen_and_says_what_it_can(
    start: Callable[..., Qemu], keep: Callable[..., Path], tmp_path: Path, qmp: Path, version: str
) -> None:
    file, uri = keep("7.2", (*MACHINE, *RNG)), f"unix:{tmp_path}/in"
    target = start(version, *MACHINE, "-incoming", "defer")
    with pytest.raises(Refused) as caught:
        send(file, uri, monitor=str(qmp))
    error = caught.value
    assert error.section == "0000:00:06.0/virtio-rng"
    if version == "7.2":  # it knows no way to outlive this
        assert target.wait_exit() == 1
        assert error.words == ()
        return
    assert target.status() == "inmigrate"
    assert error.words == (target.migration()["error-desc"],)
    with pytest.raises(LocalError, match="refused a migration already"):
        send(file, uri, monitor=str(qmp))


@VERSIONS
def test_guest_that_fits_is_taken(
    start: Callable[..., Qemu], keep: Callable[..., Path], tmp_path: Path, qmp: Path, version: str
) -> None:
    """Over TCP, at a port that the destination hears of by its monitor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"tcp:127.0.0.1:{free.getsockname()[1]}"
    target = start(version, *MACHINE, "-incoming", "defer")
    assert send(keep("7.2", MACHINE), uri, monitor=f"unix:{qmp}").acknowledged
    target.wait_migration("completed")


def test_destination_that_listens_already_is_left_as_it_is(
    start: Callable[..., Qemu], keep: Callable[..., Path], tmp_path: Path, qmp: Path
) -> None:
    target = start("10.0", *MACHINE, incoming=f"unix:{tmp_path}/in")
    assert send(keep("7.2", MACHINE), f"unix:{tmp_path}/in", monitor=str(qmp)).acknowledged
    target.wait_migration("completed")


@VERSIONS
def test_other_machine_type_is_refused_before_the_destination_can(
    start: Callable[..., Qemu], keep: Callable[..., Path], tmp_path: Path, qmp: Path, version: str
) -> None:
    target = start(
        version, "-machine", "pc-i440fx-7.1", "-m", "16M", incoming=f"unix:{tmp_path}/in"
    )
    with pytest.raises(LocalError) as caught:
        send(keep("7.2", MACHINE), f"unix:{tmp_path}/in", monitor=str(qmp))
    error = caught.value
    assert (error.section, error.found, error.expected) == (
        "configuration",
        "pc-i440fx-7.2",
        "pc-i440fx-7.1",
    )
    assert "-machine pc-i440fx-7.2" in str(error)
    assert target.status() == "inmigrate"


def test_running_machine_is_no_destination(
    start: Callable[..., Qemu], keep: Callable[..., Path], tmp_path: Path, qmp: Path
) -> None:
    start("7.2", "-machine", "pc-i440fx-7.2", "-m", "16M").wait_status("running")
    with pytest.raises(LocalError, match="'running', and waits for no migration"):
        send(keep("7.2", MACHINE), f"unix:{tmp_path}/in", monitor=str(qmp))


@pytest.mark.parametrize("address", ["{}/nobody", "unix:{}/nobody", "127.0.0.1:1", "tcp:[::1]:1"])
def test_nobody_at_the_monitor(keep: Callable[..., Path], tmp_path: Path, address: str) -> None:
    file = keep("7.2", MACHINE)
    with pytest.raises(ChannelError, match="no QEMU answers at the monitor"):
        send(file, f"unix:{tmp_path}/in", monitor=address.format(tmp_path))


def test_somebody_else_at_the_monitor(keep: Callable[..., Path], tmp_path: Path) -> None:
    """Who accepts, says nothing of the kind and hangs up."""
    file = keep("7.2", MACHINE)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()

        def serve() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b'{"no": "greeting"}\r\n')

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ChannelError, match="no QEMU answers at the monitor"):
            send(file, f"unix:{tmp_path}/in", monitor=str(tmp_path / "other"))
        thread.join()
