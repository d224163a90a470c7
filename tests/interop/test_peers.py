"""The peers themselves, before anything of ours stands between them: what the other tests rely on."""

from pathlib import Path

import pytest

from whimbrel_testing.guest.counter import boot_sector
from whimbrel_testing.peers import QemuBinaries, QemuFactory, QmpError, missing_peer, wait_until
from whimbrel_testing.qemu_guest import (
    FilledGuest,
    check_count,
    counting_guest,
    last_number,
    wait_counting,
)

pytestmark = pytest.mark.interop


def test_guest_counts_across_a_migration_from_qemu_to_qemu(
    qemu: QemuFactory, tmp_path: Path
) -> None:
    guest = counting_guest(tmp_path)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    uri = f"unix:{tmp_path}/m.sock"
    target = qemu(*guest.args(after), incoming=uri)
    source = qemu(*guest.args(before))
    wait_counting(before)
    source.migrate(uri)
    source.wait_migration("completed")
    target.wait_status("running")
    reached = last_number(before)
    wait_counting(before, after, beyond=reached)
    target.qmp("stop")
    assert check_count(before, after) > reached
    assert source.status() == "postmigrate"


def test_guest_notices_a_page_that_was_lost(qemu: QemuFactory, tmp_path: Path) -> None:
    """The proof has teeth: one changed word of the ring, and the guest says so."""
    guest = counting_guest(tmp_path)
    ram, log = tmp_path / "ram", tmp_path / "log"
    backend = f"memory-backend-file,id=ram,size={guest.memory_mib}M,mem-path={ram},share=on"
    args = guest.args(log)
    args[args.index("-machine") + 1] += ",memory-backend=ram"
    peer = qemu("-object", backend, *args)
    wait_counting(log)
    peer.qmp("stop")
    with ram.open("r+b") as memory:
        memory.seek((1 << 20) + 4096 * 1000)
        memory.write(b"lost")
    reached = last_number(log)
    peer.qmp("cont")
    with pytest.raises(ValueError, match="BAD PAGE"):
        wait_counting(log, beyond=reached)
    with pytest.raises(AssertionError, match="not what it wrote"):
        check_count(log)


def test_filled_ram_arrives_whole_from_qemu_to_qemu(qemu: QemuFactory, tmp_path: Path) -> None:
    guest = FilledGuest()
    guest.fill(tmp_path / "source")
    uri = f"unix:{tmp_path}/m.sock"
    target = qemu(*guest.args(tmp_path / "target"), incoming=uri)
    source = qemu(*guest.args(tmp_path / "source"))
    source.migrate(uri, max_bandwidth=0)
    source.wait_migration("completed")
    target.wait_status("prelaunch", "paused")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_a_test_chooses_the_version(qemu: QemuFactory, version: str) -> None:
    assert qemu("-S", version=version).version == tuple(map(int, version.split(".")))


@pytest.mark.parametrize(("arch", "machine"), [("aarch64", "virt"), ("ppc64", "pseries")])
def test_a_test_chooses_the_architecture(qemu: QemuFactory, arch: str, machine: str) -> None:
    assert qemu("-machine", machine, "-S", arch=arch).qmp("query-target")["arch"] == arch


def test_a_version_that_is_not_there_is_a_skip_that_says_what_is(
    qemu: QemuFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHIMBREL_REQUIRE_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"x86_64 0\.15; there is \d+\.\d+"):
        qemu("-S", version="0.15")
    with pytest.raises(pytest.skip.Exception, match="no qemu-system-pdp11"):
        qemu("-S", arch="pdp11")


def test_versions_are_found_in_path_and_beside_it(
    qemu_binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHIMBREL_QEMU", raising=False)
    (tmp_path / "qemu-system-x86_64").symlink_to(qemu_binary)
    beside = QemuBinaries([tmp_path])
    monkeypatch.setenv("PATH", "")
    (path,) = beside.versions().values()
    assert Path(path).parent == tmp_path
    monkeypatch.setenv("PATH", str(Path(qemu_binary).parent))
    (path,) = QemuBinaries([tmp_path]).versions().values()
    assert path == qemu_binary  # the installed one comes first


def test_a_qemu_that_does_not_start_says_why(qemu: QemuFactory) -> None:
    with pytest.raises(RuntimeError, match="unsupported machine type"):
        qemu("-machine", "no-such-machine")


def test_a_refused_command_is_an_error(qemu: QemuFactory) -> None:
    peer = qemu("-S")
    with pytest.raises(QmpError, match="valid migration protocol"):
        peer.migrate("nonsense:")


def test_boot_sector_refuses_what_its_timer_cannot() -> None:
    with pytest.raises(ValueError, match="19 Hz"):
        boot_sector(hz=10)


def test_missing_peer_is_a_skip_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHIMBREL_REQUIRE_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such peer"):
        missing_peer("no such peer")


def test_missing_peer_is_a_failure_where_peers_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHIMBREL_REQUIRE_PEERS", "1")
    with pytest.raises(pytest.fail.Exception, match="no such peer"):
        missing_peer("no such peer")


def test_waiting_says_what_for() -> None:
    with pytest.raises(TimeoutError, match="no miracle within"):
        wait_until(lambda: None, "miracle", timeout=0.05)


def test_count_that_misses_repeats_or_tears_a_line_is_found(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(b"00000001\n00000002\n000")
    for tail, message in (
        (b"00003\n00000004\n0000", None),
        (b"00004\n", "expected 00000003"),
        (b"00003\n00000003\n", "expected 00000004"),
        (b"00000003\n", "expected 00000003"),
        (b"00003\nBAD PAGE\n", "not what it wrote"),
    ):
        after.write_bytes(tail)
        if message is None:
            assert check_count(before, after) == 4
            continue
        with pytest.raises(AssertionError, match=message):
            check_count(before, after)
