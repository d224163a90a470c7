"""receive() and send() with peers of our own: what a whimbrel source and destination see of them."""

import os
import queue
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from whimbrel import (
    InStream,
    Kernel,
    Machine,
    MigrationError,
    OutStream,
    PeerError,
    Plugins,
    RunState,
    SaveVMHandler,
    SectionHeader,
)
from whimbrel_qemu import Progress, Received, load, receive, send
from whimbrel_ram import RAMBlock

MIB = 1 << 20


class Counter(SaveVMHandler):
    """A device of eight bytes."""

    idstr = "counter"

    def __init__(self, ticks: int = 0) -> None:
        self.ticks = ticks

    def save(self, out: OutStream) -> None:
        out.u64(self.ticks)

    def load(self, inp: InStream, header: SectionHeader) -> None:
        self.ticks = inp.u64()


class App:
    """A machine of ours: two RAM blocks, perhaps a counter; it notes when it is stopped and started."""

    def __init__(self, ticks: int | None = 0, run_state: RunState = RunState.RUNNING) -> None:
        self.running = run_state is RunState.RUNNING
        self.machine = Machine(
            "app-1.0",
            uuid=bytes(range(16)),
            run_state=run_state,
            stop=lambda: setattr(self, "running", False),
            start=lambda: setattr(self, "running", True),
        )
        self.ram = [self.machine.add(RAMBlock(n, s)) for n, s in (("low", MIB), ("high", 4 * MIB))]
        self.counter = Counter(ticks or 0)
        if ticks is not None:
            self.machine.register(self.counter)
        self.kernel = Kernel(self.machine)

    def fill(self) -> None:
        """A page in three is random, the rest zero."""
        rng = random.Random(7)
        for block in self.ram:
            for page in range(0, block.size, 3 * 4096):
                block.memory[page : page + 4096] = rng.randbytes(4096)

    def content(self) -> list[bytes]:
        return [bytes(block.memory) for block in self.ram]


class Receiving:
    """receive() in a thread; `address` is where it listens."""

    def __init__(self, path: Path, uri: str = "tcp:127.0.0.1:0", **options: object) -> None:
        self._queue: queue.Queue[tuple[str, ...]] = queue.Queue()
        self.result: Received | None = None
        self.error: MigrationError | None = None

        def work() -> None:
            try:
                self.result = receive(uri, path, on_listening=self._queue.put, **options)  # type: ignore[arg-type]
            except MigrationError as error:
                self.error = error

        self.thread = threading.Thread(target=work)
        self.thread.start()
        self.address = self._queue.get(timeout=30)[0]

    def wait(self) -> Received:
        self.thread.join(30)
        assert self.error is None
        assert self.result is not None
        return self.result

    def wait_error(self) -> MigrationError:
        self.thread.join(30)
        assert self.error is not None
        return self.error


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:{folder}/m"])
@pytest.mark.parametrize("ticks", [41, None], ids=["device", "no-device"])
@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
def test_app_passes_through_a_file(
    tmp_path: Path, uri: str, ticks: int | None, return_path: bool
) -> None:
    """The source holds back the end until its PING is answered: without that, nothing would arrive."""
    source, target, file = App(ticks), App(None if ticks is None else 0), tmp_path / "app.mig"
    source.fill()
    source.kernel.settings["return-path"] = return_path
    receiving = Receiving(file, uri.format(folder=tmp_path))
    assert source.kernel.migrate(receiving.address).wait(30).acknowledged is return_path
    received = receiving.wait()
    assert not source.running
    assert (received.machine_type, received.run_state) == ("app-1.0", "running")
    assert received.ram_bytes == 5 * MIB
    assert received.acknowledged is return_path

    target.running = False
    incoming = target.kernel.incoming("tcp:127.0.0.1:0")
    assert send(file, incoming.addresses[0]).acknowledged
    incoming.wait(30)
    assert target.running
    assert target.content() == source.content()
    assert target.counter.ticks == source.counter.ticks


def test_paused_app_arrives_paused(tmp_path: Path) -> None:
    source, target, file = App(run_state=RunState.PAUSED), App(), tmp_path / "app.mig"
    receiving = Receiving(file)
    source.kernel.migrate(receiving.address).wait(30)
    assert receiving.wait().run_state == "paused"
    target.running = False
    incoming = target.kernel.incoming("tcp:127.0.0.1:0")
    send(file, incoming.addresses[0])
    incoming.wait(30)
    assert not target.running
    assert target.machine.run_state is RunState.PAUSED


def test_a_file_is_the_same_after_another_passage(tmp_path: Path) -> None:
    """Kept, sent, received and kept again: bit for bit."""
    source, first, second = App(5), tmp_path / "first.mig", tmp_path / "second.mig"
    source.fill()
    receiving = Receiving(first)
    source.kernel.migrate(receiving.address).wait(30)
    receiving.wait()
    receiving = Receiving(second)
    send(first, receiving.address)
    receiving.wait()
    one, two = load(first), load(second)
    assert one.configuration == two.configuration
    assert one.tail == two.tail
    assert [bytes(b.memory) for b in one.blocks] == [bytes(b.memory) for b in two.blocks]
    assert first.read_bytes() == second.read_bytes()


class DiskIsFull(Progress):
    """From the moment on that the file is written, no file of this process may grow beyond 1 MiB."""

    def begin(self, phase: str, *args: object) -> None:
        super().begin(phase, *args)  # type: ignore[arg-type]
        if phase == "writing":
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limit[1]))


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_size_limit")
def test_disk_full_after_the_source_has_committed(tmp_path: Path) -> None:
    """The answer to the PING came before the file was written: the refusal that follows lets the source run."""
    source, file = App(9), tmp_path / "app.mig"
    source.fill()
    receiving = Receiving(file, progress=DiskIsFull())
    run = source.kernel.migrate(receiving.address)
    assert "app.mig.partial" in str(receiving.wait_error())
    with pytest.raises(PeerError):
        run.wait(30)
    assert source.running
    assert list(tmp_path.iterdir()) == []


def test_source_that_stops_within_the_devices(tmp_path: Path) -> None:
    """Cut anywhere behind RAM: never a file, always an offset."""
    source, whole = App(3), tmp_path / "whole.mig"
    receiving = Receiving(whole)
    source.kernel.migrate(receiving.address).wait(30)
    receiving.wait()
    data = whole.read_bytes()
    tail = load(whole).tail
    assert tail is not None
    behind_ram = len(data) - len(tail.vmdescription) - 6 - len(tail.sections)
    for cut in range(behind_ram - 3, len(data), 7):
        part = tmp_path / "part"
        part.write_bytes(data[:cut])
        with pytest.raises(MigrationError) as caught:
            receive(f"exec:cat {part}", tmp_path / "never.mig")
        assert caught.value.offset is not None
    assert not (tmp_path / "never.mig").exists()


def test_flipped_bytes_are_named_errors_or_a_legal_stream(tmp_path: Path) -> None:
    """A flip in a page or in a payload cannot be seen; every other one is an error of ours, never a surprise."""
    source, whole = App(3), tmp_path / "whole.mig"
    receiving = Receiving(whole)
    source.kernel.migrate(receiving.address).wait(30)
    receiving.wait()
    data = whole.read_bytes()
    rng = random.Random(3)
    # Zero pages are 9 bytes here, so that most flips hit what stands between payloads.
    seen = {"error": 0, "legal": 0}
    for _ in range(400):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        part = tmp_path / "flipped"
        part.write_bytes(flipped)
        try:
            load(part)
            seen["legal"] += 1
        except MigrationError as error:
            seen["error"] += 1
            assert error.offset is not None or error.section is not None
    assert seen["error"] > 0 < seen["legal"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source, file = App(), tmp_path / "app.mig"
    receiving = Receiving(file)
    file.write_text("mine")
    run = source.kernel.migrate(receiving.address)
    assert "exists" in str(receiving.wait_error())
    with pytest.raises(PeerError):
        run.wait(30)
    assert source.running
    assert file.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["app.mig"]


def test_two_receivers_of_one_file(tmp_path: Path) -> None:
    """The .partial of the one is locked: the other is refused, and its source runs on."""
    import fcntl

    source, file = App(), tmp_path / "app.mig"
    partial = tmp_path / "app.mig.partial"
    with partial.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"being written")
        other.flush()
        receiving = Receiving(file)
        source.kernel.migrate(receiving.address)
        assert "another program" in str(receiving.wait_error())
        assert partial.read_bytes() == b"being written"


def test_kept_file_is_private(tmp_path: Path) -> None:
    """Memory of a machine is nobody else's to read."""
    source, file = App(), tmp_path / "app.mig"
    receiving = Receiving(file)
    source.kernel.migrate(receiving.address).wait(30)
    receiving.wait()
    assert os.stat(file).st_mode & 0o777 == 0o600


def test_scheme_that_nobody_provides_is_refused_before_anything_happens(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="carrier-pigeon"):
        receive("carrier-pigeon:home", tmp_path / "x", plugins=Plugins.shared())
