"""Whole migrations through zstd::, and sides that do not agree about it."""

import pytest
import zstandard

from whimbrel import (
    ChannelError,
    EndOfStream,
    Kernel,
    Machine,
    MigrationError,
    RunState,
    StreamError,
)
from whimbrel_device import device, u64
from whimbrel_ram import RAMBlock
from whimbrel_testing.harness import Pair
from whimbrel_testing.stress import StressConfig
from whimbrel_testing.transport_suite import pattern
from whimbrel_zstd.channel import SHORT, ZstdChannel

MIB = 1 << 20


class Number:
    value: int = u64()


TEXT = b"the same words again and again, and a number: %7d. "


def machine():
    made = Machine("zstd-1", run_state=RunState.RUNNING)
    return made, made.add(RAMBlock("ram", 8 * MIB))


@pytest.fixture(params=["tcp", "unix"])
def uri(request, tmp_path):
    return "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/m.sock"


def test_a_machine_under_stress(uri):
    with Pair(StressConfig(ram=4 * MIB, rate=3e6)) as pair:
        pair.source.call("boot")
        address = pair.destination.call("incoming", uri=f"zstd::{uri}")["addresses"][0]
        assert address.startswith("zstd::")
        pair.source.call("migrate", uri=address)
        result = pair.source.call("wait")
        assert (result["outcome"], result["acknowledged"]) == ("completed", True), result
        assert pair.destination.call("wait")["outcome"] == "completed"
        pair.destination.call("ticked")
        proof = pair.destination.call("verify")
        assert proof["holds"], proof["text"]
        assert pair.running() == ["destination"]
        assert pair.violations() == []
        sent = pair.source.call("query")["x-zstd"]
        received = pair.destination.call("query")["x-zstd"]
        assert sent["plain"] == received["plain"] == result["transferred"]
        assert sent["compressed"] == received["compressed"]


def test_what_repeats_gets_smaller(uri):
    here, ram = machine()
    there, arrived = machine()
    there.run_state = RunState.PRELAUNCH
    text = b"".join(TEXT % number for number in range(8 * MIB // 50))[: 8 * MIB]
    ram.buffer[: len(text)] = text
    receiving = Kernel(there)
    incoming = receiving.incoming(f"zstd::{uri}")
    sending = Kernel(here)
    assert "x-zstd" not in sending.query()
    result = sending.migrate(incoming.addresses[0]).wait()
    incoming.wait()
    assert result.acknowledged
    assert bytes(arrived.buffer) == bytes(ram.buffer)
    said = sending.query()["x-zstd"]
    assert said["ratio"] > 3
    assert said["plain"] == result.figures.transferred
    assert said["level"] in range(-7, 13)
    assert "level" not in receiving.query()["x-zstd"]


def test_nothing_is_left_to_send_behind_a_long_vmdescription(monkeypatch):
    """The destination may have read that and closed: without a way back, a byte more would be an unknown outcome."""
    open_frames, finish = [], ZstdChannel.finish

    def watched(channel, deadline=None):
        open_frames.append(channel._packer.finish())
        finish(channel, deadline)

    monkeypatch.setattr(ZstdChannel, "finish", watched)
    here, there = Machine("many-1", run_state=RunState.RUNNING), Machine("many-1")
    for number in range(900):
        for each in (here, there):
            each.add(device(f"{number:0100}", version_id=1)(Number)())
    incoming = Kernel(there).incoming("zstd::tcp:127.0.0.1:0")
    kernel = Kernel(here)
    kernel.settings["return-path"] = False
    result = kernel.migrate(incoming.addresses[0]).wait(20)
    incoming.wait(20)
    assert result.figures.transferred > 2 * SHORT
    assert open_frames == [b""]


def refused(listen, prefix):
    """A migration between sides that do not agree; returns the destination's error."""
    here, _ = machine()
    there, _ = machine()
    there.run_state = RunState.PRELAUNCH
    incoming = Kernel(there).incoming(listen)
    outgoing = Kernel(here).migrate(prefix + incoming.addresses[0].removeprefix("zstd::"))
    with pytest.raises(ChannelError):
        outgoing.wait(20)
    assert here.run_state is RunState.RUNNING
    with pytest.raises(StreamError) as caught:
        incoming.wait(20)
    assert not there.is_running
    assert caught.value.offset == 0
    return str(caught.value)


def test_a_compressed_stream_where_none_is_expected_says_what_to_write():
    said = refused("tcp:127.0.0.1:0", "zstd::")
    assert "found 28 b5 2f fd" in said
    assert "write zstd:: in front of the URI here" in said


def test_a_plain_stream_where_a_compressed_one_is_expected_says_what_to_write():
    said = refused("zstd::tcp:127.0.0.1:0", "")
    assert "is not compressed with zstd" in said
    assert "Both sides write zstd::" in said


def test_a_changed_byte_is_noticed_before_the_destination_answers(monkeypatch):
    """In what could not be made smaller, and so is sent as it is: only the checksum tells."""
    monkeypatch.setenv("WHIMBREL_FAULTS", "corrupt:send@1000000:0x01")
    here, ram = machine()
    ram.buffer[: 4 * MIB] = pattern(4 * MIB)
    there, _ = machine()
    there.run_state = RunState.PRELAUNCH
    incoming = Kernel(there).incoming("zstd::tcp:127.0.0.1:0")
    address = incoming.addresses[0].replace("zstd::", "zstd::fault::")
    outgoing = Kernel(here).migrate(address)
    with pytest.raises(StreamError, match=r"checksum.*byte offset") as caught:
        incoming.wait(20)
    assert caught.value.offset > 1_000_000
    with pytest.raises(MigrationError):
        outgoing.wait(20)
    assert here.run_state is RunState.RUNNING
    assert not there.is_running


def test_into_a_file_that_zstd_reads_and_out_of_it_again(tmp_path):
    here, ram = machine()
    there, arrived = machine()
    there.run_state = RunState.PRELAUNCH
    ram.buffer[:5] = b"hello"
    file = tmp_path / "machine.zst"
    result = Kernel(here).migrate(f"zstd::exec:cat > {file}").wait()
    assert not result.acknowledged
    with file.open("rb") as opened:
        reader = zstandard.ZstdDecompressor().stream_reader(opened, read_across_frames=True)
        assert reader.read().startswith(b"QEVM")
    Kernel(there).incoming(f"zstd::exec:cat {file}").wait()
    assert bytes(arrived.buffer) == bytes(ram.buffer)


def test_half_such_a_file_is_no_machine(tmp_path):
    here, ram = machine()
    ram.buffer[: 4 * MIB] = bytes(range(256)) * (4 * MIB // 256)
    file = tmp_path / "machine.zst"
    Kernel(here).migrate(f"zstd::exec:cat > {file}").wait()
    data = file.read_bytes()
    for size in (3, len(data) // 2, len(data) - 20):
        file.write_bytes(data[:size])
        there, _ = machine()
        there.run_state = RunState.PRELAUNCH
        with pytest.raises(EndOfStream):
            Kernel(there).incoming(f"zstd::exec:cat {file}").wait()
        assert not there.is_running


def test_a_destination_names_no_address_that_is_not_compressed(tmp_path):
    there = Kernel(Machine("m"))
    incoming = there.incoming(f"zstd::unix:{tmp_path}/m")
    told = there.query()
    incoming.cancel()
    assert told["x-addresses"] == [f"zstd::unix:{tmp_path}/m"]
    assert "socket-address" not in told
