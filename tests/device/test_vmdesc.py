"""Descriptions of others: bounds, mistakes, forms that no QEMU at hand writes."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, strategies as st

from whimbrel.errors import StreamError
from whimbrel_device import vmdesc


def top(*devices):
    return json.dumps({"page_size": 4096, "devices": devices}).encode()


def device(*fields, **more):
    head = {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1}
    return {**head, "fields": list(fields), **more}


def field(size, kind="buffer", name="f", **more):
    return {"name": name, "type": kind, "size": size, **more}


def struct(*fields, **more):
    return {"vmsd_name": "s", "version": 1, "fields": list(fields), **more}


def only(text):
    (found,) = vmdesc.parse(text).devices
    return found


def paths(text, payload):
    return [(i.path, i.type, bytes(i.data)) for i in vmdesc.walk(only(text), payload)]


def test_a_plain_device():
    text = top(device(field(2, "uint16", "a"), field(1, "uint8", "b")))
    assert only(text).size == 3
    assert paths(text, b"\1\2\3") == [("a", "uint16", b"\1\2"), ("b", "uint8", b"\3")]
    assert vmdesc.parse(text).section_lengths == (("d", 0, 3),)


def test_an_opaque_device():
    """As QEMU's slirp: no vmsd_name, no version."""
    text = top({"name": "slirp", "instance_id": 0, "size": 3, "fields": [field(3, name="data")]})
    assert paths(text, b"abc") == [("data", "buffer", b"abc")]


def test_arrays_by_length_and_by_index():
    element = struct(field(1, "uint8", "x"))
    text = top(
        device(
            field(1, "uint8", "n", array_len=2),
            field(1, "struct", "s", index=0, struct=element),
            field(2, "struct", "s", index=1, struct=struct(field(2, "uint16", "x"))),
        )
    )
    assert paths(text, b"\1\2\3\4\5") == [
        ("n[0]", "uint8", b"\1"),
        ("n[1]", "uint8", b"\2"),
        ("s[0].x", "uint8", b"\3"),
        ("s[1].x", "uint16", b"\4\5"),
    ]


def test_runs_of_missing_pointers_count_on():
    text = top(
        device(
            field(1, "nullptr", "p", array_len=2),
            field(2, "uint16", "p", array_len=2),
            field(1, "nullptr", "p", index=4),
        )
    )
    found = paths(text, b"00" + bytes(4) + b"0")
    assert [p for p, _, _ in found] == ["p[0]", "p[1]", "p[2]", "p[3]", "p[4]"]


def test_subsections_at_every_depth():
    deep = {"vmsd_name": "d/a/b", "version": 2, "fields": [field(1)]}
    middle = {"vmsd_name": "d/a", "version": 1, "fields": [], "subsections": [deep]}
    text = top(device(field(1), subsections=[middle]))
    payload = b"x" + b"\5\3d/a\0\0\0\1" + b"\5\5d/a/b\0\0\0\2" + b"y"
    assert only(text).payload_size(memoryview(payload + b"more")) == len(payload)
    assert b"".join(data for _, _, data in paths(text, payload)) == payload
    for place in range(1, len(payload) - 1):
        changed = bytearray(payload)
        changed[place] ^= 0x40
        with pytest.raises(StreamError, match="no subsection d/a"):
            only(text).payload_size(memoryview(changed))
        with pytest.raises(StreamError, match="no subsection d/a"):
            paths(text, bytes(changed))


def test_members_in_the_field_itself():
    for kind in ("vstruct", "tmp"):
        inline = {"name": "v", "type": kind, **struct(field(2, "uint16", "x")), "size": 2}
        assert paths(top(device(inline)), b"\1\2") == [("v.x", "uint16", b"\1\2")]


def test_lists_are_opaque_even_with_repeated_keys():
    """Two elements of a list: the members of their layout stand twice in one JSON object."""
    layout = '"vmsd_name": "e", "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1}]'
    for kind in ("qtailq", "qlist", "gtree", "tmp"):
        entry = f'{{"name": "l", "type": "{kind}", {layout}, {layout}, "size": 5}}'
        text = f'{{"page_size": 4096, "devices": [{{"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": [{entry}]}}]}}'
        assert paths(text.encode(), b"\1a\1b\0") == [("l", kind, b"\1a\1b\0")]


def test_a_struct_whose_layout_does_not_add_up_is_as_long_as_it_says():
    text = top(device(field(3, "struct", "s", struct=struct(field(1))), field(1, name="t")))
    assert paths(text, b"abcd") == [("s", "struct", b"abc"), ("t", "buffer", b"d")]


def test_configuration_and_an_empty_text():
    text = b'{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": []}, "page_size": 4096, "devices": []}'
    configuration = vmdesc.parse(text).configuration
    assert configuration is not None
    assert configuration.name == "configuration"
    assert vmdesc.parse(b"").devices == ()


DEEP = struct(field(1))
for _ in range(vmdesc.MAX_DEPTH + 1):
    DEEP = struct(field(1, "struct", struct=DEEP))

BAD = {
    "not JSON": b"{",
    "not ASCII": "{'ä'}".encode(),
    "a list": b"[]",
    "nothing in it": b"{}",
    "deep brackets": b"[" * 200_000,
    "page size of a string": b'{"page_size": "4096", "devices": []}',
    "page size true": b'{"page_size": true, "devices": []}',
    "page size NaN": b'{"page_size": NaN, "devices": []}',
    "many digits": b'{"page_size": ' + b"9" * 10_000 + b', "devices": []}',
    "devices an object": b'{"page_size": 1, "devices": {}}',
    "device a number": b'{"page_size": 1, "devices": [1]}',
    "no instance": top({"name": "d", "vmsd_name": "d", "version": 1, "fields": []}),
    "negative size": top(device(field(-1))),
    "size of a float": top(device(field(1.5))),
    "too long": top(device(field(vmdesc.MAX_SIZE + 1))),
    "too long an array": top(device(field(vmdesc.MAX_SIZE // 2, array_len=3))),
    "negative count": top(device(field(1, array_len=-1))),
    "no type": top(device({"name": "x", "size": 1})),
    "long name": top(device(field(1, name="n" * 5000))),
    "struct a string": top(device(field(1, "struct", struct="x"))),
    "subsection without a name": top(device(subsections=[{"fields": []}])),
    "subsection with a long name": top(
        device(subsections=[{"vmsd_name": "x" * 256, "version": 1, "fields": []}])
    ),
    "sizes that differ": top(device(field(1), size=2)),
    "deep structs": top(device(field(1, "struct", struct=DEEP))),
    "repeated key": b'{"page_size": 1, "devices": [{"name": "d", "instance_id": 0, "fields": [], "fields": []}]}',
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_no_description(text):
    with pytest.raises(StreamError) as caught:
        vmdesc.parse(text)
    assert caught.value.section == "vmdescription"


def test_the_device_with_the_mistake_is_named():
    with pytest.raises(StreamError, match="in the description of 'd'"):
        vmdesc.parse(top(device(field(-1))))


def test_claims_without_bytes_cost_nothing(monkeypatch):
    """An array of 2**40 empty elements is walked as quickly as one."""
    text = top(device(field(0, array_len=1 << 40), field(1)))
    assert len(paths(text, b"x")) == 2
    monkeypatch.setattr(vmdesc, "MAX_ITEMS", 5000)
    nested = struct(*[field(0)] * 2000, field(1))
    text = top(device(field(1, "struct", array_len=1 << 20, struct=nested)))
    with pytest.raises(StreamError, match="too many pieces.*5000"):
        list(vmdesc.walk(only(text), bytes(1 << 20)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "instance_id",
                    "vmsd_name",
                    "version",
                    "fields",
                    "type",
                    "size",
                    "struct",
                    "index",
                    "array_len",
                    "subsections",
                    "devices",
                    "page_size",
                    "configuration",
                ]
            ),
            children,
            max_size=8,
        )
    ),
    max_leaves=20,
)


def passes(device, payload):
    """What it takes of the payload, or why it does not."""
    try:
        return device.payload_size(memoryview(payload))
    except StreamError as error:
        return str(error)


@pytest.mark.parametrize(
    "text",
    [BAD[name] for name in BAD if name not in ("too long", "too long an array", "deep structs")],
)
def test_extents_of_what_is_no_description(text):
    """Never anything but a StreamError; some are only found by who looks inside of fields."""
    with contextlib.suppress(StreamError):
        vmdesc.extents(text)


def test_extents_are_those_of_the_description():
    inner = struct(field(2), vmsd_name="d/sub/inner")
    sub = struct(field(4), vmsd_name="d/sub", subsections=[inner])
    text = top(device(field(3, array_len=2), subsections=[sub, struct(vmsd_name="d/b")]), device())
    found, described = vmdesc.extents(text), vmdesc.parse(text).devices
    assert [e.size for e in found] == [d.size for d in described]
    first, second = described[0].vmsd.subsections
    payload = bytes(6) + first.header + bytes(4) + first.subsections[0].header + bytes(2)
    payload += second.header
    assert passes(found[0], payload + b"more") == len(payload)
    for i in range(len(payload)):
        changed = payload[:i] + bytes((payload[i] ^ 1,)) + payload[i + 1 :]
        assert passes(found[0], changed) == passes(described[0], changed)
        assert passes(found[0], payload[:i]) == passes(described[0], payload[:i])


@given(json_values, st.binary(max_size=40))
def test_any_json_is_a_description_or_an_error(value, payload):
    text = json.dumps(value).encode()
    try:
        description = vmdesc.parse(text)
    except StreamError:
        with contextlib.suppress(StreamError):
            vmdesc.extents(text)
        return
    extents = vmdesc.extents(text)
    assert [(e.name, e.instance_id, e.size) for e in extents] == [
        (d.name, d.instance_id, d.size) for d in description.devices
    ]
    for found, extent in zip(description.devices, extents, strict=True):
        assert passes(extent, payload) == passes(found, payload)
        try:
            size = found.payload_size(memoryview(payload))
            pieces = list(vmdesc.walk(found, payload[:size]))
        except StreamError:
            continue
        assert b"".join(p.data for p in pieces) == payload[:size]


@given(st.data())
def test_changed_bits_in_a_description(data):
    text = bytearray(
        top(device(field(1, "struct", struct=struct(field(1))), field(2, array_len=3)))
    )
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        vmdesc.parse(bytes(text))
    except StreamError as error:
        assert error.section == "vmdescription"


# ---- where it lies


def stream(body, text):
    return body + b"\6" + len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize("length", [0x06, 0x0606, 0x060606 // 16, 300])
@pytest.mark.parametrize("body", [b"", b"\0", b"\6" * 20, b"\6\0\0\0\2{}\0"])
def test_found_at_the_end(length, body):
    text = b'{"page_size": 1, "devices": []}'.ljust(length) if length > 31 else b"{}".ljust(length)
    assert vmdesc.find(stream(body, text)) == (len(body), text)
    assert vmdesc.find(memoryview(stream(body, text))) == (len(body), text)


@pytest.mark.parametrize(
    "data", [b"", b"\6", b"\6\0\0\0", b"\6\0\0\0\2[]", stream(b"", b"{}") + b"x"]
)
def test_not_found(data):
    assert vmdesc.find(data) is None


def test_an_empty_one_is_found():
    assert vmdesc.find(b"\0\6\0\0\0\0") == (1, b"")
