"""The JSON reader, without a socket: what it takes, what it says to the rest, and how it goes on. The texts are those that
QEMU 7.2 answers with; tests/monitor/test_as_qemu.py asks it.
"""

import json
import tracemalloc

import pytest
from hypothesis import given, strategies as st

from whimbrel_monitor.reader import Limits, Reader, SyntaxFault


def read(data, *, pieces=None, limits=None):
    """Values as they are, faults as their texts."""
    reader, found = Reader(limits), []
    step = pieces or len(data) or 1
    for at in range(0, len(data), step):
        reader.feed(data[at : at + step])
        found += [v.text if isinstance(v, SyntaxFault) else v for v in reader]
    return found


def fault(text):
    return f"JSON parse error, {text}"


STRAY_REST = fault("expecting value")

RIGHT = [
    (b'{"execute":"a"}{"execute":"b"}\r\n {"c":[1,2,{"d":null}]}\n', 3),
    (b"{'it\\'s':'\"'}", 1),
    (b'[][{}][[],{},[{}]]"x" 5 true false null ', 8),
]


@pytest.mark.parametrize("pieces", [1, 2, 7, None])
@pytest.mark.parametrize(("data", "count"), RIGHT)
def test_values_need_no_separators(data, count, pieces):
    assert len(read(data, pieces=pieces)) == count


def test_a_value_is_there_as_soon_as_it_is_whole():
    assert read(b'{"a":1}') == [{"a": 1}]
    assert read(b'{"a":1') == []
    assert read(b"5") == []  # it may go on
    assert read(b"5 ") == [5]


WORDS = {
    b'"\\u00e9\\n\\/\\ud83d\\ude00\\u0000\\\'"': "é\n/😀\x00'",
    '"é😀"'.encode(): "é😀",
    b"-0 ": 0,
    b"1e3 ": 1000,
    b"18446744073709551616 ": 1 << 64,
    b"-1.5E-2 ": -0.015,
}


@pytest.mark.parametrize("data", WORDS)
@pytest.mark.parametrize("pieces", [1, None])
def test_words(data, pieces):
    assert read(data, pieces=pieces) == [WORDS[data]]


AFTER = b'{"e":1}'
WRONG = {
    b'{"a" "b"}': [fault("missing : in object pair")],
    b'{"a":1,}': [fault("expecting value")],
    b"{,}": [fault("expecting value")],
    b"{1:2}": [fault("key is not a string in object")],
    b'{{"a":1}:2}': [fault("key is not a string in object")],
    b'{"a":1 "b":2}': [fault("expected separator in dict")],
    b"[1 2]": [fault("expected separator in list")],
    b"[1,2}]}": [fault("expected separator in list"), STRAY_REST, STRAY_REST],
    b'{"a":[1,2}}': [fault("expected separator in list")],
    b"}": [fault("expecting value")],
    b"{]": [fault("expecting value")],
    b'{"a":1,"a":2}': [fault("duplicate key")],
    b'{"a":nope}': [fault("invalid keyword 'nope'")],
    b"@abc 12 ": [fault("stray '@'")],
    b"@abc\n5 ": [fault("stray '@'"), 5],
    b"nope@": [fault("invalid keyword 'nope'"), fault("stray '@'")],
    b"Nope": [fault("stray 'N'")],
    b'{"a":01}': [fault("stray '01'"), STRAY_REST],
    b'{"a":-}': [fault("stray '-}'")],
    b'{"a":1.}': [fault("stray '1.}'")],
    b"1.5e+ 3": [fault("stray '1.5e+ '")],
    b'{"a":1e999}': [fault("stray '1e999'"), STRAY_REST],
    b'{"a":"b\nc"}': [fault("stray '\"b\n'"), STRAY_REST],
    b'{"a":"\xff': [fault("stray '\"\ufffd'")],
    b"\xff\xff\n": [fault("stray '\ufffd'")] * 2,
    b'{"a":"\xc3"}': [fault("invalid UTF-8 sequence in string")],
    b'{"a":"\\x"}': [fault("invalid escape sequence in string")],
    b'{"a":"\\u12"}': [fault('\\u12" is not a valid Unicode character')],
    b'{"a":"\\ud800\\u0041"}': [fault("\\ud800 is not a valid Unicode character")],
    b'{"a":"\\udc00"}': [fault("\\udc00 is not a valid Unicode character")],
    b'{"a":"\\uffff"}': [fault("\\uffff is not a valid Unicode character")],
}


@pytest.mark.parametrize("pieces", [1, None])
@pytest.mark.parametrize("data", WRONG)
def test_a_mistake_is_named_and_the_next_object_is_read(data, pieces):
    assert read(data + AFTER, pieces=pieces) == [*WRONG[data], {"e": 1}]


@pytest.mark.parametrize("begun", [b'{"a":', b'{"a":"b', b'{"a', b"[[[[", b"12", b"tru"])
def test_a_byte_ff_ends_what_was_begun(begun):
    assert read(begun + b"\xff" + AFTER)[-1] == {"e": 1}


SMALL = Limits(size=100, tokens=50, nesting=10)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"a":"' + b"x" * 200, "JSON token size limit exceeded"),
        (b'{"a":"' + b"x" * 60 + b'","b":"' + b"x" * 60, "JSON token size limit exceeded"),
        (b"[" + b"1," * 60, "JSON token count limit exceeded"),
        (b"[" * 11, "JSON nesting depth limit exceeded"),
    ],
)
def test_limits(data, what):
    found = read(data + b"\xff" + AFTER, limits=SMALL)
    assert found[0] == what
    assert found[-1] == {"e": 1}


def test_what_is_just_within_the_limits():
    wide = b"[" + b",".join([b"[1]"] * 4000) + b"]"
    assert read(wide) == [[[1]] * 4000]
    nested = b"[" * 512 + b"]" * 512
    assert len(read(nested)) == 1
    long = b'"' + b"x" * (256 * 1024 - 2) + b'"'
    assert read(long) == ["x" * (256 * 1024 - 2)]


@pytest.mark.parametrize(
    "flood",
    [
        b'"' + b"x" * 999,
        b"[",
        b"{",
        b'{"a":',
        b"1 ",
        b"1,",
        b"}",
        b"\\",
        b'"\\"',
        b" ",
        b"a",
        b"\xff",
    ],
)
def test_memory_is_bounded_whatever_comes(flood):
    """By the limits: so with those that are a sixteenth of the usual ones, for the sake of time."""
    reader = Reader(Limits(size=16 << 10, tokens=1 << 10, nesting=64))
    chunk = flood * (1024 // len(flood))
    tracemalloc.start()
    try:
        for _ in range(40):
            reader.feed(chunk)
            for _ in reader:
                pass
        assert tracemalloc.get_traced_memory()[1] < 384 << 10
    finally:
        tracemalloc.stop()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cn"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="ascii")), inner),
    max_leaves=20,
)


@given(st.lists(JSON, max_size=5), st.integers(1, 9), st.booleans())
def test_what_json_writes_is_read(values, pieces, ascii_only):
    data = " ".join(json.dumps(v, ensure_ascii=ascii_only) for v in values).encode() + b" "
    assert read(data, pieces=pieces) == values


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_in_any_pieces(data, pieces):
    whole = read(data + b"\xff\n")
    assert read(data + b"\xff\n", pieces=pieces) == whole
    assert read(data + b"\xff\n" + AFTER)[-1] == {"e": 1}
    json.dumps(whole, allow_nan=False)  # all of it could be an id
