"""Any layout, any values: what is saved is loaded, described to its last byte, and read the same when it comes in pieces."""

from __future__ import annotations

import copy
import struct
from functools import partial

import attrs
from hypothesis import given, settings, strategies as st

import whimbrel_device as wd
from whimbrel.errors import EndOfStream, StreamError
from whimbrel_device import decode, encode, layout_of, vmdesc, vmstate

SCALARS = {
    "bool_": st.booleans(),
    "timer": st.none() | st.integers(0, (1 << 63) - 1),
    "float64": st.floats(allow_nan=False),
    "cpu_double": st.floats(allow_nan=False),
    **{f"u{bits}": st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64)},
    **{f"i{bits}": st.integers(-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32, 64)},
}
U64 = st.integers(0, (1 << 64) - 1)
LEAVES = ("scalar", "buffer", "bitmap", "gbytearray")
SINGLE = (*LEAVES, "qtailq", "gtree", "struct")
ANY = (*SINGLE, "array", "array", "pointers")


class Maker:
    """Draws a field (what makes it, given options) together with a function that draws values for it."""

    def __init__(self, draw):
        self.draw = draw
        # Equal names, or one that begins with another, are refused where they would be ambiguous.
        self.classes = 10

    def field(self, depth, kinds=ANY):
        """(make(**options), value())"""
        kind = self.draw(st.sampled_from(kinds if depth else LEAVES))
        return getattr(self, kind)(depth)

    def scalar(self, depth):
        name = self.draw(st.sampled_from(sorted(SCALARS)))
        return getattr(wd, name), lambda: self.draw(SCALARS[name])

    def buffer(self, depth):
        size = self.draw(st.integers(0, 9))
        values = st.binary(min_size=size, max_size=size)
        return partial(wd.buffer, size), lambda: self.draw(values)

    def bitmap(self, depth):
        bits = self.draw(st.integers(0, 130))
        return partial(wd.bitmap, bits), lambda: self.draw(st.integers(0, (1 << bits) - 1))

    def gbytearray(self, depth):
        return wd.gbytearray, lambda: self.draw(st.binary(max_size=20))

    def qtailq(self, depth):
        make, value = self.field(depth - 1, SINGLE)
        return partial(wd.qtailq, make()), lambda: [value() for _ in self.few()]

    def gtree(self, depth):
        make, value = self.field(depth - 1, SINGLE)
        return partial(wd.gtree, make()), lambda: {self.draw(U64): value() for _ in self.few()}

    def array(self, depth):
        make, value = self.field(depth - 1, SINGLE)
        n = self.draw(st.integers(0, 4))
        return partial(wd.array, make(), n), lambda: [value() for _ in range(n)]

    def pointers(self, depth):
        """Both sides have elements at the same places: a new object has them there as well."""
        cls, value = self.cls(depth - 1)
        there = self.draw(st.lists(st.booleans(), max_size=5))
        default = attrs.Factory(lambda: [cls() if p else None for p in there])
        made = partial(wd.pointers, cls, len(there), default=default)
        return made, lambda: [value() if p else None for p in there]

    def struct(self, depth):
        cls, value = self.cls(depth - 1)
        return partial(wd.struct, cls), value

    def few(self):
        return range(self.draw(st.integers(0, 3)))

    def cls(self, depth):
        """A class of up to four fields, the last perhaps conditional, and up to two subsections."""
        fields = [self.field(depth) for _ in range(self.draw(st.integers(0, 4)))]
        gated = self.draw(st.booleans())
        subs = SUBS[: self.draw(st.integers(0, 2))]
        body = {
            "gate": wd.bool_()
        }  # something that is always there: empty structs are ambiguous as well
        for k, (make, _) in enumerate(fields):
            last = gated and k == len(fields) - 1
            body[f"f{k}"] = make(exists=lambda obj: obj.gate) if last else make()
        for k, sub in enumerate(subs):
            body[f"s{k}"] = wd.subsection(sub, needed=lambda obj, k=k: getattr(obj, f"s{k}").flag)
        self.classes += 1
        cls = vmstate(f"c{self.classes:02}")(attrs.make_class("Made", body))

        def value():
            obj = cls()
            if gated:  # else it is false
                obj.gate = self.draw(st.booleans())
            for k, (_, field_value) in enumerate(fields):
                if k < len(fields) - 1 or not gated or obj.gate:
                    setattr(obj, f"f{k}", field_value())
            for k, sub in enumerate(subs):
                if self.draw(st.booleans()):
                    setattr(obj, f"s{k}", sub(flag=True, x=self.draw(SCALARS["u16"])))
            return obj

        return cls, value


def flagged(name):
    return vmstate(name)(attrs.make_class("Sub", {"flag": wd.bool_(), "x": wd.u16()}))


SUBS = [flagged("one"), flagged("two")]


@st.composite
def devices(draw):
    """(an object with values, a fresh one)"""
    cls, value = Maker(draw).cls(3)
    obj, fresh = value(), cls()
    return obj, fresh


@settings(max_examples=150, deadline=None)
@given(devices())
def test_any_device_comes_back(pair):
    obj, loaded = pair
    payload, members = encode(obj)
    decode(loaded, payload)
    assert loaded == obj
    assert encode(loaded) == (payload, members)
    text = vmdesc.encode(4096, [{"name": "made", "instance_id": 0} | members])
    (device,) = vmdesc.parse(text).devices
    assert device.payload_size(memoryview(payload + b"more")) == len(payload)
    pieces = list(vmdesc.walk(device, payload))
    assert b"".join(p.data for p in pieces) == payload


@settings(max_examples=100, deadline=None)
@given(devices(), st.data())
def test_any_damage_is_an_error_or_another_device(pair, data):
    obj, loaded = pair
    payload, _ = encode(obj)
    damaged = bytearray(payload)
    if damaged and data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    untouched = copy.deepcopy(loaded)
    try:
        decode(loaded, bytes(damaged))
    except (StreamError, EndOfStream) as error:
        assert error.section == layout_of(type(obj)).name
        assert error.offset is not None
        assert loaded == untouched


@given(U64)
def test_doubles_keep_their_bits(pattern):
    cls = vmstate("d")(attrs.make_class("D", {"x": wd.float64(), "y": wd.cpu_double()}))
    raw = struct.pack(">QQ", pattern, pattern)
    obj = cls()
    decode(obj, raw)
    assert encode(obj)[0] == raw
