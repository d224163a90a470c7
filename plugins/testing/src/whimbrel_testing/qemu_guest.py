"""Guests for a real QEMU: one that counts and dirties memory, one with known RAM that never runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import attrs

from whimbrel_testing.guest import counter
from whimbrel_testing.guest.rom import rom
from whimbrel_testing.peers import wait_until

#: A versioned machine type, so that a newer QEMU is the same machine.
MACHINE = "pc-i440fx-7.2"
_FLOPPY = 1_474_560
MIB = 1 << 20
#: What SeaBIOS keeps at the end of RAM is below 1 MiB; q35 has 16 MiB of SMRAM behind it where there is more RAM than this.
_KEPT_MIB, _SMALL_MIB, _KEPT_BELOW_SMRAM_MIB = 1, 32, 17


@attrs.frozen(kw_only=True)
class CountingGuest:
    """A boot sector that writes 1, 2, 3, ... to the serial port, one line each tick; see guest.counter.

    It runs on every machine of the PC's kind, with a processor from the 80386 on.
    """

    image: Path  #: a floppy disk
    rom: Path  #: for machines that have no BIOS which reads one
    memory_mib: int = 16

    def args(self, serial: Path, machine: str = MACHINE) -> list[str]:
        """QEMU's arguments; what the guest writes goes to the file `serial`."""
        if machine == "microvm":
            machine += ",pic=on,pit=on"
            boot = ("-bios", str(self.rom))
        else:
            boot = ("-drive", f"if=floppy,format=raw,readonly=on,file={self.image}")
        return [
            *("-machine", machine, "-m", f"{self.memory_mib}M"),
            *boot,
            *("-chardev", f"file,id=serial,path={serial}", "-serial", "chardev:serial"),
        ]


def counting_guest(
    folder: Path,
    *,
    memory_mib: int = 16,
    pages: int = 1024,
    pages_per_tick: int = 64,
    hz: int = 500,
) -> CountingGuest:
    """Its images go to folder. It dirties pages_per_tick * hz pages a second of a ring of `pages`.

    Raises ValueError for a ring that reaches into what firmware keeps at the end of RAM: the guest would take it for a
    page that was lost.
    """
    kept = _KEPT_MIB if memory_mib <= _SMALL_MIB else _KEPT_BELOW_SMRAM_MIB
    if counter.RING + pages * counter.PAGE > (memory_mib - kept) * MIB:
        raise ValueError(f"{pages} pages reach into the last {kept} of {memory_mib} MiB")
    sector = counter.boot_sector(pages=pages, pages_per_tick=pages_per_tick, hz=hz)
    guest = CountingGuest(
        image=folder / "counter.img", rom=folder / "counter.rom", memory_mib=memory_mib
    )
    guest.image.write_bytes(sector.ljust(_FLOPPY, b"\0"))
    guest.rom.write_bytes(rom(sector))
    return guest


def last_number(*logs: Path) -> int:
    """The last whole number in the joined logs; 0 before the first."""
    lines = b"".join(log.read_bytes() for log in logs if log.exists()).split(b"\n")
    return int(lines[-2]) if len(lines) > 1 else 0


def wait_counting(*logs: Path, beyond: int = 0, what: str = "counting") -> int:
    """Wait until the joined logs go beyond that number, and 100 further."""
    return wait_until(
        lambda: n if (n := last_number(*logs)) > beyond + 100 else 0, f"{what} beyond {beyond}"
    )


def check_count(*logs: Path) -> int:
    """The joined logs must be 1, 2, 3, ...: nothing missing, repeated or torn. Returns the last whole number.

    Raises AssertionError that names the first line that is wrong.
    """
    joined = b"".join(log.read_bytes() for log in logs)
    assert counter.BAD.encode() not in joined, "the guest found a page that is not what it wrote"
    *lines, _unfinished = joined.split(b"\n")
    for expected, line in enumerate(lines, start=1):
        assert line == b"%08d" % expected, f"expected {expected:08}, found {line!r}"
    return len(lines)


@attrs.frozen
class FilledGuest:
    """RAM that was filled before the start, in a file that QEMU maps shared; the guest never runs (-S)."""

    size: int = 64 * MIB
    #: So much of it is filled, from its beginning; the rest is zero, and takes no room on the disk.
    filled: int = 64 * MIB

    def args(self, ram: Path, machine: str = MACHINE) -> list[str]:
        """QEMU's arguments, with the file `ram` as its memory; a missing file is made, all zero."""
        if not ram.exists():
            with ram.open("wb") as file:
                file.truncate(self.size)
        backend = f"memory-backend-file,id=ram,size={self.size},mem-path={ram},share=on"
        return [
            *("-object", backend, "-machine", f"{machine},memory-backend=ram"),
            *("-m", str(self.size // MIB), "-S"),
        ]

    def fill(self, ram: Path, seed: int = 1) -> None:
        """Pages of every kind in an irregular order: random, zero, one byte repeated, zero but for the last byte."""
        with ram.open("wb") as file:
            for page in self._pages(random.Random(seed)):
                file.write(page)
            file.truncate(self.size)

    def _pages(self, rng: random.Random) -> Iterator[bytes]:
        left = min(self.size, self.filled) // counter.PAGE
        while left:
            run = min(left, rng.randrange(1, 40))
            left -= run
            kind = rng.randrange(5)
            if kind == 0:
                yield bytes(run * counter.PAGE)
            elif kind == 1:
                yield bytes((rng.randrange(1, 256),)) * (run * counter.PAGE)
            elif kind == 2:
                yield (bytes(counter.PAGE - 1) + b"\x01") * run
            else:
                yield rng.randbytes(run * counter.PAGE)
