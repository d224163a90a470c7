"""The same bytes to a QEMU 7.2 and to our monitor: mistakes of syntax, what is no request, descriptors. The same answers."""

import itertools
import json
import os

import pytest

pytestmark = pytest.mark.interop

#: Each is followed by a right request, whose answer is the last one that is compared.
SYNTAX = [
    b"{} [] 'x' 5 true ",
    b'{"a" "b"}',
    b'{"a":1,}',
    b"{,}",
    b"{1:2}",
    b'{{"a":1}:2}',
    b'{"a":1 "b":2}',
    b"[1 2]",
    b"[1,]",
    b"[1,2}]}",
    b'{"a":[1,2}}',
    b"}",
    b"{]",
    b'{"a":1,"a":2}',
    b'{"a":nope}',
    b"@abc 12 ",
    b"@abc\n5 ",
    b"@@ x\t1 ",
    b"nope@",
    b"Nope",
    b"nulll ",
    b"12abc ",
    b'{"a":01}',
    b'{"a":-}',
    b'{"a":1.}',
    b"1.5e+ 3",
    b'{"a":"b\nc"}',
    b'{"a":"b\x01"}',
    b'{"a":"\xff',
    b"\xff\xff\n",
    b'{"a":[[[\xff',
    b'{"a":"\xc3"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\\x"}',
    b'{"a":"\\u12"}',
    b'{"a":"\\u00zz"}',
    b'{"a":"\\ud800\\u0041"}',
    b'{"a":"\\ud800"}',
    b'{"a":"\\udc00"}',
    b'{"a":"\\uffff"}',
    b'{"a":"\\ufdd0"}',
    b'{"execute":"query-status","id":@,"x":1}',
    b'{"execute":5}',
    b'{"execute":"query-status","arguments":[]}',
    b'{"execute":"query-status","arguments":null,"id":1}',
    b'{"execute":"query-status","foo":1,"id":2}',
    b'{"id":{"a":[]}}',
    b'{"execute":""}',
    b'{"execute":"a%s\\u00e9\\n"}',
    b'{"execute":"query-status","arguments":{"x":1}}',
    b"{'execute':'query-commands-not','id':'it\\'s \"x\"'}",
]


#: Values of no parameter; which numbers a parameter takes is told in other words here.
VALUES = ['"4"', "1.5", "true", "null", "[]", "18446744073709551616", "-9223372036854775809"]
SMALL = [*VALUES, "256", "-1"]
SETTING = [
    f'{{"execute":"migrate-set-parameters","arguments":{{"{name}":{value}}}}}'.encode()
    for name, values in (
        ("cpu-throttle-initial", SMALL),
        ("multifd-channels", SMALL),
        ("max-bandwidth", VALUES),
        ("downtime-limit", VALUES),
        ("cpu-throttle-tailslow", ["1", '"on"', "null"]),
        ("multifd-compression", ["1", '"zz"', "null"]),
    )
    for value in values
]


@pytest.fixture
def pair(app, qemu, tmp_path):
    """Clients of both, by the same means, beside a QEMU of that version."""
    from types import SimpleNamespace

    def make(version):
        address = f"unix:{tmp_path}/qemu.qmp"
        args = ("-M", "none", "-qmp", f"{address},server=on,wait=off", "-S")
        qemu(*args, version=version)
        ours = app()
        theirs = type(ours).stranger(SimpleNamespace(address=address, clients=ours.clients))
        return ours.client(), theirs.negotiate()

    return make


@pytest.fixture
def two(pair):
    return pair("7.2")


def answers(wire, data, number):
    """Up to that of a request behind it."""
    wire.send(data + b'{"execute":"no-such","id":"end %d"}' % number)
    told = []
    while not told or told[-1].get("id") != f"end {number}":
        told.append(wire.line())
    return told


def test_what_is_wrong_is_said_alike(two):
    ours, theirs = two
    for number, data in enumerate(SYNTAX + SETTING):
        assert answers(ours, data, number) == answers(theirs, data, number), data


#: Each after those before it.
THROTTLES = [
    {"max-cpu-throttle": 10},
    {"max-cpu-throttle": 20},
    {"cpu-throttle-initial": 30},
    {"cpu-throttle-initial": 30, "max-cpu-throttle": 25},
    {"cpu-throttle-initial": 30, "max-cpu-throttle": 30},
    {"max-cpu-throttle": 29},
    {"cpu-throttle-initial": 99},
    {"max-cpu-throttle": 40, "cpu-throttle-initial": 10},
    {"cpu-throttle-increment": 99},
    {"max-cpu-throttle": 100},
    {"cpu-throttle-initial": 0},
    {"cpu-throttle-initial": 5, "multifd-channels": 0},
]


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_what_the_throttle_may_be_set_to(pair, version):
    """The same is taken and refused, and stands afterwards; the words are ours."""
    names = ("cpu-throttle-initial", "cpu-throttle-increment", "max-cpu-throttle")
    told = []
    for wire in pair(version):
        steps = []
        for values in THROTTLES:
            taken = "return" in wire.reply("migrate-set-parameters", **values)
            now = wire.reply("query-migrate-parameters")["return"]
            steps.append((values, taken, [now[n] for n in names]))
        told.append(steps)
    assert told[0] == told[1]
    assert {taken for _, taken, _ in told[1]} == {True, False}


def test_descriptors(two):
    numbers = itertools.count()
    fd = os.open(os.devnull, os.O_RDWR)

    def steps(wire):
        def say(command, fds=(), **arguments):
            return wire.reply(command, fds, **arguments)

        yield say("getfd", fdname="a")
        yield say("getfd", [fd], fdname="1a")
        yield say("getfd", fdname="a")
        yield say("getfd", [fd], fdname="a")
        yield say("getfd", [fd], fdname="a")
        yield say("closefd", fdname="a")
        yield say("closefd", fdname="a")
        wire.send(" ", [fd, fd, fd])
        yield say("query-fdsets")
        yield say("getfd", fdname="a")
        yield say("getfd", fdname="b")
        wire.send(" ", [fd])
        wire.send(" ", [fd])
        yield say("getfd", fdname="a")
        yield say("getfd", fdname="b")
        yield say("add-fd", fdset_id=-1)
        yield say("add-fd", [fd], fdset_id=-1)
        yield say("add-fd", [fd])["return"]["fdset-id"]
        yield say("add-fd", [fd], fdset_id=7)["return"]["fdset-id"]
        yield say("remove-fd", fdset_id=7, fd=100_000)
        yield say("remove-fd", fdset_id=9)
        sets = say("query-fdsets")["return"]
        yield sorted(s["fdset-id"] for s in sets), [len(s["fds"]) for s in sets]
        yield say("remove-fd", fdset_id=0)  # QEMU keeps it as long as it has a second monitor

    try:
        for ours, theirs in zip(*map(steps, two), strict=True):
            assert ours == theirs, (next(numbers), json.dumps(ours), json.dumps(theirs))
            next(numbers)
    finally:
        os.close(fd)
