"""Streams that are wrong: each is refused by name of section and offset, and the machine never starts."""

import contextlib
import random
import threading

import pytest

from whimbrel import (
    EndOfStream,
    InStream,
    MigrationError,
    OutStream,
    RunParams,
    RunState,
    StreamError,
)
from whimbrel.channel import MemoryChannel
from whimbrel.globalstate import GlobalState
from whimbrel.machine import Machine
from whimbrel.savevm import Budget, LoadDriver, Mode, SaveDriver
from whimbrel.wire import items
from whimbrel.wire.format import Command, Dialect, ItemType
from whimbrel.wire.items import Configuration, SectionHeader

from .conftest import Live, Number

TODAY = Dialect()


def a_stream(dialect=TODAY, live=300):
    """Two devices, a live section of a few PARTs and the run state, as the source writes it."""
    machine = Machine("test-1.0")
    channel = MemoryChannel()
    out = OutStream(channel)
    driver = SaveDriver(
        out, machine, [Live(live), Number("a", 1), Number("a", 2, 1), GlobalState(machine)], dialect
    )
    driver.header(Configuration(machine_type="test-1.0"))
    driver.setup(RunParams())
    driver.iterate(Budget(bytes=100))
    driver.iterate(Budget(bytes=100))
    driver.complete(Mode.PRECOPY)
    out.write(driver.tail())
    out.flush()
    return bytes(channel.data)


def load(data, dialect=TODAY, handlers=None, **options):
    machine = Machine("test-1.0")
    if handlers is None:
        handlers = [Live(0), Number("a"), Number("a", 0, 1), GlobalState(machine)]
    driver = LoadDriver(machine, handlers, dialect, **options)
    inp = InStream(MemoryChannel(data))
    status = driver.load(inp)
    return status, driver, inp, handlers


@pytest.mark.parametrize(
    "dialect", [Dialect(), Dialect(footers=False), Dialect(configuration=False)]
)
def test_a_stream_loads_to_its_last_byte(dialect):
    data = a_stream(dialect)
    status, driver, inp, (live, one, two, _) = load(data, dialect)
    assert (one.value, two.value, live.received) == (1, 2, 300)
    assert status.eof
    assert driver.vmdescription(inp).startswith(
        b'{"page_size": 4096, "devices": [{"name": "a", "instance_id": 0'
    )
    assert inp.position == len(data)


def test_opaque_devices_are_described_by_their_size():
    status, driver, inp, _ = load(a_stream())
    text = driver.vmdescription(inp).decode()
    assert (
        '{"name": "a", "instance_id": 1, "size": 8, "fields": [{"name": "data", "size": 8, "type": "buffer"}]}'
        in text
    )


def test_cut_anywhere_before_eof_is_an_error_with_its_offset():
    data = a_stream()
    eof = data.rindex(b"\x00\x06")
    for n in range(eof):
        with pytest.raises(EndOfStream) as caught:
            load(data[:n])
        assert caught.value.offset == n


def test_flips_are_a_named_error_or_a_legal_stream():
    """Never a hang, never another exception. A flip in a payload cannot be seen in this format."""
    data = a_stream()
    rng = random.Random(1)
    refused = 0
    for _ in range(2000):
        wrong = bytearray(data)
        wrong[rng.randrange(len(wrong))] ^= 1 << rng.randrange(8)
        try:
            load(bytes(wrong), on_command=lambda *_: None)
        except MigrationError as error:
            assert error.offset is not None
            refused += 1
    assert refused > 100


def patched(find, replace, data=None):
    data = a_stream() if data is None else data
    assert data.count(find) >= 1
    return data.replace(find, replace, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patched(b"QEVM", b"QEVN"), "not a migration stream"),
        (patched(b"QEVM\0\0\0\3", b"QEVM\0\0\0\2"), "unsupported stream version"),
        (patched(b"test-1.0", b"test-2.0"), "machine type of the source is another"),
        (patched(b"\x04live", b"\x04lave"), "unknown section 'lave' instance 0"),
        (
            patched(b"\x01a\0\0\0\1", b"\x01a\0\0\0\7"),
            r"unknown section 'a' instance 7.*a \(instance 0\), a \(instance 1\)",
        ),
        (
            patched(b"\x01a\0\0\0\0\0\0\0\1", b"\x01a\0\0\0\0\0\0\0\2"),
            "unsupported version of the section",
        ),
        (patched(b"\x7e\0\0\0\2", b"\x7e\0\0\0\3"), "wrong section id in the footer"),
        (patched(b"\x7e\0\0\0\2", b"\x7f\0\0\0\2"), "the footer is missing"),
        (
            patched(b"\x02\0\0\0\1", b"\x02\0\0\0\5"),
            "SECTION_PART of a section that was never started",
        ),
        (
            a_stream()[:-1].replace(b"\x7e\0\0\0\4\0\x06", b"\x7e\0\0\0\4\x09\x06"),
            "unknown item type",
        ),
    ],
)
def test_wrong_streams_are_named(data, message):
    with pytest.raises(StreamError, match=message) as caught:
        load(data)
    assert caught.value.offset is not None


def test_a_missing_section_is_named():
    with pytest.raises(StreamError, match="ended without b") as caught:
        load(
            a_stream(),
            handlers=[
                Live(0),
                Number("a"),
                Number("a", 0, 1),
                GlobalState(Machine("m")),
                Number("b"),
            ],
        )
    assert caught.value.section == "b"


def test_an_optional_section_may_be_missing():
    extra = Number("b")
    extra.optional = True
    load(
        a_stream(),
        handlers=[Live(0), Number("a"), Number("a", 0, 1), GlobalState(Machine("m")), extra],
    )


def test_an_unknown_section_may_be_taken_by_somebody():
    taken = Number("a", 0, 1)
    status, *_ = load(
        a_stream(),
        handlers=[Live(0), Number("a"), GlobalState(Machine("m"))],
        unknown_section=lambda header, inp: taken if header.instance_id == 1 else None,
    )
    assert taken.value == 2


def test_a_bug_in_a_handler_is_a_named_error():
    class Broken(Number):
        def load(self, inp, header):
            raise IndexError("list index out of range")

    with pytest.raises(StreamError, match="could not be loaded: list index") as caught:
        load(
            a_stream(),
            handlers=[Live(0), Broken("a"), Number("a", 0, 1), GlobalState(Machine("m"))],
        )
    assert caught.value.section == "a"


def test_sections_of_a_package_are_loaded_by_the_same_driver():
    inner = items.encode_section_header(SectionHeader(ItemType.SECTION_FULL, 9, "a", 0, 1))
    inner += (77).to_bytes(8, "big") + items.encode_footer(9) + b"\0"
    machine = Machine("test-1.0")
    driver = LoadDriver(machine, [a := Number("a")], Dialect())

    def on_command(command, data, inp):
        assert command is Command.PACKAGED
        driver.items(InStream(MemoryChannel(inp.read(int.from_bytes(data, "big")))))

    driver._on_command = on_command
    data = items.encode_header() + items.encode_configuration(
        Configuration(machine_type="test-1.0")
    )
    data += items.encode_command(Command.PACKAGED, len(inner).to_bytes(4, "big")) + inner + b"\0"
    driver.load(InStream(MemoryChannel(data)))
    assert a.value == 77


# ---- by the kernel: the same from a socket


def feed(world, data):
    sock = world.transport.peer()
    # the pair's other end: the test writes where the source would
    end = world.transport.ends[0]

    def write():
        with contextlib.suppress(OSError):  # the destination may refuse before it has read all
            end.sendall(data)
            end.shutdown(1)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return sock, thread


@pytest.mark.parametrize("cut", [3, 8, 20, 40, 80, 120, 200])
def test_a_cut_stream_never_starts_the_machine(world, cut):
    data = a_stream()
    destination = world.side(Live(0), Number("a"), Number("a", 0, 1))
    incoming = destination.kernel.incoming("pair:")
    feed(world, data[:cut])
    with pytest.raises(EndOfStream) as caught:
        incoming.wait(5)
    assert caught.value.offset == cut
    assert destination.calls == []
    assert destination.machine.run_state is RunState.INMIGRATE


def test_a_stream_without_vmdescription_still_starts_the_machine(world):
    data = a_stream()
    destination = world.side(Live(0), Number("a"), Number("a", 0, 1))
    incoming = destination.kernel.incoming("pair:")
    feed(world, data[: data.rindex(b"\0\x06") + 1])
    incoming.wait(5)
    assert destination.machine.run_state is RunState.RUNNING


@pytest.mark.parametrize(
    ("command", "length"),
    [(Command.PING, 4), (Command.POSTCOPY_ADVISE, 16), (Command.ENABLE_COLO, 0)],
)
def test_commands_that_need_more_are_refused(world, command, length):
    head = items.encode_header() + items.encode_configuration(
        Configuration(machine_type="test-1.0")
    )
    data = head + items.encode_command(command, bytes(length))
    destination = world.side()
    incoming = destination.kernel.incoming("pair:")
    feed(world, data)
    with pytest.raises(StreamError):
        incoming.wait(5)


def test_a_return_path_over_a_one_way_channel_is_refused(world):
    world.transport.way_back = False
    head = items.encode_header() + items.encode_configuration(
        Configuration(machine_type="test-1.0")
    )
    destination = world.side()
    incoming = destination.kernel.incoming("pair:")
    feed(world, head + items.encode_command(Command.OPEN_RETURN_PATH))
    with pytest.raises(StreamError, match="return-path off on the source"):
        incoming.wait(5)


def test_a_source_that_cannot_be_told_never_sees_the_end_of_the_channel(world, monkeypatch):
    """To the source the end without an answer proves that nobody runs the machine; here somebody does."""
    from whimbrel import incoming as module

    kept = []
    monkeypatch.setattr(module, "_unconfirmed", kept)
    head = items.encode_header() + items.encode_configuration(
        Configuration(machine_type="test-1.0")
    )
    destination = world.side()
    transport = world.transport
    original = transport._end

    def end(number):
        channel = original(number)
        channel.send = lambda buffers: (_ for _ in ()).throw(OSError("no buffer space"))
        return channel

    transport._end = end
    incoming = destination.kernel.incoming("pair:")
    source = transport.ends[0]
    source.sendall(head + items.encode_command(Command.OPEN_RETURN_PATH) + b"\0")
    source.sendall(items.encode_vmdescription(b"{}"))
    incoming.wait(5)
    assert destination.machine.run_state is RunState.RUNNING
    source.setblocking(False)
    with pytest.raises(BlockingIOError):
        source.recv(1)
    (channel,) = kept
    channel.close()


def test_a_vmdescription_that_never_comes_is_still_confirmed(world, monkeypatch):
    monkeypatch.setattr("whimbrel.incoming.TAIL_PATIENCE", 0.1)
    head = items.encode_header() + items.encode_configuration(
        Configuration(machine_type="test-1.0")
    )
    destination = world.side()
    incoming = destination.kernel.incoming("pair:")
    source = world.transport.ends[0]
    source.sendall(head + items.encode_command(Command.OPEN_RETURN_PATH) + b"\0\x06\0")
    incoming.wait(5)
    assert destination.machine.run_state is RunState.RUNNING
    assert source.recv(100) == bytes.fromhex("0001 0004 00000000")
