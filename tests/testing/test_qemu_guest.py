"""The guests for a real QEMU: what they can be asked for."""

import pytest

from whimbrel_testing.guest import rewriter
from whimbrel_testing.peers import QemuFactory
from whimbrel_testing.qemu_guest import check_count, counting_guest, wait_counting


@pytest.mark.parametrize(("memory_mib", "pages"), [(16, 3584), (64, 11776)])
def test_a_ring_that_reaches_into_the_firmware_is_refused(tmp_path, memory_mib, pages):
    counting_guest(tmp_path, memory_mib=memory_mib, pages=pages)
    with pytest.raises(ValueError, match=r"reach into the last (1|17) of (16|64) MiB"):
        counting_guest(tmp_path, memory_mib=memory_mib, pages=pages + 1)


@pytest.mark.interop
@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize(("memory_mib", "pages"), [(16, 3584), (64, 11776)])
def test_the_largest_ring_is_all_its_own(
    qemu: QemuFactory, tmp_path, machine: str, memory_mib: int, pages: int
):
    """It goes round more than once, and finds every page as it left it."""
    guest = counting_guest(tmp_path, memory_mib=memory_mib, pages=pages, pages_per_tick=200)
    log = tmp_path / "serial.log"
    peer = qemu(*guest.args(log, machine))
    wait_counting(log, beyond=2 * pages // 200)
    peer.kill()
    check_count(log)


def test_a_rewriter_writes_within_its_pages():
    with pytest.raises(ValueError, match="stride"):
        rewriter.boot_sector(pages=16, pages_per_tick=1, stride=8192)
    with pytest.raises(ValueError, match="ring"):
        rewriter.boot_sector(pages=16, pages_per_tick=17)
