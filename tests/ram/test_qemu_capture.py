"""What a real QEMU sends of its RAM: bytes noted from QEMU 7.2.22, and a stream taken now."""

import numpy as np
import pytest

from whimbrel import Budget, LoadContext, Machine, Mode, Outcome, OutStream, RunParams
from whimbrel.channel import MemoryChannel
from whimbrel.savevm import SaveDriver
from whimbrel.wire import items
from whimbrel.wire.format import Dialect, ItemType
from whimbrel_ram import RAMBlock, RamHandler
from whimbrel_testing.qemu_guest import MACHINE, FilledGuest

PAGE = 4096
MIB = 1 << 20

#: QEMU 7.2.22, `-M pc -m 32 -nodefaults -S`, file offsets 0x2b and 0xc9 (page 3 and what follows page 4 left out).
SETUP = (
    bytes.fromhex("00000000020820040670632e72616d000000000200000014")
    + b"/rom@etc/acpi/tables"
    + bytes.fromhex("0000000000020000")
    + b"\x07pc.bios"
    + bytes.fromhex("0000000000040000")
    + b"\x06pc.rom"
    + bytes.fromhex("0000000000020000")
    + b"\x15/rom@etc/table-loader"
    + bytes.fromhex("0000000000001000")
    + b"\x12/rom@etc/acpi/rsdp"
    + bytes.fromhex("0000000000001000")
    + bytes.fromhex("0000000000000010")
)
PART = (
    bytes.fromhex("00000000000000020670632e72616d00")
    + bytes.fromhex("000000000000102200")
    + bytes.fromhex("000000000000202200")
    + bytes.fromhex("00000000000030280300000003")
    + bytes(PAGE - 5)
    + bytes.fromhex("000000000000402200")
    + bytes.fromhex("00000000000000020770632e62696f7300")
    + bytes.fromhex("0000000000000010")
)
END = bytes.fromhex("0000000000000010")


def test_the_noted_bytes(slow):
    assert len(SETUP) == 0xBF - 0x2B
    assert len(PART) == 0x10F3 - 0xC9 + 9 + 17 + 8
    handler = RamHandler([], adopt=64 * MIB)
    handler.load_setup(LoadContext(machine=Machine("pc-i440fx-7.2")))
    inp = slow.in_stream(SETUP + PART + END)
    for item in (ItemType.SECTION_START, ItemType.SECTION_PART, ItemType.SECTION_END):
        slow.read_item(handler, inp, item)
    handler.load_complete()
    assert inp.at_end()
    assert {b.idstr: b.size for b in handler.blocks} == {
        "pc.ram": 0x2000000,
        "/rom@etc/acpi/tables": 0x20000,
        "pc.bios": 0x40000,
        "pc.rom": 0x20000,
        "/rom@etc/table-loader": 0x1000,
        "/rom@etc/acpi/rsdp": 0x1000,
    }
    ram = handler.blocks[0]
    assert bytes(ram.buffer[3 * PAGE : 3 * PAGE + 5]) == bytes.fromhex("0300000003")
    assert np.count_nonzero(ram.view) == 2


@pytest.mark.interop
def test_a_stream_of_a_real_qemu_is_decoded_to_the_byte(qemu, slow, tmp_path):
    guest = FilledGuest(size=32 * MIB)
    ram_file, capture = tmp_path / "ram", tmp_path / "capture"
    guest.fill(ram_file)
    source = qemu(*guest.args(ram_file))
    source.migrate(f"exec:cat>{capture}", max_bandwidth=1 << 40)
    figures = source.wait_migration("completed")["ram"]

    data = capture.read_bytes()
    inp = slow.in_stream(data)
    items.read_header(inp)
    configuration, item = items.read_configuration(inp, inp.u8())
    handler = RamHandler([], adopt=256 * MIB)
    handler.load_setup(
        LoadContext(machine=Machine(configuration.machine_type), configuration=configuration)
    )
    section, seen, block = None, [], None
    while item in (ItemType.SECTION_START, ItemType.SECTION_PART, ItemType.SECTION_END):
        header = items.read_section_header(inp, ItemType(item))
        if section is None:
            section = header.section_id
            assert (header.idstr, header.instance_id, header.version_id) == ("ram", 0, 4)
        assert header.section_id == section
        start = inp.position
        slow.read_item(handler, inp, ItemType(item))
        if item != ItemType.SECTION_START:  # each payload ends where the slow decoder says
            sizes = {b.idstr: b.size for b in handler.blocks}
            records, used, block = slow.decode(data[start:], sizes, PAGE, block)
            assert inp.position == start + used
            seen += records
        items.read_footer(inp, header)
        item = inp.u8()
    assert item == ItemType.SECTION_FULL  # the devices
    handler.load_complete()

    by_name = {b.idstr: b for b in handler.blocks}
    assert by_name["ram"].buffer == ram_file.read_bytes()
    memory = {n: bytearray(b.size) for n, b in by_name.items()}
    slow.apply(seen, memory, PAGE)
    assert {n: bytes(b.buffer) for n, b in by_name.items()} == memory
    assert figures["total"] == sum(b.size for b in handler.blocks)
    zero = sum(isinstance(r.data, int) for r in seen)
    assert (figures["normal"], figures["duplicate"]) == (len(seen) - zero, zero)


def test_a_section_of_ours_has_the_form_of_qemus(slow):
    """Encoding the noted blocks gives the noted bytes."""
    handler = RamHandler([], adopt=64 * MIB)
    handler.load_setup(LoadContext(machine=Machine("pc-i440fx-7.2")))
    slow.read_item(handler, slow.in_stream(SETUP), ItemType.SECTION_START)
    channel = MemoryChannel()
    out = OutStream(channel)
    again = RamHandler(handler.blocks, tracker="explicit")
    again.setup(out, RunParams())
    out.flush()
    assert bytes(channel.data) == SETUP


@pytest.mark.interop
def test_a_real_qemu_takes_what_we_write(qemu, tmp_path):
    """Its RAM is then ours, byte for byte; it accepts a stream without its devices and its other blocks."""
    guest = FilledGuest(size=32 * MIB)
    ours, theirs, stream = tmp_path / "ours", tmp_path / "theirs", tmp_path / "stream"
    guest.fill(ours, seed=3)
    guest.fill(theirs, seed=4)  # everything must be overwritten, zero pages too
    block = RAMBlock("ram", memory=bytearray(ours.read_bytes()))
    machine = Machine(MACHINE)
    channel = MemoryChannel()
    driver = SaveDriver(OutStream(channel), machine, [RamHandler([block])], Dialect())
    driver.header(items.Configuration(machine_type=machine.machine_type))
    driver.setup(RunParams())
    while not driver.iterate(Budget(bytes=3 * MIB)):
        pass
    block.view[5 * PAGE : 9 * PAGE] ^= 0x55  # a page comes again, the last one wins
    driver.complete(Mode.PRECOPY)
    driver.out.write(driver.tail())
    driver.out.flush()
    driver.cleanup(Outcome.COMPLETED)
    stream.write_bytes(channel.data)

    destination = qemu(*guest.args(theirs), incoming=f"exec:cat {stream}")
    destination.wait_migration("completed")
    destination.kill()
    assert theirs.read_bytes() == bytes(block.buffer)
