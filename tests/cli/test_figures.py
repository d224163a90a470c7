"""What migctl makes of the figures of a real QEMU: one that converges, one that does not, one that sends its disk too."""

import json

import pytest

from whimbrel_testing.qemu_guest import check_count, counting_guest, wait_counting

pytestmark = pytest.mark.interop
MIB = 1 << 20


@pytest.fixture
def migrate(qemu, site, tmp_path):
    """Start a pair of guests, migrate by migctl --json, and return its exit status and its events."""

    def run(guest, bandwidth, *args, downtime=300, version="10.0", disks=None, **capabilities):
        logs, peers = [tmp_path / "src.log", tmp_path / "dst.log"], []
        for log in logs:
            log.touch()
            extra = [] if disks is None else disks[log.stem]
            monitor = f"unix:{tmp_path}/{log.stem}.qmp,server=on,wait=off"
            uri = f"unix:{tmp_path}/m.sock" if log.stem == "dst" else None
            peers.append(
                qemu(*guest.args(log), *extra, "-qmp", monitor, version=version, incoming=uri)
            )
        source = peers[0]
        wait_counting(logs[0])
        source.capabilities(**capabilities)
        source.qmp("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=downtime)
        done = site.migctl(
            *("-m", f"unix:{tmp_path}/src.qmp", "migrate", "--json"),
            *(*args, f"unix:{tmp_path}/m.sock"),
        )
        if done.returncode == 0:
            check_count(*logs)
        return done, [json.loads(line) for line in done.stdout.splitlines()]

    return run


def progress(events):
    return [e for e in events if e["event"] == "progress"]


def check_figures(readings):
    fractions = [r["fraction"] for r in readings]
    assert fractions == sorted(fractions)
    for reading in readings:
        if reading["eta"] is not None:
            low, high = reading["eta-range"]
            assert 0 <= low <= reading["eta"] <= high


def test_one_that_converges_after_some_passes(migrate, tmp_path):
    """6 MiB/s of writes, 12 MiB/s of link."""
    guest = counting_guest(tmp_path, pages=2048, pages_per_tick=16, hz=100)
    done, events = migrate(guest, 12 * MIB, downtime=50)
    assert done.returncode == 0, done.stderr
    readings = progress(events)
    check_figures(readings)
    assert readings[-1]["fraction"] == 1
    assert events[-1]["ram"]["dirty-sync-count"] > 2  # which one that stands still needs
    assert all(r["excess"] is None for r in readings)


def test_one_that_does_not_is_told_by_what_factor_and_stopped(migrate, tmp_path):
    guest = counting_guest(tmp_path, pages=2048, pages_per_tick=128, hz=100)
    done, events = migrate(guest, 4 * MIB, "--timeout", "12s")
    assert done.returncode == 4
    readings = progress(e for e in events if "event" in e)
    check_figures(readings)
    assert readings[-1]["fraction"] < 1
    late = [r for r in readings if r["excess"] is not None]
    assert late
    assert all(r["overdue"] > 1 and r["eta"] is None for r in late)
    notes = [e["text"] for e in events if e.get("event") == "note"]
    assert len(notes) == 1
    assert "not converging: memory gets dirty" in notes[0]
    assert "times the downtime limit" in notes[0]
    assert "not converging" in events[-1]["error"]
    assert events[-1]["exit-status"] == 4


def test_a_disk_that_goes_along_is_work_as_well(migrate, tmp_path):
    """Block migration, which QEMU had until 9.0: all of the disk comes before the memory."""
    size = 8 * MIB
    disks = {}
    for name in ("src", "dst"):
        path = tmp_path / f"{name}.img"
        path.write_bytes((b"disk" if name == "src" else b"\0\0\0\0") * (size // 4))
        drive = f"file={path},if=none,id=drv0,format=raw"
        disks[name] = ("-drive", drive, "-device", "virtio-blk,drive=drv0")
    guest = counting_guest(tmp_path, pages=1024, pages_per_tick=8, hz=100)
    done, events = migrate(guest, 4 * MIB, version="7.2", disks=disks, block=True)
    assert done.returncode == 0, done.stderr
    readings = progress(events)
    check_figures(readings)
    seen = [r for r in readings if r["disk"] is not None]
    left = [r["disk"]["remaining"] for r in seen]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert {r["disk"]["total"] for r in seen if r["disk"]["total"]} == {size}
    halfway = next(r for r in seen if 0 < r["disk"]["remaining"] < size)
    assert halfway["fraction"] > 0  # not a page of memory yet
    assert halfway["total"] > size
    assert (tmp_path / "dst.img").read_bytes() == (tmp_path / "src.img").read_bytes()
