"""Whatever goes wrong: no file that is not whole, and the source's machine runs on."""

import contextlib
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel import Kernel, LocalError, Machine, MigrationError, StreamError
from whimbrel_qemu import load
from whimbrel_ram import RAMBlock
from whimbrel_testing.peers import PATIENCE, Qemu, QemuFactory, wait_until
from whimbrel_testing.qemu_guest import (
    MIB,
    CountingGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

pytestmark = pytest.mark.interop

Migctl = Any
Start = Callable[..., Migctl]
#: So slow that the guest's ring is never through: whatever happens, happens in the middle.
SLOW = {"max_bandwidth": 4 * MIB}
RETURN_PATH = pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])


@pytest.fixture
def guest(tmp_path: Path) -> CountingGuest:
    return counting_guest(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "source.log"


@pytest.fixture
def source(qemu: QemuFactory, guest: CountingGuest, log: Path) -> Qemu:
    source = qemu(*guest.args(log))
    wait_counting(log)
    return source


def in_the_middle(source: Qemu) -> None:
    """Wait until part of RAM has gone."""

    def some() -> bool:
        answer = source.migration()
        return answer["status"] == "active" and answer["ram"]["transferred"] > MIB

    wait_until(some, "a migration in the middle of RAM")


def counts_on(source: Qemu, log: Path) -> None:
    """The source's machine runs, and has lost nothing."""
    source.wait_status("running")
    wait_counting(log, beyond=last_number(log))
    source.qmp("stop")
    check_count(log)


def nothing_kept(file: Path) -> bool:
    return not [p for p in file.parent.iterdir() if p.name.startswith(file.name)]


@RETURN_PATH
def test_receiver_killed_in_the_middle(
    source: Qemu, log: Path, migctl: Start, tmp_path: Path, return_path: bool
) -> None:
    file = tmp_path / "guest.mig"
    source.capabilities(return_path=return_path)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address(), **SLOW)
    in_the_middle(source)
    receiver.process.send_signal(signal.SIGKILL)
    source.wait_migration("failed")
    assert not file.exists()
    counts_on(source, log)
    again = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(again.address(), max_bandwidth=0)
    again.succeeded("received")
    assert list(tmp_path.glob(f"{file.name}*")) == [file]  # what it had left was in nobody's way


#: A receive that is killed when everything has arrived and the first byte of the file is about to be written.
KILLED_AT_THE_END = """
import os, signal, sys
from whimbrel_qemu import Progress, receive
class Killed(Progress):
    def begin(self, phase, *args):
        super().begin(phase, *args)
        if phase == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
receive(sys.argv[1], sys.argv[2], progress=Killed(), on_listening=lambda a: print(*a, flush=True))
"""


def test_receiver_killed_when_all_has_arrived(source: Qemu, log: Path, tmp_path: Path) -> None:
    """The source's machine stands still by then, and waits for the answer that never comes."""
    file = tmp_path / "guest.mig"
    source.capabilities(return_path=True)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_AT_THE_END, f"unix:{tmp_path}/m", str(file)],
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        assert receiver.stdout is not None
        source.migrate(receiver.stdout.readline().strip())
        assert receiver.wait(PATIENCE) == -signal.SIGKILL
    source.wait_migration("failed")
    assert not file.exists()
    with pytest.raises(MigrationError):
        load(tmp_path / "guest.mig.partial")
    if source.status() != "running":
        source.qmp("cont")
    counts_on(source, log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_receiver_interrupted_in_the_middle(
    source: Qemu, log: Path, migctl: Start, tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "guest.mig"
    receiver = migctl("receive", f"unix:{tmp_path}/m", file)
    source.migrate(receiver.address(), **SLOW)
    in_the_middle(source)
    receiver.process.send_signal(number)
    assert "interrupted" in receiver.failed(130)
    source.wait_migration("failed")
    assert nothing_kept(file)
    counts_on(source, log)


def test_receiver_interrupted_before_a_source_came(migctl: Start, tmp_path: Path) -> None:
    path = tmp_path / "m"
    receiver = migctl("receive", f"unix:{path}", tmp_path / "guest.mig")
    receiver.address()
    receiver.process.send_signal(signal.SIGINT)
    assert "interrupted" in receiver.failed(130)
    assert not path.exists()


@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_source_gone_in_the_middle(
    source: Qemu, log: Path, migctl: Start, tmp_path: Path, how: str
) -> None:
    file = tmp_path / "guest.mig"
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address(), **SLOW)
    in_the_middle(source)
    if how == "killed":
        source.kill()
    else:
        source.qmp("migrate_cancel")
    message = receiver.failed()
    assert "ended early" in message
    assert "byte offset" in message
    assert nothing_kept(file)
    if how == "cancelled":
        counts_on(source, log)


def has_all_blocks(pid: int) -> bool:
    """RAM blocks are memfds, made in the order in which the source lists them: the last of them is there."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "rsdp" in str(fd.readlink()):
                return True
    return False


@RETURN_PATH
def test_disk_full(
    source: Qemu, log: Path, migctl: Start, tmp_path: Path, return_path: bool
) -> None:
    """With a return path the source is told and runs on; without one it cannot be told, but the message says what to do."""
    file = tmp_path / "guest.mig"
    source.capabilities(return_path=return_path)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address(), **SLOW)
    wait_until(lambda: has_all_blocks(receiver.process.pid), "RAM blocks of the receiver")
    # No file of that process grows beyond 1 MiB from now on.
    resource.prlimit(receiver.process.pid, resource.RLIMIT_FSIZE, (MIB, MIB))
    source.qmp("migrate-set-parameters", max_bandwidth=0)
    message = receiver.failed()
    assert "guest.mig.partial" in message
    assert "File too large" in message
    assert nothing_kept(file)
    if return_path:
        source.wait_migration("failed")
    else:
        source.wait_migration("completed")
        assert "'cont'" in message
    if source.status() != "running":
        source.qmp("cont")
    counts_on(source, log)


def test_a_file_that_exists_is_not_replaced(migctl: Start, tmp_path: Path) -> None:
    file = tmp_path / "guest.mig"
    file.write_text("another guest")
    message = migctl("receive", "tcp:127.0.0.1:0", file).failed()
    assert "exists" in message
    assert "--force" in message
    assert file.read_text() == "another guest"


def test_force_replaces_it(source: Qemu, migctl: Start, tmp_path: Path) -> None:
    file = tmp_path / "guest.mig"
    file.write_text("another guest")
    (tmp_path / "guest.mig.partial").write_bytes(b"left by a receiver that was killed" * MIB)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file, "--force")
    source.migrate(receiver.address())
    receiver.succeeded("received")
    assert load(file).run_state == "running"
    assert not (tmp_path / "guest.mig.partial").exists()


@pytest.mark.parametrize(
    ("file", "reason"), [("no/such/guest.mig", "does not exist"), (".", "is a directory")]
)
def test_a_place_that_cannot_be_written_is_refused_at_once(
    migctl: Start, tmp_path: Path, file: str, reason: str
) -> None:
    assert reason in migctl("receive", "tcp:127.0.0.1:0", tmp_path / file).failed()


# ---- what the source sends


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("compress", "capability compress"),
        ("postcopy-ram", "POSTCOPY_ADVISE needs a capability"),
        ("x-ignore-shared", "capability x-ignore-shared"),
    ],
)
def test_what_needs_a_capability_is_refused_by_name(
    source: Qemu, log: Path, migctl: Start, capability: str, reason: str
) -> None:
    file = log.with_name("guest.mig")
    source.capabilities(return_path=True, **{capability: True})
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address(), max_bandwidth=32 * MIB, downtime_limit=1)
    assert reason in receiver.failed()
    source.wait_migration("failed")
    assert nothing_kept(file)
    counts_on(source, log)


@RETURN_PATH
def test_multifd_is_refused_by_name(
    source: Qemu, log: Path, migctl: Start, tmp_path: Path, return_path: bool
) -> None:
    """The stream looks complete, but pages went elsewhere."""
    file = tmp_path / "guest.mig"
    source.capabilities(multifd=True, return_path=return_path)
    receiver = migctl("receive", "tcp:127.0.0.1:0", file)
    source.migrate(receiver.address())
    assert "multifd" in receiver.failed()
    source.wait_migration("failed", "completed")
    assert nothing_kept(file)
    if source.status() != "running":
        source.qmp("cont")
    counts_on(source, log)


def test_second_connection_does_no_harm(source: Qemu, migctl: Start, tmp_path: Path) -> None:
    path = tmp_path / "m"
    receiver = migctl("receive", f"unix:{path}", tmp_path / "guest.mig")
    source.migrate(receiver.address(), **SLOW)
    in_the_middle(source)
    with socket.socket(socket.AF_UNIX) as curious:
        curious.connect(str(path))
        curious.sendall(b"GET / HTTP/1.1\r\n")
        source.qmp("migrate-set-parameters", max_bandwidth=0)
        out, errors = receiver.process.communicate(timeout=PATIENCE)
    assert receiver.process.returncode == 0
    assert '"received"' in out
    assert "second connection" in errors


def test_more_ram_than_allowed_is_refused(
    source: Qemu, log: Path, migctl: Start, tmp_path: Path
) -> None:
    receiver = migctl("receive", "tcp:127.0.0.1:0", tmp_path / "guest.mig", "--max-ram", "8MiB")
    source.migrate(receiver.address())
    assert "larger than this side accepts" in receiver.failed()
    source.wait_migration("failed")
    counts_on(source, log)


# ---- what the destination does


@pytest.fixture
def kept(source: Qemu, migctl: Start, tmp_path: Path) -> Path:
    file = tmp_path / "kept.mig"
    receiver = migctl("receive", f"unix:{tmp_path}/kept", file)
    source.migrate(receiver.address())
    receiver.succeeded("received")
    return file


def test_destination_that_is_another_machine_refuses(
    qemu: QemuFactory, kept: Path, migctl: Start, tmp_path: Path
) -> None:
    target = qemu("-machine", "q35", incoming=f"unix:{tmp_path}/in")
    sender = migctl("send", kept, f"unix:{tmp_path}/in")
    assert sender.event("refused")["section"] == "configuration"
    assert "destination" in sender.failed()
    assert target.wait_exit() == 1
    assert load(kept).run_state == "running"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_sender_gone_in_the_middle(
    qemu: QemuFactory, guest: CountingGuest, kept: Path, migctl: Start, number: int
) -> None:
    """The destination gives up; the file is as it was."""
    uri = f"unix:{kept.parent}/in"
    content = kept.read_bytes()
    target = qemu(*guest.args(kept.with_name("target.log")), incoming=uri)
    sender = migctl("send", kept, uri, "--bandwidth", "1M")
    wait_until(lambda: target.migration().get("status") == "active", "an active target")
    sender.process.send_signal(number)
    assert sender.process.wait(PATIENCE) == (-9 if number == signal.SIGKILL else 130)
    assert target.wait_exit() == 1
    assert kept.read_bytes() == content


def test_nobody_listens(kept: Path, migctl: Start, tmp_path: Path) -> None:
    assert "nobody" in migctl("send", kept, f"unix:{tmp_path}/nobody").failed()


def test_broken_file_is_refused_before_anybody_is_called(
    kept: Path, migctl: Start, tmp_path: Path
) -> None:
    whole = kept.read_bytes()
    broken = tmp_path / "broken.mig"
    broken.write_bytes(whole[: len(whole) // 2])
    message = migctl("send", broken, f"unix:{tmp_path}/nobody").failed()
    assert "section 'ram', byte offset" in message
    for content, reason in (
        (whole[:-1], "vmdescription"),
        (b"not a stream at all", "not a migration stream"),
        (b"", "ended early"),
    ):
        broken.write_bytes(content)
        with pytest.raises(MigrationError, match=reason):
            load(broken)
    with pytest.raises(LocalError, match="No such file"):
        load(tmp_path / "none")


# ---- the kernel itself, without this plugin's handlers


def kernel_that_misses(part: str, kept: Path) -> Kernel:
    """The machine of the kept guest: all of it but `part` and, in any case, its devices."""
    machine = Machine("pc-i440fx-7.2")
    for block in load(kept).blocks if part != "ram" else ():
        machine.add(RAMBlock(block.idstr, block.size))
    return Kernel(machine)


@pytest.mark.parametrize("missing", ["ram", "timer"])
def test_kernel_refuses_a_section_that_its_machine_lacks(
    qemu: QemuFactory, kept: Path, guest: CountingGuest, tmp_path: Path, missing: str
) -> None:
    log = tmp_path / "second.log"
    second = qemu(*guest.args(log), capabilities={"return_path": True})
    wait_counting(log)
    incoming = kernel_that_misses(missing, kept).incoming("tcp:127.0.0.1:0")
    second.migrate(incoming.addresses[0])
    with pytest.raises(StreamError, match=f"unknown section '{missing}'") as caught:
        incoming.wait(30)
    assert caught.value.section == missing
    assert caught.value.offset is not None
    second.wait_migration("failed")
    if second.status() != "running":
        second.qmp("cont")
    counts_on(second, log)
