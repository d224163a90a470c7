"""Every field type against the bytes that the format prescribes, and what a load does to an object."""

from __future__ import annotations

import array as array_module
import struct as pystruct

import attrs
import pytest

import whimbrel_device as wd
from whimbrel.channel import MemoryChannel
from whimbrel.errors import EndOfStream, LocalError, StreamError
from whimbrel.stream import InStream
from whimbrel_device import (
    array,
    bitmap,
    buffer,
    decode,
    decode_from,
    encode,
    gbytearray,
    gtree,
    pointers,
    qlist,
    qtailq,
    struct,
    subsection,
    tmp,
    u8,
    u16,
    u32,
    u64,
    unused,
    vmdesc,
    vmstate,
    vstruct,
)


def one(field):
    """A class with that one field."""
    return vmstate("one")(attrs.make_class("One", {"x": field}))


@vmstate("pair")
class Pair:
    a: int = u8()
    b: int = u16()


PAIR = {
    "vmsd_name": "pair",
    "version": 1,
    "fields": [
        {"name": "a", "type": "uint8", "size": 1},
        {"name": "b", "type": "uint16", "size": 2},
    ],
}


@vmstate("p")
class Varying:
    n: int = u8()
    data: bytes = buffer("n")


def entry(kind, size, **more):
    return [{"name": "x", **more, "type": kind, "size": size}]


STRUCT = [{"name": "x", "type": "struct", "struct": PAIR, "size": 3}]

#: (the helper's result, value, bytes in hex, entries of the vmdescription)
WIRE = {
    "bool": (wd.bool_(), True, "01", entry("bool", 1)),
    "i8": (wd.i8(), -2, "fe", entry("int8", 1)),
    "i16": (wd.i16(), -2, "fffe", entry("int16", 2)),
    "i32": (wd.i32(), -2, "fffffffe", entry("int32", 4)),
    "i64": (wd.i64(), -2, "fffffffffffffffe", entry("int64", 8)),
    "u8": (wd.u8(), 0x12, "12", entry("uint8", 1)),
    "u16": (wd.u16(), 0x1234, "1234", entry("uint16", 2)),
    "u32": (wd.u32(), 0x12345678, "12345678", entry("uint32", 4)),
    "u64": (wd.u64(), 0x123456789ABCDEF0, "123456789abcdef0", entry("uint64", 8)),
    "timer": (wd.timer(), 1000, "00000000000003e8", entry("timer", 8)),
    "timer, not armed": (wd.timer(), None, "ff" * 8, entry("timer", 8)),
    "float64": (wd.float64(), 1.0, "3ff0000000000000", entry("float64", 8)),
    "cpu_double": (wd.cpu_double(), -2.0, "c000000000000000", entry("CPU_Double_U", 8)),
    "buffer": (buffer(3), b"abc", "616263", entry("buffer", 3)),
    "opaque": (wd.opaque(2, "pci config"), b"ab", "6162", entry("pci config", 2)),
    "bitmap": (bitmap(66), 1 | 1 << 63 | 1 << 65, "80" + "00" * 6 + "01" + "00" * 7 + "02", None),
    "bitmap of 64": (bitmap(64), 3, "0000000000000003", entry("bitmap", 8)),
    "GByteArray": (gbytearray(), b"ab", "000000026162", entry("GByteArray", 6)),
    "struct": (struct(Pair), Pair(a=1, b=2), "010002", STRUCT),
    "vstruct": (
        vstruct(Pair, 1),
        Pair(a=1, b=2),
        "010002",
        [{"name": "x", "type": "vstruct", **PAIR, "size": 3}],
    ),
    "array": (array(u16, 2), [1, 2], "00010002", entry("uint16", 2, array_len=2)),
    "array of one": (array(u16, 1), [1], "0001", entry("uint16", 2)),
    "array of none": (array(u16, 0), [], "", []),
    "array of structs": (
        array(Pair, 2),
        [Pair(a=1, b=2), Pair(a=3, b=4)],
        "010002030004",
        [{"name": "x", "array_len": 2, "type": "struct", "struct": PAIR, "size": 3}],
    ),
    "array of buffers": (
        array(buffer(1), 2),
        [b"a", b"b"],
        "6162",
        entry("buffer", 1, array_len=2),
    ),
    "array of what varies": (
        array(gbytearray(), 2),
        [b"", b"a"],
        "000000000000000161",
        [
            {"name": "x", "index": 0, "type": "GByteArray", "size": 4},
            {"name": "x", "index": 1, "type": "GByteArray", "size": 5},
        ],
    ),
    "one of what varies": (array(gbytearray(), 1), [b"a"], "0000000161", entry("GByteArray", 5)),
    "qtailq": (qtailq(Pair), [Pair(a=1, b=2)], "0101000200", entry("qtailq", 5)),
    "qlist": (qlist(u8), [5, 6], "0105010600", entry("qlist", 5)),
    "empty qtailq": (qtailq(Pair), [], "00", entry("qtailq", 1)),
    "gtree": (
        gtree(u8),
        {7: 1, 2: 3},
        "00000002010000000000000002030100000000000000070100",
        entry("gtree", 25),
    ),
    "gtree with keys of a class": (
        gtree(Pair, key=u16),
        {1: Pair(a=1, b=2)},
        "0000000101000101000200",
        entry("gtree", 11),
    ),
    "u8_equal": (wd.u8_equal(default=4), 4, "04", entry("uint8 equal", 1)),
    "u16_equal": (wd.u16_equal(default=4), 4, "0004", entry("uint16 equal", 2)),
    "i32_equal": (wd.i32_equal(default=-4), -4, "fffffffc", entry("int32 equal", 4)),
    "u32_equal": (wd.u32_equal(default=4), 4, "00000004", entry("uint32 equal", 4)),
    "i64_equal": (wd.i64_equal(default=-1), -1, "ff" * 8, entry("int64 equal", 8)),
    "u64_equal": (wd.u64_equal(default=1), 1, "0000000000000001", entry("int64 equal", 8)),
    "int32_le": (wd.int32_le(default=9), 9, "00000009", entry("int32 le", 4)),
}


@pytest.mark.parametrize(("field", "value", "wire", "entries"), WIRE.values(), ids=WIRE)
def test_bytes_and_description_of_each_type(field, value, wire, entries):
    cls = one(field)
    payload, described = encode(cls(x=value))
    assert payload == bytes.fromhex(wire)
    if entries is not None:
        assert described == {"vmsd_name": "one", "version": 1, "fields": entries}
    loaded = cls()
    decode(loaded, bytes.fromhex(wire))
    assert loaded.x == value
    assert walked(described, payload)


def walked(members, payload):
    """What the description says covers the payload."""
    text = vmdesc.encode(4096, [{"name": "d", "instance_id": 0} | members])
    (device,) = vmdesc.parse(text).devices
    return b"".join(i.data for i in vmdesc.walk(device, payload)) == payload


def test_missing_elements_of_a_pointer_array_are_marked():
    cls = one(pointers(Pair, 5))
    obj = cls(x=[None, None, Pair(a=1), Pair(a=2), None])
    payload, described = encode(obj)
    assert payload == b"00" + b"\1\0\0" + b"\2\0\0" + b"0"
    assert described["fields"] == [
        {"name": "x", "array_len": 2, "type": "nullptr", "size": 1},
        {"name": "x", "array_len": 2, "type": "struct", "struct": PAIR, "size": 3},
        {"name": "x", "index": 4, "type": "nullptr", "size": 1},
    ]
    assert walked(described, payload)
    there = [Pair(), Pair()]
    loaded = cls(x=[None, None, *there, None])
    decode(loaded, payload)
    assert loaded == obj
    assert loaded.x[2] is there[0]
    with pytest.raises(StreamError, match=r"x\[2\].*no such element"):
        decode(cls(x=[None, None, None, Pair(), None]), payload)


def test_unused_bytes_are_zero_and_ignored():
    @vmstate("u")
    class WithUnused:
        _old: None = unused(2)
        x: int = u8()
        _older: None = unused(1)

    payload, described = encode(WithUnused(x=5))
    assert payload == b"\0\0\5\0"
    assert [f["name"] for f in described["fields"]] == ["unused[0]", "x", "unused[1]"]
    loaded = WithUnused()
    decode(loaded, b"\xaa\xbb\6\xcc")
    assert loaded == WithUnused(x=6)


def test_a_helper_holds_values_in_another_form():
    @vmstate("x87", version_id=0)
    class Register:
        mantissa: int = u64()
        exponent: int = u16()

        def pre_save(self):
            self.mantissa, self.exponent = (
                self.parent.value & (1 << 64) - 1,
                self.parent.value >> 64,
            )

        def post_load(self, version_id):
            self.parent.value = self.exponent << 64 | self.mantissa

    @vmstate("fpu")
    class Fpu:
        value: int = 0
        _value: None = tmp(Register, name="tmp")

    payload, described = encode(Fpu(value=0x3FFF8000000000000001))
    assert payload.hex() == "80000000000000013fff"
    assert described["fields"] == [
        {
            "name": "tmp",
            "type": "tmp",
            "vmsd_name": "x87",
            "version": 0,
            "fields": [
                {"name": "mantissa", "type": "uint64", "size": 8},
                {"name": "exponent", "type": "uint16", "size": 2},
            ],
            "size": 10,
        }
    ]
    loaded = Fpu()
    decode(loaded, payload)
    assert loaded.value == 0x3FFF8000000000000001
    assert walked(described, payload)


# ---- presence: versions and conditions


@vmstate("gated", version_id=3, minimum_version_id=1)
class Gated:
    always: int = u8()
    later: int = u8(since=2)
    once: int = u8(until=1)
    flag: int = u8()
    extra: int = u8(exists=lambda obj: obj.flag & 1)


@pytest.mark.parametrize(
    ("version", "wire", "expected"),
    [
        (1, b"\1\2\0", Gated(always=1, once=2)),
        (2, b"\1\2\0", Gated(always=1, later=2)),
        (3, b"\1\2\1\7", Gated(always=1, later=2, flag=1, extra=7)),
    ],
)
def test_fields_of_other_versions(version, wire, expected):
    loaded = Gated()
    decode(loaded, wire, version=version)
    assert loaded == expected


def test_the_newest_version_is_saved():
    payload, described = encode(Gated(always=1, later=2, once=9, flag=0, extra=8))
    assert payload == b"\1\2\0"
    assert [f["name"] for f in described["fields"]] == ["always", "later", "flag"]


def test_names_are_numbered_over_all_fields_of_the_class():
    @vmstate("pci")
    class Device:
        express: int = u8()
        small: int = u8(name="config", exists=lambda d: not d.express)
        large: int = u16(name="config", exists=lambda d: d.express)

    _, described = encode(Device(express=1))
    assert [f["name"] for f in described["fields"]] == ["express", "config[1]"]


def test_elements_with_conditions_are_listed_one_by_one():
    payload, described = encode(one(array(Gated, 2))(x=[Gated(), Gated(flag=1)]))
    first, second = described["fields"]
    assert (first["index"], first["size"], second["index"], second["size"]) == (0, 3, 1, 4)
    assert "array_len" not in first
    assert walked(described, payload)


# ---- subsections


@vmstate("irq", version_id=2, minimum_version_id=1)
class Irq:
    level: int = u8()
    line: int = u8(since=2)

    def needed(self):
        return self.level != 0


@vmstate("deep")
class Deep:
    x: int = u8()


@vmstate("ext")
class Extension:
    y: int = u8()
    deep: Deep = subsection(Deep, needed=lambda ext: ext.y > 1)


@vmstate("dev")
class Dev:
    a: int = u8()
    irq: Irq = subsection(Irq)
    ext: Extension = subsection(Extension, needed=lambda dev: dev.a > 1)


def sub(name, version, payload=b""):
    return b"\5" + bytes([len(name)]) + name.encode() + pystruct.pack(">I", version) + payload


def test_subsections_are_sent_when_needed():
    assert encode(Dev(a=1))[0] == b"\1"
    dev = Dev(a=2, irq=Irq(level=3, line=4), ext=Extension(y=5, deep=Deep(x=6)))
    payload, described = encode(dev)
    assert payload == (
        b"\2"
        + sub("dev/irq", 2, b"\3\4")
        + sub("dev/ext", 1, b"\5" + sub("dev/ext/deep", 1, b"\6"))
    )
    assert [s["vmsd_name"] for s in described["subsections"]] == ["dev/irq", "dev/ext"]
    nested = described["subsections"][1]["subsections"]
    assert nested == [
        {
            "vmsd_name": "dev/ext/deep",
            "version": 1,
            "fields": [{"name": "x", "type": "uint8", "size": 1}],
        }
    ]
    assert walked(described, payload)
    loaded = Dev()
    irq = loaded.irq
    decode(loaded, payload)
    assert loaded == dev
    assert loaded.irq is irq


def test_subsections_in_another_order_or_an_older_version():
    loaded = Dev()
    decode(loaded, b"\2" + sub("dev/ext", 1, b"\0") + sub("dev/irq", 1, b"\3"))
    assert loaded == Dev(a=2, irq=Irq(level=3), ext=Extension())


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (sub("dev/new", 1, b"\1"), "unknown subsection 'dev/new'"),
        (sub("device", 1), "unknown subsection 'device'"),
        (sub("dev/irq", 3, b"\3\4"), "unsupported version of subsection 'dev/irq'.*1 to 2"),
        (sub("dev/irq", 0, b"\3\4"), "unsupported version"),
        (sub("dev/irq", 1, b"\3") * 2, "unknown subsection 'dev/irq'.*dev/ext"),
    ],
)
def test_subsections_that_are_refused(tail, message):
    loaded = Dev()
    with pytest.raises(StreamError, match=message) as caught:
        decode(loaded, b"\2" + tail)
    assert caught.value.section == "dev"
    assert loaded == Dev()


@pytest.mark.parametrize(
    "behind", [b"", b"\5", b"\5\3dev", b"\5\7de", b"\5\7sev/irq", b"\5\0", b"\6\7dev/irq"]
)
def test_what_only_looks_like_a_subsection_is_left_alone(behind):
    loaded = Dev()
    inp = InStream(MemoryChannel(b"\2" + behind))
    decode_from(loaded, inp)
    assert loaded == Dev(a=2)
    assert inp.position == 1
    assert inp.read(len(behind)) == behind


def test_a_name_that_begins_with_the_parents_is_whole():
    """As QEMU's apic has a subsection apic_sipi."""

    @vmstate("apic_sipi")
    class Sipi:
        x: int = u8()

    @vmstate("apic")
    class Apic:
        sipi: Sipi = subsection(Sipi)

    assert encode(Apic())[0] == sub("apic_sipi", 1, b"\0")


def test_a_subsection_that_would_be_taken_for_anothers_is_refused():
    """The format says whose a subsection is by its name alone."""

    @vmstate("de")
    class Inner:
        x: int = u8()

    @vmstate("dev")
    class Outer:
        inner: Inner = struct(Inner)
        y: int = u8(exists=lambda obj: obj.inner.x == 1)
        irq: Irq = subsection(Irq)
        more: Irq2 = subsection(lambda: Irq2)

    @vmstate("irq2")
    class Irq2:
        x: int = u8()

        def needed(self):
            return self.x != 0

    apart = Outer(inner=Inner(x=1), irq=Irq(level=1))
    loaded = Outer()
    decode(loaded, encode(apart)[0])
    assert loaded == apart
    with pytest.raises(LocalError, match=r"'dev/irq' right behind 'de' would be taken"):
        encode(Outer(irq=Irq(level=1)))
    with pytest.raises(LocalError, match=r"'dev/irq2' right behind 'dev/irq' would be taken"):
        encode(Outer(inner=Inner(x=1), irq=Irq(level=1), more=Irq2(x=1)))


# ---- what a load does to the object


def test_objects_are_loaded_in_place():
    @vmstate("whole")
    class Whole:
        pair: Pair = struct(Pair)
        pairs: list[Pair] = array(Pair, 2)
        raw: bytearray = buffer(2, mutable=True)
        view: memoryview = buffer(2)

    memory = bytearray(4)
    obj = Whole(view=memoryview(memory)[1:3])
    parts = (obj.pair, *obj.pairs, obj.raw)
    decode(obj, b"\1\0\2\3\0\4\5\0\6abcd")
    assert parts[:3] == (Pair(a=1, b=2), Pair(a=3, b=4), Pair(a=5, b=6))
    assert parts[3] == b"ab"
    assert memory == b"\0cd\0"
    assert all(a is b for a, b in zip(parts, (obj.pair, *obj.pairs, obj.raw), strict=True))


def test_buffers_of_another_length_or_read_only_are_replaced():
    @vmstate("whole")
    class Whole:
        n: int = u8()
        raw: object = buffer("n")
        array: object = buffer(4, default=attrs.Factory(lambda: array_module.array("H", [1, 2])))
        fixed: object = buffer(1, default=memoryview(b"f"))

    obj = Whole(raw=bytearray(5))
    numbers = obj.array
    decode(obj, b"\2abWXYZg")
    assert obj.raw == bytearray(b"ab")
    assert isinstance(obj.raw, bytearray)
    assert obj.array is numbers
    assert numbers.tobytes() == b"WXYZ"
    assert obj.fixed == b"g"


def test_hooks_are_called_inner_objects_first():
    calls = []

    @vmstate("inner", version_id=7)
    class Inner:
        x: int = u8()

        def pre_save(self):
            calls.append("inner pre_save")

        def pre_load(self):
            calls.append(f"inner pre_load {self.x}")

        def post_load(self, version_id):
            calls.append(f"inner post_load {self.x} {version_id}")

    @vmstate("outer", version_id=2, minimum_version_id=1)
    class Outer:
        inner: Inner = struct(Inner)
        y: int = u8()

        def pre_save(self):
            calls.append("pre_save")
            self.y = 9

        def post_save(self):
            calls.append("post_save")

        def pre_load(self):
            calls.append("pre_load")

        def post_load(self, version_id):
            calls.append(f"post_load {self.inner.x} {self.y} {version_id}")

    payload, _ = encode(Outer(inner=Inner(x=4)))
    assert payload == b"\4\x09"
    assert calls == ["pre_save", "inner pre_save", "post_save"]
    calls.clear()
    decode(Outer(), payload, version=1)
    assert calls == ["pre_load", "inner pre_load 0", "inner post_load 4 7", "post_load 4 9 1"]


def test_post_save_is_called_after_a_failure_as_well():
    calls = []

    @vmstate("locked")
    class Locked:
        x: int = u8()

        def post_save(self):
            calls.append("post_save")

    with pytest.raises(LocalError, match="field x cannot be saved"):
        encode(Locked(x=256))
    assert calls == ["post_save"]


@pytest.mark.parametrize("hook", ["pre_save", "post_save"])
def test_a_failing_hook_of_the_source_is_named(hook):
    def fail(self):
        raise RuntimeError("out of luck")

    cls = vmstate("hooked")(type("Hooked", (), {hook: fail}))
    with pytest.raises(
        LocalError, match=rf"the section cannot be saved: {hook}\(\) of Hooked.*luck"
    ):
        encode(cls())


def test_a_refusal_by_post_load_takes_everything_back():
    @vmstate("strict")
    class Strict:
        first: Pair = struct(Pair)
        raw: bytearray = buffer(2)
        n: int = u8()

        def pre_load(self):
            self.n = 99

        def post_load(self, version_id):
            assert (self.first.a, self.raw, self.n) == (1, b"zz", 3)
            raise ValueError("n must be even")

    obj = Strict(raw=bytearray(b"ab"), n=4)
    first, raw = obj.first, obj.raw
    with pytest.raises(StreamError, match="n must be even"):
        decode(obj, b"\1\0\2zz\3")
    assert obj == Strict(raw=bytearray(b"ab"), n=4)
    assert first == Pair()
    assert raw == b"ab"
    assert obj.first is first
    assert obj.raw is raw


def test_validators_run_on_load_and_name_field_section_and_offset():
    @vmstate("port")
    class Port:
        mode: int = u8(validator=attrs.validators.in_((0, 1)))

    @vmstate("card")
    class Card:
        limit: int = u8()
        ports: list[Port] = array(Port, 2)
        used: int = u8()

    obj = Card()
    with pytest.raises(StreamError, match=r"field ports\[1\]\.mode cannot be loaded") as caught:
        decode(obj, b"\1\0\7\0")
    assert (caught.value.section, caught.value.offset) == ("card", 2)
    assert obj == Card()


def test_validators_and_conditions_see_what_was_loaded_before():
    def within(obj, attribute, value):
        assert isinstance(obj, Ranged)
        if value > obj.top:
            raise ValueError(f"beyond {obj.top}")

    @vmstate("ranged")
    class Ranged:
        low: int = u8()
        high: int = u8()
        value: int = u8(validator=within, exists=lambda obj: obj.is_open())

        @property
        def top(self):
            return self.high

        def is_open(self):
            return self.low < self.high

    obj = Ranged(low=0, high=255)
    decode(obj, b"\1\5\4")
    assert obj == Ranged(low=1, high=5, value=4)
    decode(obj, b"\5\5")
    with pytest.raises(StreamError, match="beyond 7"):
        decode(obj, b"\1\7\x08")


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_any_attrs_class_will_do(slots, frozen):
    @vmstate("mine")
    @attrs.define(slots=slots, frozen=frozen, kw_only=True)
    class Mine:
        other: str
        x: int = u8(validator=attrs.validators.lt(100))

    obj = Mine(other="kept")
    decode(obj, b"\5")
    assert obj == Mine(other="kept", x=5)


def test_subclasses_add_their_fields_behind():
    @vmstate("more")
    class More(Pair):
        c: int = u8()

    assert encode(More(a=1, b=2, c=3))[0] == b"\1\0\2\3"
    assert encode(Pair(a=1, b=2))[0] == b"\1\0\2"


# ---- what is refused


LIMITED = {
    "count": (array(u8, "n", limit=4), b"\5" + bytes(5), "n is not a possible count.*0 to 4"),
    "size": (buffer("n", limit=4), b"\5" + bytes(5), "n is not a possible count"),
    "bits": (bitmap("n", limit=4), b"\5" + bytes(8), "n is not a possible count"),
    "GByteArray": (gbytearray(limit=4), b"\0\xff\xff\xff\xff", "too long.*at most 4"),
    "list": (qtailq(u8, limit=2), b"\0" + b"\1a" * 3, "too many elements"),
    "list mark": (qtailq(u8), b"\0\2", "neither an element nor the end.*found 02"),
    "tree": (gtree(u8, limit=2), b"\0\0\0\0\3", "too many nodes"),
    "tree, more": (gtree(u8), b"\0\0\0\0\0\1", "more nodes than were announced"),
    "tree, fewer": (gtree(u8), b"\0\0\0\0\1\0", "fewer nodes than were announced"),
    "tree, key": (gtree(u8), b"\0\0\0\0\2" + (b"\1" + bytes(9)) * 2 + b"\0", "a key stands twice"),
    "bool": (wd.bool_(), b"\0\2", "not a boolean"),
    "equal": (wd.u8_equal(default=3), b"\0\2", "exactly 3, found 2"),
    "le": (wd.int32_le(default=3), b"\0\0\0\0\4", "at most 3, found 4"),
}


@pytest.mark.parametrize(("field", "wire", "message"), LIMITED.values(), ids=LIMITED)
def test_hostile_values_are_refused(field, wire, message):
    cls = vmstate("hostile")(attrs.make_class("Hostile", {"n": u8(), "x": field}))
    obj = cls()
    with pytest.raises(StreamError, match=f"field x.*{message}") as caught:
        decode(obj, wire)
    assert caught.value.section == "hostile"
    assert obj == cls()


def test_less_or_equal_takes_less():
    obj = one(wd.int32_le(default=3))()
    decode(obj, b"\0\0\0\2")
    assert obj.x == 2


def test_a_list_in_a_list_in_a_list_ends_somewhere():
    @vmstate("node")
    class Node:
        children: list[Node] = qtailq(lambda: Node)

    leaf = Node(children=[Node(), Node(children=[Node()])])
    payload, _ = encode(leaf)
    loaded = Node()
    decode(loaded, payload)
    assert loaded == leaf
    with pytest.raises(StreamError, match="nested too deep"):
        decode(Node(), b"\1" * 10_000)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (u8(), 256, r"field x cannot be saved"),
        (u8(), -1, r"field x cannot be saved"),
        (u8(), "a", r"field x cannot be saved"),
        (wd.float64(), "a", r"field x cannot be saved"),
        (buffer(2), b"abc", "expected 2 bytes, found 3"),
        (buffer(2), "ab", "expected bytes"),
        (array(u8, 2), [1], "expected 2, found 1"),
        (array(u8, 2), [1, 300], "field x cannot be saved"),
        (array(Pair, 1), [5], r"field x\[0\].*expected Pair"),
        (array(Pair, 1), [Pair(a=300)], r"field x\[0\]\.a cannot be saved"),
        (bitmap(8), 1 << 64, "8 bits"),
        (gbytearray(limit=2), b"abc", "at most 2"),
        (qtailq(u8, limit=1), [1, 2], "at most 1"),
        (gtree(u8), {1: 1, "a": 2}, "sorting the keys"),
        (u8(exists=lambda obj: obj.nothing), 1, "no attribute"),
    ],
)
def test_a_value_that_does_not_fit_is_named(field, value, message):
    with pytest.raises(LocalError, match=message) as caught:
        encode(one(field)(x=value), section="the-device")
    assert caught.value.section == "the-device"


def test_the_end_of_the_stream_names_the_field():
    with pytest.raises(EndOfStream, match=r"in field x\[1\]\.b") as caught:
        decode(one(array(Pair, 2))(), b"\1\0\2\3\0")
    assert (caught.value.section, caught.value.offset) == ("one", 5)


def test_bytes_behind_the_last_field_are_refused():
    obj = Pair()
    with pytest.raises(StreamError, match="bytes are left"):
        decode(obj, b"\1\0\2\3")
    assert obj == Pair()


# ---- mistakes in a declaration show at once


def test_mistakes_in_a_declaration():
    class Plain:
        pass

    with pytest.raises(TypeError, match="has no layout"):
        struct(Plain)
    with pytest.raises(TypeError, match="one array of all elements"):
        array(array(u8, 2), 2)
    with pytest.raises(TypeError, match="no field and no class"):
        array(5, 2)
    with pytest.raises(TypeError, match=r"'n' is no earlier field"):
        vmstate("x")(attrs.make_class("Late", {"x": array(u8, "n"), "n": u8()}))
    with pytest.raises(TypeError, match="not since="):
        subsection(Pair, since=2)
    with pytest.raises(ValueError, match="versions 3 to 2"):
        vmstate("x", version_id=2, minimum_version_id=3)(attrs.make_class("C", {}))
    for name in ("", "x" * 256, "käfer"):
        with pytest.raises(ValueError):
            vmstate(name)(attrs.make_class("C", {}))
    with pytest.raises(TypeError, match="has no layout"):
        encode(Plain())


def test_u32_is_not_u64():
    """The table above is only worth something if a wrong width is seen."""
    with pytest.raises(EndOfStream):
        decode(one(u64())(), encode(one(u32())(x=1))[0])
