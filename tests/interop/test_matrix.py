"""Every QEMU is a peer: versions, machine types and transports, as source and as destination.

Each cell is a guest that counts and dirties memory; after the passage it must count on, and miss no page. The table of
all cells stands at the end of pytest's output.
"""

from pathlib import Path

import attrs
import pytest

from whimbrel_testing.peers import QemuFactory
from whimbrel_testing.qemu_guest import check_count, counting_guest, last_number, wait_counting

from .matrix import Record
from .passage import TRANSPORTS, Passage

pytestmark = pytest.mark.interop

SOURCE = "QEMU -> migctl receive"
DESTINATION = "migctl send -> QEMU, the guest kept above"


@attrs.frozen(kw_only=True)
class Kind:
    """A machine type, and its form of the stream."""

    machine: str
    args: tuple[str, ...] = ()
    #: How the stream names the machine; None: it does not.
    named: str | None
    #: A stream without a vmdescription ends only with its channel: such a source must not wait for an answer.
    return_path: bool = True
    #: Stop the guest first: this QEMU forgets pages that are written while it migrates, to whatever destination.
    stopped: bool = False


#: QEMU of 2013: no configuration, no footers, no globalstate, no vmdescription.
_FORM_OF_2013 = (
    *("-global", "migration.send-configuration=off"),
    *("-global", "migration.send-section-footer=off"),
    *("-global", "migration.store-global-state=off"),
)
ROWS = ("pc", "q35", "microvm", "isapc", "pc-i440fx-2.4", "pc-i440fx-2.2", "pc-i440fx-1.7 form")
VERSIONS = ("7.2", "10.0")
CELLS = [(version, row) for version in VERSIONS for row in ROWS]
KINDS: dict[tuple[str, str], Kind] = {
    ("7.2", "pc"): Kind(machine="pc", named="pc-i440fx-7.2"),
    ("7.2", "q35"): Kind(machine="q35", named="pc-q35-7.2"),
    ("10.0", "pc"): Kind(machine="pc", named="pc-i440fx-10.0"),
    ("10.0", "q35"): Kind(machine="q35", named="pc-q35-10.0"),
    **{
        (version, machine): Kind(machine=machine, named=machine)
        for version in VERSIONS
        for machine in ("microvm", "isapc", "pc-i440fx-2.4")
    },
    # With several passes over RAM, and also from QEMU to QEMU and into a file: max_bandwidth=20_000_000 shows it always.
    ("7.2", "isapc"): Kind(machine="isapc", named="isapc", stopped=True),
    ("7.2", "pc-i440fx-2.2"): Kind(machine="pc-i440fx-2.2", named=None, return_path=False),
    ("7.2", "pc-i440fx-1.7 form"): Kind(machine="pc-i440fx-1.7", named=None),
    # It has no machine type of that age, but speaks the form.
    ("10.0", "pc-i440fx-1.7 form"): Kind(
        machine="pc-i440fx-2.4,suppress-vmdesc=on",
        args=_FORM_OF_2013,
        named=None,
        return_path=False,
    ),
}
#: Cells that cannot be: what QEMU says.
EMPTY = {("10.0", "pc-i440fx-2.2"): "unsupported machine type"}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("cell", [c for c in CELLS if c in KINDS], ids=" ".join)
def test_guest_counts_on(
    cell: tuple[str, str], transport: str, tmp_path: Path, passage: Passage, record: Record
) -> None:
    kind, version, name = KINDS[cell], cell[0], " ".join(cell)
    record(SOURCE, name, transport)
    record(DESTINATION, name, transport)
    guest = counting_guest(tmp_path, memory_mib=8)
    before, after = tmp_path / "before.log", tmp_path / "after.log"
    answered = kind.return_path and passage.two_way

    source = passage.qemu(*guest.args(before, kind.machine), *kind.args, version=version)
    source.capabilities(return_path=answered)
    wait_counting(before)
    if kind.stopped:
        source.qmp("stop")
    received = passage.receive(source)
    source.wait_migration("completed")
    reached = last_number(before)
    assert (received["machine"], received["verbatim_from"]) == (kind.named, None)
    assert received["acknowledged"] is answered
    kept = "kept, stopped" if kind.stopped else "kept"
    record(SOURCE, name, transport, f"{kept}, answered" if answered else kept)

    target, sent = passage.send(
        *guest.args(after, kind.machine), *kind.args, version=version, return_path=True
    )
    assert sent["acknowledged"] is passage.two_way
    if kind.stopped:
        target.wait_status("paused")
        target.qmp("cont")
    target.wait_status("running")
    assert wait_counting(before, after, beyond=reached) > reached
    target.qmp("stop")
    check_count(before, after)
    record(DESTINATION, name, transport, "counts, answers" if passage.two_way else "counts")


@pytest.mark.parametrize("cell", EMPTY, ids=" ".join)
def test_what_a_qemu_has_not(cell: tuple[str, str], qemu: QemuFactory, record: Record) -> None:
    version, machine = cell
    with pytest.raises(RuntimeError, match=EMPTY[cell]):
        qemu("-machine", machine, "-S", version=version)
    for table in (SOURCE, DESTINATION):
        for transport in TRANSPORTS:
            record(table, " ".join(cell), transport, f"none: QEMU {version} says: {EMPTY[cell]}")


def test_no_cell_is_missing() -> None:
    assert KINDS.keys() | EMPTY.keys() == set(CELLS)
    assert not KINDS.keys() & EMPTY.keys()
