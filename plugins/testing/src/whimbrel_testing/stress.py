"""The StressMachine: an embedding app's machine that keeps writing, and can prove that nothing was lost or run twice.

    config = StressConfig(ram=256 << 20, rate=100e6)
    stress = StressMachine(config, log="/dev/shm/serial.log", lease=Lease("/dev/shm/lease", "source"))
    stress.boot(); stress.machine.vm_start()
    Kernel(stress.machine).migrate("tcp:host:4444").wait()

The destination makes one from the same config and does not boot it. After the migration `stress.verify()` there replays
every write since the boot and says what differs. Both sides on one host share the log, the lease and CLOCK_MONOTONIC.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import attrs
import numpy as np

from whimbrel import Machine, RunState
from whimbrel_device import buffer, device, u64
from whimbrel_ram import RAMBlock
from whimbrel_testing.disk import StressDisk
from whimbrel_testing.lease import Lease
from whimbrel_testing.proof import (
    Line,
    Proof,
    add_line,
    check_log,
    check_ram,
    read_lines,
    replay,
    told,
)
from whimbrel_testing.sequence import (
    BATCH,
    BATCH_BYTES,
    PAGE,
    U64,
    WORDS,
    Chain,
    Region,
    Sequence,
    check_sums,
)

MIB = 1 << 20
#: Most seconds of its rate that a machine that was held up makes good for.
_CREDIT = 0.05


def _whole_batches(size: float) -> int:
    """Bytes as pages, rounded down to whole batches."""
    return int(size) // BATCH_BYTES * BATCH


@attrs.frozen(kw_only=True)
class StressConfig:
    """What both sides must agree on, and how hard the machine works."""

    #: Bytes of the large and of the small block: whole batches of 256 KiB.
    ram: int = 64 * MIB
    small: int = 1 * MIB
    #: Share of the large block that is filled at boot, and that writes go to.
    filled: float = 1.0
    hot: float = 1.0
    #: Bytes of pages written per second.
    rate: float = 50e6
    seed: int = 1
    #: Seconds between two ticks, and ticks between two lines on the serial port.
    tick: float = 0.001
    line_every: int = 10
    #: Bytes of its disk (0: it has none), of the part of it that writes go to, and written to it per second.
    disk: int = 0
    disk_hot: int = 1 * MIB
    disk_rate: float = 2e6

    def __attrs_post_init__(self) -> None:
        sizes = [("ram", self.ram), ("small", self.small)]
        if self.disk:
            sizes += [("disk", self.disk), ("disk_hot", self.disk_hot)]
        for name, size in sizes:
            if size <= 0 or size % BATCH_BYTES:
                raise ValueError(f"{name} of {size} bytes is not a multiple of {BATCH_BYTES}")

    def sequence(self) -> Sequence:
        large, small = self.ram // PAGE, self.small // PAGE
        hot = max(BATCH, _whole_batches(self.ram * self.hot))
        regions = (Region(0, large, hot), Region(large, small, small))
        return Sequence(self.seed, regions, _whole_batches(self.ram * self.filled))


@device("stress-clock", version_id=1)
class Clock:
    """Ticks, and when the last one was: CLOCK_MONOTONIC of the host, in nanoseconds."""

    ticks: int = u64()
    last_ns: int = u64()
    #: The longest time between two ticks while it ran, and the one across the last start.
    longest_ns: int = u64()
    felt_ns: int = u64()


@device("stress-counter", version_id=1)
class Counter:
    """Counts ticks once more, by itself."""

    value: int = u64()


@device("stress-serial", version_id=1)
class Serial:
    """What the machine remembers of its serial port."""

    lines: int = u64()
    digest: bytes = buffer(Chain.SIZE)


@device("stress-work", version_id=1)
class Work:
    """How far the work is, and the hash chain over it."""

    seed: int = u64()
    batches: int = u64()
    chain: bytes = buffer(Chain.SIZE)


class StressMachine:
    """RAM, four devices, a disk perhaps, and a thread that works on them. `machine` is what a Kernel takes."""

    def __init__(
        self,
        config: StressConfig,
        *,
        log: str | Path | None = None,
        lease: Lease | None = None,
        fence: bool = False,
        run_state: RunState = RunState.PRELAUNCH,
        disk: str | Path | None = None,
    ) -> None:
        """disk: path of its image, which is made where it is not there; needed when the config has one."""
        self.config = config
        self.lease = lease
        self.log = None if log is None else Path(log)
        self.machine = Machine(
            "whimbrel-stress-1",
            run_state=run_state,
            stop=self.stop,
            start=self.start,
            throttle=self.throttle,
            fence=lease.fence if lease is not None and fence else None,
        )
        self.sequence = config.sequence()
        self.blocks = (
            self.machine.add(RAMBlock("stress.ram", config.ram)),
            self.machine.add(RAMBlock("stress.small", config.small)),
        )
        self.views = tuple(_words(block) for block in self.blocks)
        self.clock = self.machine.add(Clock())
        self.counter = self.machine.add(Counter())
        self.serial = self.machine.add(Serial(digest=bytes(Chain.SIZE)))
        self.work = self.machine.add(Work(seed=config.seed, chain=bytes(Chain.SIZE)))
        self.disk: StressDisk | None = None
        if config.disk:
            if disk is None:
                raise ValueError("a machine with a disk needs a path for its image")
            self.disk = StressDisk(disk, size=config.disk, hot=config.disk_hot, seed=config.seed)
            self.machine.add(self.disk.device)
            self.machine.add(self.disk.work)
        #: What ended the work of the machine's thread, if something did.
        self.fault: BaseException | None = None
        self._new: U64 = np.empty((BATCH, WORDS), dtype=np.uint64)
        self._old: U64 = np.empty((BATCH, WORDS), dtype=np.uint64)
        self._rate = config.rate
        self._thread: threading.Thread | None = None
        self._control = threading.RLock()
        self._halt = False
        self._ticked = threading.Event()
        self._serial_fd = -1

    # ---- running

    def boot(self) -> None:
        """Fill the RAM: the first writes, as fast as they go. For the side on which the machine begins."""
        for _ in range(self.sequence.filled // BATCH):
            self._write_batch()
        if self.disk is not None:
            self.disk.boot()

    def start(self) -> None:
        """The machine runs when this returns. Raises LeaseViolation if another copy runs."""
        with self._control:
            if self._thread is not None:
                return
            if self.lease is not None:
                self.lease.acquire(self.machine.generation)
            self._go()

    def stop(self) -> None:
        """The machine stands still when this returns: its thread has ended, nothing of it writes any more."""
        with self._control:
            self._still()
            if self.lease is not None:
                self.lease.release()

    def throttle(self, percent: int) -> None:
        """Rest that much of the time: write that much less."""
        self._rate = self.config.rate * (100 - percent) / 100

    def wait_for_tick(self, timeout: float) -> bool:
        """Whether the machine ticked since it was started, waiting for it up to timeout seconds."""
        return self._ticked.wait(timeout)

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    @property
    def felt_downtime(self) -> float:
        """Seconds from the last tick before the last start to the first one behind it, as the machine itself saw it."""
        return self.clock.felt_ns / 1e9

    @property
    def writes(self) -> int:
        return self.work.batches * BATCH

    @property
    def disk_writes(self) -> int:
        return 0 if self.disk is None else self.disk.work.batches * BATCH

    def _go(self) -> None:
        if self.log is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._serial_fd = os.open(self.log, flags, mode=0o600)
        self._halt = False
        self._ticked.clear()
        self._thread = threading.Thread(target=self._run, name="stress machine", daemon=True)
        self._thread.start()

    def _still(self) -> None:
        if self._thread is not None:
            self._halt = True
            self._thread.join()
            self._thread = None
            if self._serial_fd >= 0:
                os.close(self._serial_fd)
                self._serial_fd = -1

    # ---- the work, on the machine's own thread

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # told by verify(): the thread has nobody to raise it to
            self.fault = error

    def _work(self) -> None:
        """Tick at absolute times, and write what is due by the clock. numpy drops the GIL in the large operations, and
        the thread sleeps between ticks, so that a migration in the same process gets its share.
        """
        tick = self.config.tick
        before = next_tick = time.monotonic()
        due = disk_due = 0.0  # bytes
        while not self._halt:
            now = time.monotonic()
            if now < next_tick:
                time.sleep(next_tick - now)
                continue
            self._tick()
            next_tick = max(next_tick + tick, now - _CREDIT)
            due = min(due + (now - before) * self._rate, max(BATCH_BYTES, _CREDIT * self._rate))
            if self.disk is not None:
                disk_due = min(disk_due + (now - before) * self.config.disk_rate, BATCH_BYTES)
                if disk_due >= BATCH_BYTES:
                    disk_due = 0.0
                    self.disk.write_batch()
            before = now
            while due >= BATCH_BYTES and not self._halt:
                self._write_batch()
                due -= BATCH_BYTES
                if time.monotonic() >= next_tick:
                    break

    def _tick(self) -> None:
        clock = self.clock
        now = time.monotonic_ns()
        gap = now - clock.last_ns if clock.last_ns else 0
        if not self._ticked.is_set():
            clock.felt_ns = gap
        else:
            clock.longest_ns = max(clock.longest_ns, gap)
        clock.last_ns = now
        clock.ticks += 1
        self.counter.value += 1
        if clock.ticks % self.config.line_every == 0:
            self._say(now)
        self._ticked.set()

    def _say(self, now: int) -> None:
        work = self.work
        chain = work.chain.hex()[: Line.CHAIN_DIGITS]
        line = Line(self.serial.lines, now, work.batches, chain, os.getpid()).encode()
        if self._serial_fd >= 0:
            os.write(self._serial_fd, line)
        self.serial.digest = add_line(self.serial.digest, line)
        self.serial.lines += 1

    def _write_batch(self) -> None:
        """The next batch: what its pages hold goes into the chain, then they are overwritten."""
        sequence, work = self.sequence, self.work
        batch = work.batches
        view = self.views[sequence.region_of(batch)]
        pages = sequence.pages_of(batch)
        np.take(view, pages, axis=0, out=self._old, mode="clip")  # clip: no copy for bounds
        old_sums = check_sums(self._old)
        view[pages] = sequence.contents(sequence.numbers(batch), self._new)
        chain = Chain(work.chain)
        work.chain = chain.add(batch, pages, old_sums)
        work.batches = batch + 1

    # ---- the proof

    def verify(self) -> Proof:
        """Replay everything and compare. The machine stands still meanwhile, and goes on after it if it ran."""
        with self._control:
            ran = self._thread is not None
            self._still()
            try:
                return self._prove()
            finally:
                if ran:
                    self._go()

    def _prove(self) -> Proof:
        faults = []
        if self.fault is not None:
            faults.append(f"the machine's own thread failed: {self.fault!r}")
        if self.work.seed != self.config.seed:
            faults.append(f"the machine has seed {self.work.seed}, not {self.config.seed}")
        if self.clock.ticks != self.counter.value:
            faults.append(
                f"the clock ticked {self.clock.ticks} times, the counter counted {self.counter.value}"
            )
        text = b"" if self.log is None or not self.log.exists() else self.log.read_bytes()
        lines, damaged = read_lines(text)
        expected = replay(self.sequence, self.work.batches, (line.batches for line in lines))
        faults += damaged
        if expected.chain != self.work.chain:
            faults.append(
                f"the hash chain after write #{self.writes:,} is not that of this sequence"
            )
        if self.log is not None:
            faults += check_log(lines, text, self.serial.digest, self.serial.lines, expected)
        names = [(b.idstr, v) for b, v in zip(self.blocks, self.views, strict=True)]
        faults += check_ram(self.sequence, names, expected)
        if self.disk is not None:
            faults += self.disk.faults()
        return Proof(
            writes=self.writes,
            pages=self.sequence.pages,
            disk_writes=self.disk_writes,
            lines=self.serial.lines,
            faults=told(faults),
        )


def _words(block: RAMBlock) -> U64:
    """The RAM of a block as pages of words."""
    return block.view.view(np.uint64).reshape(-1, WORDS)
