"""The contract of SaveVMHandler as tests. Subclass it, say how to make the two sides, and run pytest:

    class TestCounter(SaveVMHandlerSuite):
        def make_source(self):
            return DeviceHandler(Counter(ticks=7))

        def make_destination(self):
            return DeviceHandler(Counter())

        def state(self, handler):
            return handler.device.ticks

Keep what the source holds small (some KiB): the stream is loaded some hundred times. A section that is sent while the
machine runs takes LiveSaveVMHandlerSuite and says by change() what the machine then does.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest

from whimbrel.channel import Buffer, MemoryChannel
from whimbrel.errors import ChannelError, EndOfStream, MigrationError, StreamError
from whimbrel.machine import Machine
from whimbrel.savevm import (
    Budget,
    LiveSaveVMHandler,
    LoadDriver,
    LoadStatus,
    Mode,
    SaveDriver,
    SaveVMHandler,
)
from whimbrel.state import Outcome, RunParams
from whimbrel.stream import InStream, OutStream
from whimbrel.wire import items
from whimbrel.wire.format import Dialect, ItemType
from whimbrel.wire.items import Configuration, SectionHeader
from whimbrel_device import vmdesc

#: Rounds within which a live section of a machine that stands still must come to its end.
_ROUNDS = 10_000
_FOOTER = 5  # bytes


@attrs.frozen(kw_only=True)
class Sent:
    """A whole stream with one section, and where its parts lie."""

    data: bytes
    #: Where the section's header begins, and the EOF byte.
    start: int
    eof: int
    driver: SaveDriver


class _Dribble(MemoryChannel):
    """Gives a few bytes at a time, as a slow link does."""

    def __init__(self, data: Buffer, pieces: Sequence[int]) -> None:
        super().__init__(data)
        self._pieces = pieces
        self._rng = random.Random(2)

    def recv_into(self, view: memoryview) -> int:
        return super().recv_into(view[: self._rng.choice(self._pieces)])


class _Broken(MemoryChannel):
    """Takes so many bytes and then fails."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def send(self, buffers: Sequence[Buffer]) -> None:
        super().send(buffers)
        if len(self.data) > self._room:
            raise ChannelError("the link is cut")


class SaveVMHandlerSuite:
    """Override the first three; the rest as needed."""

    #: A load() that fails leaves what was there before (see state()).
    atomic: bool = False
    #: So many streams are cut short: all of them when there are fewer bytes.
    cuts: int = 600
    #: So many streams have random bits changed.
    flips: int = 300

    def make_source(self) -> SaveVMHandler:
        """A handler whose part of the machine holds something."""
        raise NotImplementedError

    def make_destination(self) -> SaveVMHandler:
        """A handler of an equal machine that has not run yet: its state() differs from the source's."""
        raise NotImplementedError

    def state(self, handler: SaveVMHandler) -> object:
        """What must be equal on both sides afterwards, as a value of its own (not a view of what will change)."""
        raise NotImplementedError

    def machine(self) -> Machine:
        return Machine("suite-1.0")

    # ---- tools

    def begin(
        self, source: SaveVMHandler, dialect: Dialect, channel: MemoryChannel | None = None
    ) -> SaveDriver:
        """Header and setup."""
        machine = self.machine()
        driver = SaveDriver(OutStream(channel or MemoryChannel()), machine, [source], dialect)
        driver.header(Configuration(machine_type=machine.machine_type))
        driver.setup(RunParams())
        return driver

    def finish(self, driver: SaveDriver) -> bytes:
        """Rounds up to the last, the end, and the tail: the whole stream."""
        for _ in range(_ROUNDS):
            if driver.iterate(Budget()):
                break
        else:
            pytest.fail(f"iterate() is not done after {_ROUNDS} rounds, and nothing changes")
        driver.complete(Mode.PRECOPY)
        driver.out.write(driver.tail())
        driver.out.flush()
        channel = driver.out.channel
        assert isinstance(channel, MemoryChannel)
        return bytes(channel.data)

    def send(
        self,
        source: SaveVMHandler,
        dialect: Dialect | None = None,
    ) -> Sent:
        """A whole stream."""
        driver = self.begin(source, dialect or Dialect())
        data = self.finish(driver)
        driver.cleanup(Outcome.COMPLETED)
        start = len(items.encode_header())
        if driver.dialect.configuration:
            start += len(
                items.encode_configuration(Configuration(machine_type=driver.machine.machine_type))
            )
        return Sent(data=data, start=start, eof=len(data) - len(driver.tail()), driver=driver)

    def load(
        self,
        data: Buffer,
        destination: SaveVMHandler,
        dialect: Dialect | None = None,
        channel: MemoryChannel | None = None,
    ) -> LoadStatus:
        """Load a whole stream, cleanup included. Raises what loading raises."""
        driver = LoadDriver(self.machine(), [destination], dialect or Dialect())
        inp = InStream(channel or MemoryChannel(data), buffer_size=64 << 10)
        outcome = Outcome.FAILED
        try:
            status = driver.load(inp)
            driver.vmdescription(inp)
            outcome = Outcome.COMPLETED
        finally:
            destination.load_cleanup(outcome)
        return status

    def expect_error(self, data: Buffer, destination: SaveVMHandler, what: str) -> MigrationError:
        """Load what cannot be loaded: an error of the tree, which says where."""
        try:
            self.load(data, destination)
        except MigrationError as error:
            assert error.offset is not None, f"{what}: no offset in {error!r}"
            return error
        except Exception as error:
            pytest.fail(f"{what}: {error!r} is no MigrationError")
        pytest.fail(f"{what} was loaded")

    def _section_header(self, handler: SaveVMHandler, version: int) -> bytes:
        live = isinstance(handler, LiveSaveVMHandler)
        item = ItemType.SECTION_START if live else ItemType.SECTION_FULL
        return items.encode_section_header(
            SectionHeader(item, 1, handler.idstr, handler.instance_id, version)
        )

    def _cut_points(self, sent: Sent) -> Iterator[int]:
        """All, or the first, the last and a random choice of the others."""
        end = sent.eof + 1
        if end <= self.cuts:
            return iter(range(end))
        third = self.cuts // 3
        rng = random.Random(1)
        middle = rng.sample(range(third, end - third), self.cuts - 2 * third)
        return iter(sorted({*range(third), *middle, *range(end - third, end)}))

    # ---- tests: any handler

    @pytest.mark.parametrize("footers", [True, False], ids=["footers", "no-footers"])
    def test_round_trip(self, footers: bool) -> None:
        source, destination = self.make_source(), self.make_destination()
        before = self.state(source)
        assert self.state(destination) != before, "state() of a fresh destination must differ"
        dialect = Dialect(footers=footers)
        sent = self.send(source, dialect)
        status = self.load(sent.data, destination, dialect)
        assert status.eof
        assert (source.idstr, source.instance_id) in status.loaded
        assert self.state(destination) == before
        assert self.state(source) == before, "sending changed the source"

    @pytest.mark.parametrize("pieces", [(1,), (1, 2, 7, 1000, 4096)], ids=["bytes", "pieces"])
    def test_received_in_small_pieces(self, pieces: tuple[int, ...]) -> None:
        source, destination = self.make_source(), self.make_destination()
        channel = _Dribble(self.send(source).data, pieces)
        self.load(b"", destination, channel=channel)
        assert self.state(destination) == self.state(source)

    def test_sent_again_after_a_failure(self) -> None:
        source, destination = self.make_source(), self.make_destination()
        driver = self.begin(source, Dialect())
        source.cleanup(Outcome.FAILED)
        del driver
        self.load(self.send(source).data, destination)
        assert self.state(destination) == self.state(source)

    def test_loaded_again(self) -> None:
        source, destination = self.make_source(), self.make_destination()
        sent = self.send(source)
        with pytest.raises(EndOfStream):
            self.load(sent.data[: sent.eof - 1], destination)
        for _ in range(2):
            self.load(sent.data, destination)
            assert self.state(destination) == self.state(source)

    def test_a_stream_cut_short_is_refused(self) -> None:
        source, destination = self.make_source(), self.make_destination()
        sent = self.send(source)
        for cut in self._cut_points(sent):
            error = self.expect_error(sent.data[:cut], destination, f"a stream of {cut} bytes")
            assert isinstance(error, (EndOfStream, StreamError)), f"at {cut}: {error!r}"
        self.load(sent.data, destination)  # and that did no harm

    def test_changed_bits_are_refused_or_legal(self) -> None:
        source, destination = self.make_source(), self.make_destination()
        sent = self.send(source)
        rng = random.Random(3)
        for _ in range(self.flips):
            data = bytearray(sent.data[: sent.eof + 1])
            places = [rng.randrange(sent.start, sent.eof) for _ in range(rng.choice((1, 1, 3)))]
            for place in places:
                data[place] ^= 1 << rng.randrange(8)
            try:
                self.load(data, destination)
            except MigrationError as error:
                assert error.offset is not None, f"bits at {places}: no offset in {error!r}"
            except Exception as error:
                pytest.fail(f"bits at {places}: {error!r} is no MigrationError")
        self.load(sent.data, destination)
        assert self.state(destination) == self.state(source)

    def test_other_versions_are_refused(self) -> None:
        source, destination = self.make_source(), self.make_destination()
        sent = self.send(source)
        header = self._section_header(source, source.version_id)
        assert sent.data[sent.start :].startswith(header)
        behind = sent.data[sent.start + len(header) :]
        wrong = [destination.version_id + 1, 0xFFFFFFFF]
        if destination.minimum_version_id > 0:
            wrong.append(destination.minimum_version_id - 1)
        for version in wrong:
            data = sent.data[: sent.start] + self._section_header(source, version) + behind
            error = self.expect_error(data, destination, f"version {version}")
            assert isinstance(error, StreamError)
            assert error.section == source.idstr

    @pytest.mark.parametrize("outcome", list(Outcome))
    def test_cleanup(self, outcome: Outcome) -> None:
        source, destination = self.make_source(), self.make_destination()
        before = self.state(source)
        self.finish(self.begin(source, Dialect()))
        source.cleanup(outcome)
        assert self.state(source) == before
        destination.load_cleanup(outcome)  # a run that ended before the first section
        self.load(self.send(source).data, destination)
        assert self.state(destination) == before

    def test_a_cut_link_on_the_source(self) -> None:
        source, destination = self.make_source(), self.make_destination()
        whole = self.send(source)
        before = self.state(source)
        for room in (0, whole.start, (whole.start + whole.eof) // 2):
            with pytest.raises(ChannelError):
                self.finish(self.begin(source, Dialect(), _Broken(room)))
            source.cleanup(Outcome.FAILED)
            assert self.state(source) == before
        self.load(self.send(source).data, destination)
        assert self.state(destination) == before

    def test_query_is_json(self) -> None:
        source = self.make_source()
        answers = [source.query()]
        driver = self.begin(source, Dialect())
        answers.append(source.query())
        self.finish(driver)
        answers.append(source.query())
        source.cleanup(Outcome.COMPLETED)
        answers.append(source.query())
        for answer in answers:
            assert isinstance(answer, dict)
            json.dumps(answer, allow_nan=False)

    # ---- tests: a section that is sent in one piece

    def _plain(self) -> SaveVMHandler:
        source = self.make_source()
        assert not isinstance(source, LiveSaveVMHandler), "LiveSaveVMHandlerSuite is for this one"
        return source

    def test_a_failed_load_changes_nothing(self) -> None:
        if not self.atomic:
            pytest.skip("not promised by this handler")
        source, destination = self._plain(), self.make_destination()
        sent = self.send(source)
        start = sent.start + len(self._section_header(source, source.version_id))
        payload = sent.data[start : sent.eof - _FOOTER]
        header = SectionHeader(
            ItemType.SECTION_FULL, 1, source.idstr, source.instance_id, source.version_id
        )
        rng = random.Random(4)
        broken = [payload[:n] for n in range(len(payload))][: self.cuts]
        for _ in range(self.flips):
            flipped = bytearray(payload)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            broken.append(bytes(flipped))
        for data in broken:
            before = self.state(destination)
            try:
                destination.load(InStream(MemoryChannel(data), buffer_size=64 << 10), header)
            except MigrationError:
                assert self.state(destination) == before, f"half loaded from {data.hex(' ')}"

    def test_description_covers_the_payload(self) -> None:
        source = self._plain()
        if source.verbatim:
            pytest.skip("a verbatim section brings its own description")
        sent = self.send(source)
        description = vmdesc.parse(sent.driver.vmdescription())
        (described,) = description.devices
        assert (described.name, described.instance_id) == (source.idstr, source.instance_id)
        payload = sent.start + len(self._section_header(source, source.version_id))
        view = memoryview(sent.data)[payload:]
        size = described.payload_size(view)
        pieces = list(vmdesc.walk(described, view[:size]))
        assert b"".join(p.data for p in pieces) == view[:size]
        footer = struct.pack(">BI", ItemType.FOOTER, 1)
        assert view[size : size + _FOOTER] == footer, "the described fields are not the payload"
        assert payload + size + _FOOTER == sent.eof

    def test_saving_twice_gives_the_same(self) -> None:
        source = self._plain()
        assert self.send(source).data == self.send(source).data


class LiveSaveVMHandlerSuite(SaveVMHandlerSuite):
    """For handlers that are sent while the machine runs. Override change() as well."""

    #: Bytes by which one iterate() may exceed its budget: a batch.
    batch: int = 2 << 20

    test_a_failed_load_changes_nothing = None  # type: ignore[assignment]
    test_description_covers_the_payload = None  # type: ignore[assignment]
    test_saving_twice_gives_the_same = None  # type: ignore[assignment]

    def change(self, handler: SaveVMHandler) -> None:
        """Let the source's machine change something that a live section sends."""
        raise NotImplementedError

    def _live(self) -> LiveSaveVMHandler:
        source = self.make_source()
        assert isinstance(source, LiveSaveVMHandler), "SaveVMHandlerSuite is for this one"
        return source

    def test_changes_arrive(self) -> None:
        source, destination = self._live(), self.make_destination()
        driver = self.begin(source, Dialect())
        driver.iterate(Budget())
        self.change(source)
        data = self.finish(driver)
        driver.cleanup(Outcome.COMPLETED)
        self.load(data, destination)
        assert self.state(destination) == self.state(source)

    def test_pending_shrinks_to_nothing(self) -> None:
        source = self._live()
        driver = self.begin(source, Dialect())
        left = source.pending(exact=True)
        assert left.precopy > 0, "a source that holds something has something to send"
        for _ in range(_ROUNDS):
            done = source.iterate(driver.out, Budget(bytes=1))
            now = source.pending(exact=False)
            assert now.precopy >= 0
            assert now.postcopy >= 0
            assert done or now.precopy < left.precopy, "iterate() did nothing"
            left = now
            if done:
                break
        assert left.precopy == 0, "done, and something is left"
        source.complete(driver.out, Mode.PRECOPY)
        assert source.pending(exact=False).precopy == 0
        source.cleanup(Outcome.COMPLETED)

    @pytest.mark.parametrize("limit", ["bytes", "deadline", "cancelled"])
    def test_budget_is_respected(self, limit: str) -> None:
        source = self._live()
        driver = self.begin(source, Dialect())
        budgets: dict[str, Budget] = {
            "bytes": Budget(bytes=1),
            "deadline": Budget(deadline=time.monotonic() - 1),
            "cancelled": Budget(cancelled=lambda: True),
        }
        before = driver.out.position
        source.iterate(driver.out, budgets[limit])
        assert driver.out.position - before <= self.batch + 1
        source.cleanup(Outcome.CANCELLED)

    def test_changes_are_pending(self) -> None:
        source = self._live()
        driver = self.begin(source, Dialect())
        for _ in range(_ROUNDS):
            if driver.iterate(Budget()):
                break
        self.change(source)
        assert source.pending(exact=True).precopy > 0
        source.cleanup(Outcome.CANCELLED)

    def test_all_is_sent_by_complete_alone(self) -> None:
        """The machine may be stopped before the first round."""
        source, destination = self._live(), self.make_destination()
        driver = self.begin(source, Dialect())
        driver.complete(Mode.PRECOPY)
        driver.out.write(driver.tail())
        driver.out.flush()
        channel: Any = driver.out.channel
        self.load(channel.data, destination)
        driver.cleanup(Outcome.COMPLETED)
        assert self.state(destination) == self.state(source)
