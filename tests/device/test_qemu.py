"""Device sections that a real QEMU wrote: walked, decoded, encoded again, and read by a real QEMU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs
import pytest

import whimbrel_device as wd
from whimbrel.errors import StreamError
from whimbrel_device import (
    array,
    buffer,
    decode,
    encode,
    i32,
    i32_equal,
    i64,
    int32_le,
    opaque,
    struct,
    subsection,
    timer,
    u8,
    u16,
    u32,
    u64,
    unused,
    vmdesc,
    vmstate,
)

pytestmark = pytest.mark.interop

# ---- devices of the pc machine, as its vmdescription names their fields


@vmstate("timer", version_id=2)
class CpuTimers:
    cpu_ticks_offset: int = i64()
    _unused: None = unused(8)
    cpu_clock_offset: int = i64()


@vmstate("port92")
class Port92:
    outport: int = u8()


@vmstate("i8259")
class Pic:
    last_irr: int = u8()
    irr: int = u8()
    imr: int = u8()
    isr: int = u8()
    priority_add: int = u8()
    irq_base: int = u8()
    read_reg_select: int = u8()
    poll: int = u8()
    special_mask: int = u8()
    init_state: int = u8()
    auto_eoi: int = u8()
    rotate_on_auto_eoi: int = u8()
    special_fully_nested_mode: int = u8()
    init4: int = u8()
    single_mode: int = u8()
    elcr: int = u8()


@vmstate("pit channel", version_id=2)
class PitChannel:
    count: int = i32()
    latched_count: int = u16()
    count_latched: int = u8()
    status_latched: int = u8()
    status: int = u8()
    read_state: int = u8()
    write_state: int = u8()
    write_latch: int = u8()
    rw_mode: int = u8()
    mode: int = u8()
    bcd: int = u8()
    gate: int = u8()
    count_load_time: int = i64()
    next_transition_time: int = i64()


@vmstate("i8254", version_id=3)
class Pit:
    irq_disabled: int = u32(name="channels[0].irq_disabled")
    channels: list[PitChannel] = array(PitChannel, 3)
    next_time: int = i64(name="channels[0].next_transition_time")


@vmstate("dma_regs")
class DmaRegs:
    now: list[int] = array(i32, 2)
    base: list[int] = array(u16, 2)
    mode: int = u8()
    page: int = u8()
    pageh: int = u8()
    dack: int = u8()
    eop: int = u8()


@vmstate("dma")
class Dma:
    command: int = u8()
    mask: int = u8()
    flip_flop: int = u8()
    dshift: int = i32()
    regs: list[DmaRegs] = array(DmaRegs, 4)


@vmstate("mc146818rtc", version_id=3)
class Rtc:
    cmos_data: bytearray = buffer(128)
    cmos_index: int = u8()
    _unused1: None = unused(28)
    periodic_timer: int | None = timer()
    next_periodic_time: int = i64()
    _unused2: None = unused(24)
    irq_coalesced: int = u32(since=2)
    period: int = u32(since=2)
    base_rtc: int = u64(since=3)
    last_update: int = u64(since=3)
    offset: int = i64(since=3)
    update_timer: int | None = timer(since=3)
    next_alarm_time: int = u64(since=3)


@vmstate("hpet_timer")
class HpetTimer:
    tn: int = u8()
    config: int = u64()
    cmp: int = u64()
    fsb: int = u64()
    period: int = u64()
    wrap_flag: int = u8()
    qemu_timer: int | None = timer()


@vmstate("hpet", version_id=2)
class Hpet:
    config: int = u64()
    isr: int = u64()
    hpet_counter: int = u64()
    num_timers: int = u8()
    timer: list[HpetTimer] = array(HpetTimer, "num_timers", limit=32)


@vmstate("extended_state", version_id=0)
class KbdExtended:
    migration_flags: int = u32()
    obsrc: int = u32()
    obdata: int = u8()
    cbdata: int = u8()


@vmstate("pckbd", version_id=3)
class KbdState:
    write_cmd: int = u8()
    status: int = u8()
    mode: int = u8()
    pending_tmp: int = u8()
    extended: KbdExtended = subsection(KbdExtended)


@vmstate("pckbd", version_id=3)
class Kbd:
    kbd: KbdState = struct(KbdState)


@vmstate("PCIBUS")
class PciBus:
    nirq: int = i32_equal(default=4)
    irq_count: list[int] = array(i32, "nirq", limit=16)


@vmstate("PCIDevice", version_id=2)
class PciDevice:
    express: bool = False  # the object's own, not on the wire
    version_id: int = int32_le(default=2)
    config: bytes = opaque(256, "pci config", name="config", exists=lambda d: not d.express)
    express_config: bytes = opaque(4096, "pci config", name="config", exists=lambda d: d.express)
    irq_state: bytes = opaque(16, "pci irq state")


@vmstate("I440FX", version_id=3)
class I440fx:
    parent_obj: PciDevice = struct(PciDevice)
    _unused: None = unused(1)


REAL: list[tuple[str, int, type]] = [
    ("timer", 0, CpuTimers),
    ("port92", 0, Port92),
    ("i8259", 0, Pic),
    ("i8259", 1, Pic),
    ("i8254", 0, Pit),
    ("dma", 1, Dma),
    ("mc146818rtc", 0, Rtc),
    ("hpet", 0, Hpet),
    ("pckbd", 0, Kbd),
    ("PCIBUS", 0, PciBus),
    ("0000:00:00.0/I440FX", 0, I440fx),
]


@pytest.mark.parametrize(("name", "instance_id", "cls"), REAL)
def test_a_real_device_described_by_hand(capture, name, instance_id, cls):
    section = capture("pc").section(name, instance_id)
    obj = cls()
    decode(obj, section.payload, version=section.version)
    payload, members = encode(obj)
    assert payload == section.payload
    expected = dict(section.members)
    del expected["name"], expected["instance_id"]
    assert json.dumps(members) == json.dumps(expected)  # order of the keys included


def test_values_are_those_of_the_machine(capture):
    """What is known without asking QEMU: the interrupt vectors and the RTC's memory size as the BIOS would find them."""
    machine = capture("pc")
    rtc, bus = Rtc(cmos_data=bytearray(128)), PciBus()
    decode(rtc, machine.section("mc146818rtc").payload)
    memory_kib = 640 + 1024 + 64 * int.from_bytes(rtc.cmos_data[0x34:0x36], "little")
    memory_kib += int.from_bytes(rtc.cmos_data[0x30:0x32], "little")
    assert int.from_bytes(rtc.cmos_data[0x15:0x17], "little") == 640  # KiB of base memory
    assert memory_kib == 640 + 1024 + 15 * 1024  # 16 MiB in all
    assert rtc.periodic_timer is None
    decode(bus, machine.section("PCIBUS").payload)
    with pytest.raises(StreamError, match=r"nirq.*expected exactly 8, found 4"):
        decode(PciBus(nirq=8), machine.section("PCIBUS").payload)


# ---- every device: classes made from the description

_SCALARS = {
    "bool": "bool_",
    "timer": "timer",
    "float64": "float64",
    "CPU_Double_U": "cpu_double",
    **{f"int{n}": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"u{n}" for n in (8, 16, 32, 64)},
    # Those compare with this side's value, which a class made from the description alone has not: see the default.
    "uint8 equal": "u8_equal",
    "uint16 equal": "u16_equal",
    "int32 equal": "i32_equal",
    "uint32 equal": "u32_equal",
    "int64 equal": "i64_equal",
    "int32 le": "int32_le",
}


class Builder:
    """Makes a class with the layout that a vmdescription shows; `items` gives the values to compare with."""

    def __init__(self, values: dict[str, bytes]) -> None:
        self.values = values

    def vmsd(self, desc: vmdesc.Vmsd, prefix: str, *, indexed: bool = False) -> type:
        body: dict[str, Any] = {}
        fields = list(desc.fields)
        position = 0
        while position < len(fields):
            field = fields[position]
            count = 1
            while field.index is not None and position + count < len(fields):
                follower = fields[position + count]
                if follower.name != field.name or follower.index != field.index + count:
                    break
                assert follower.struct.fields == field.struct.fields, "elements differ"
                if len(follower.struct.subsections) > len(field.struct.subsections):
                    field = attrs.evolve(field, struct=follower.struct)
                count += 1
            body[f"f{position}"] = self.field(field, prefix, count)
            position += count
        if indexed:  # conditional, as something in each element of such an array must be
            body["never"] = u8(exists=lambda obj: False)
        for k, sub in enumerate(desc.subsections):
            made = self.vmsd(sub, f"{prefix}{sub.name}.")
            made.present = False
            made.post_load = lambda self, version_id: setattr(self, "present", True)
            made.needed = lambda self: self.present
            body[f"s{k}"] = subsection(made)
        made = attrs.make_class("Made", body, eq=False)
        return vmstate(desc.name, version_id=desc.version)(made)

    def field(self, field: vmdesc.Field, prefix: str, count: int) -> Any:
        path = prefix + field.name
        array_of = count if field.index is not None else field.array_len
        element = path + ("[0]" if array_of is not None else "")
        of: Any
        if field.struct is not None:
            made = self.vmsd(field.struct, f"{element}.", indexed=field.index is not None)
            if field.type == "tmp":
                return self.tmp(made, field.name)
            of = struct if field.type == "struct" else wd.vstruct
            if array_of is None:
                return of(made, name=field.name)
            of = made
        elif field.type == "unused_buffer":
            return unused(field.size)
        elif field.type in _SCALARS:
            of = getattr(wd, _SCALARS[field.type])
            if field.type.endswith((" equal", " le")):
                size = len(self.values[element])
                default = int.from_bytes(self.values[element], "big", signed=size > 2)
                return of(default=default, name=field.name)
            if array_of is None:
                return of(name=field.name)
        else:
            assert array_of is None
            return opaque(field.size, field.type, name=field.name)
        return array(of, array_of, name=field.name)

    @staticmethod
    def tmp(made: type, name: str) -> Any:
        """A helper whose values are kept in the object that it helps."""
        names = [a.name for a in attrs.fields(made)]

        def pre_save(self: Any) -> None:
            for n in names:
                setattr(self, n, self.parent.__dict__["kept"][n])

        def post_load(self: Any, version_id: int) -> None:
            self.parent.__dict__["kept"] = {n: getattr(self, n) for n in names}

        made.pre_save = pre_save  # type: ignore[attr-defined]
        made.post_load = post_load  # type: ignore[attr-defined]
        return wd.tmp(made, name=name)


@pytest.mark.parametrize(
    ("machine", "more_than"), [("pc", 25), ("q35", 25), ("isapc", 15), ("microvm", 5), ("none", 1)]
)
def test_every_section_is_consumed_to_its_last_byte(capture, machine, more_than):
    taken = capture(machine)
    assert len(taken.sections) > more_than
    for section in taken.sections:
        pieces = list(vmdesc.walk(section.device, section.payload))
        assert b"".join(p.data for p in pieces) == section.payload
        with pytest.raises(StreamError):
            list(vmdesc.walk(section.device, section.payload + b"\0"))
        with pytest.raises(StreamError):
            section.device.payload_size(memoryview(section.payload)[:-1])


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_every_section_decoded_and_encoded_is_the_same(capture, machine):
    for section in capture(machine).sections:
        values = {
            item.path: bytes(item.data)
            for item in vmdesc.walk(section.device, section.payload)
            if item.size <= 8
        }
        cls = Builder(values).vmsd(section.device.vmsd, "")
        obj = cls()
        decode(obj, section.payload, version=section.version)
        payload, members = encode(obj)
        assert payload == section.payload, section.device.name
        described = {"name": section.device.name, "instance_id": section.device.instance_id}
        assert json.dumps(described | members) == json.dumps(section.members)
        assert vmdesc.parse(vmdesc.encode(4096, [described | members])).devices == (section.device,)


# ---- and QEMU reads what we write


def test_qemu_takes_a_changed_device(
    capture: Callable[[str], Any], qemu: Any, tmp_path: Any
) -> None:
    taken = capture("pc")
    section = taken.section("i8259", 1)
    pic = Pic()
    decode(pic, section.payload)
    pic.imr, pic.irr, pic.irq_base = 0xA5, 0x5A, 0x68
    payload, _ = encode(pic)
    changed = bytearray(taken.data)
    changed[section.offset : section.offset + len(section.payload)] = payload
    stream = tmp_path / "changed"
    stream.write_bytes(changed)
    peer = qemu("-M", "pc", "-m", "16", "-S", incoming=f"exec:cat {stream}")
    peer.wait_migration("completed")
    shown = peer.qmp("human-monitor-command", command_line="info pic")
    assert "pic1: irr=5a imr=a5 isr=00" in shown
    assert "irq_base=68" in shown
