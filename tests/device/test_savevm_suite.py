"""The suite for section handlers is worth what it catches: good handlers pass, and each broken one fails its test."""

from __future__ import annotations

import pytest

from whimbrel.channel import MemoryChannel
from whimbrel.errors import EndOfStream, StreamError
from whimbrel.savevm import LiveSaveVMHandler, Pending, SaveVMHandler
from whimbrel.stream import InStream
from whimbrel_testing.savevm_suite import LiveSaveVMHandlerSuite, SaveVMHandlerSuite

FAILS = (
    AssertionError,
    pytest.fail.Exception,
    StreamError,
    EndOfStream,
    RuntimeError,
    TypeError,
    ValueError,
)


class Plain(SaveVMHandler):
    """Two bytes, and their sum modulo 256."""

    idstr = "plain"
    version_id = 2
    minimum_version_id = 1

    def __init__(self, value=b"\0\0"):
        self.value = value

    def save(self, out):
        out.write(self.value + bytes([sum(self.value) % 256]))

    def load(self, inp, header):
        value = inp.read(3)
        if sum(value[:2]) % 256 != value[2]:
            raise StreamError("wrong sum")
        self.value = value[:2]

    def describe(self):
        fields = [
            {"name": "value", "type": "buffer", "size": 2},
            {"name": "sum", "type": "uint8", "size": 1},
        ]
        return {"vmsd_name": "plain", "version": 2, "fields": fields}


class Live(LiveSaveVMHandler):
    """Sixteen cells of 256 bytes: each record is its number and its bytes, ff ends a payload."""

    idstr = "live"
    optional = False

    def __init__(self, fill=0):
        self.cells = [bytes([(fill * k) % 256]) * 256 for k in range(16)]
        self.dirty = set()

    def write(self, k, data):
        self.cells[k] = data * 256
        self.dirty.add(k)

    def setup(self, out, params):
        self.dirty = set(range(16))
        out.u8(0xFF)

    def pending(self, exact):
        return Pending(256 * len(self.dirty))

    def iterate(self, out, budget):
        before = out.position
        while self.dirty and not (out.position > before and budget.spent(out.position - before)):
            self.send_one(out)
        out.u8(0xFF)
        return not self.dirty

    def complete(self, out, mode):
        while self.dirty:
            self.send_one(out)
        out.u8(0xFF)

    def send_one(self, out):
        k = self.dirty.pop()
        out.u8(k)
        out.write(self.cells[k])

    def load(self, inp, header):
        while (k := inp.u8()) != 0xFF:
            if k >= 16:
                raise StreamError("no such cell")
            self.cells[k] = inp.read(256)


class PlainSuite(SaveVMHandlerSuite):
    atomic = True
    handler = Plain

    def make_source(self):
        return self.handler(b"\1\2")

    def make_destination(self):
        return self.handler()

    def state(self, handler):
        return bytes(handler.value)


class LiveSuite(LiveSaveVMHandlerSuite):
    handler = Live
    batch = 300
    cuts = 60
    flips = 60

    def make_source(self):
        return self.handler(3)

    def make_destination(self):
        return self.handler()

    def state(self, handler):
        return list(handler.cells)

    def change(self, handler):
        handler.write(5, b"x")


class TestGoodPlain(PlainSuite):
    pass


class TestGoodLive(LiveSuite):
    pass


# ---- broken ones, by the test that must fail


class DropsAByte(Plain):
    def load(self, inp, header):
        self.value = inp.read(2)


class RaisesAnything(Plain):
    def load(self, inp, header):
        value = inp.read(3)
        if sum(value[:2]) % 256 != value[2]:
            raise RuntimeError("wrong sum")
        self.value = value[:2]


class HalfLoads(Plain):
    def load(self, inp, header):
        self.value = inp.read(2)
        if sum(self.value) % 256 != inp.u8():
            raise StreamError("wrong sum")


class ChangesWhenSaved(Plain):
    def save(self, out):
        super().save(out)
        self.value = self.value[::-1]


class Counts(Plain):
    saved = 0

    def save(self, out):
        type(self).saved += 1
        out.write(bytes([self.saved, 0, self.saved]))

    def load(self, inp, header):
        super().load(inp, header)
        self.value = b"\1\2"


class DescribesTooMuch(Plain):
    def describe(self):
        members = super().describe()
        members["fields"].append({"name": "more", "type": "uint8", "size": 1})
        return members


class DescribesTooLittle(Plain):
    def describe(self):
        members = super().describe()
        members["fields"].pop()
        return members


class AnswersNoJson(Plain):
    def query(self):
        return {"value": {1, 2}}


class AnswersNaN(Plain):
    def query(self):
        return {"value": float("nan")}


class FailsToCleanUp(Plain):
    def cleanup(self, outcome):
        raise RuntimeError("nothing to clean up")


class ForgetsOnCleanup(Plain):
    def cleanup(self, outcome):
        self.value = b"\0\0"


class LoadsOnce(Plain):
    loaded = False

    def load(self, inp, header):
        if self.loaded:
            raise StreamError("loaded before")
        super().load(inp, header)
        self.loaded = True


class WantsItAllAtOnce(Plain):
    def load(self, inp, header):
        if len(inp.buffered(1)) < 3:
            raise StreamError("too little")
        super().load(inp, header)


class NeverDone(Live):
    def iterate(self, out, budget):
        super().iterate(out, budget)
        return False


class NothingPending(Live):
    def pending(self, exact):
        return Pending()


class ForgetsChanges(Live):
    def write(self, k, data):
        self.cells[k] = data * 256


class IgnoresBudget(Live):
    def iterate(self, out, budget):
        while self.dirty:
            self.send_one(out)
        out.u8(0xFF)
        return True


class LeavesTheRest(Live):
    def complete(self, out, mode):
        out.u8(0xFF)


class DoesNothing(Live):
    def iterate(self, out, budget):
        out.u8(0xFF)
        return not self.dirty


class DoneTooEarly(Live):
    def iterate(self, out, budget):
        super().iterate(out, budget)
        return True


BROKEN = [
    (DropsAByte, "test_round_trip", (True,)),
    (RaisesAnything, "test_changed_bits_are_refused_or_legal", ()),
    (HalfLoads, "test_a_failed_load_changes_nothing", ()),
    (ChangesWhenSaved, "test_round_trip", (True,)),
    (Counts, "test_saving_twice_gives_the_same", ()),
    (DescribesTooMuch, "test_description_covers_the_payload", ()),
    (DescribesTooLittle, "test_description_covers_the_payload", ()),
    (AnswersNoJson, "test_query_is_json", ()),
    (AnswersNaN, "test_query_is_json", ()),
    (FailsToCleanUp, "test_cleanup", ("failed",)),
    (ForgetsOnCleanup, "test_cleanup", ("cancelled",)),
    (LoadsOnce, "test_loaded_again", ()),
    (WantsItAllAtOnce, "test_received_in_small_pieces", ((1,),)),
    (FailsToCleanUp, "test_a_cut_link_on_the_source", ()),
    (NeverDone, "test_round_trip", (True,)),
    (NothingPending, "test_pending_shrinks_to_nothing", ()),
    (ForgetsChanges, "test_changes_arrive", ()),
    (ForgetsChanges, "test_changes_are_pending", ()),
    (IgnoresBudget, "test_budget_is_respected", ("bytes",)),
    (IgnoresBudget, "test_budget_is_respected", ("deadline",)),
    (IgnoresBudget, "test_budget_is_respected", ("cancelled",)),
    (LeavesTheRest, "test_all_is_sent_by_complete_alone", ()),
    (DoesNothing, "test_pending_shrinks_to_nothing", ()),
    (DoneTooEarly, "test_pending_shrinks_to_nothing", ()),
]


@pytest.mark.parametrize(("handler", "test", "arguments"), BROKEN)
def test_a_broken_handler_fails(handler, test, arguments):
    suite = PlainSuite() if issubclass(handler, Plain) else LiveSuite()
    good = PlainSuite() if issubclass(handler, Plain) else LiveSuite()
    getattr(good, test)(*arguments)
    suite.handler = handler
    with pytest.raises(FAILS):
        getattr(suite, test)(*arguments)


def test_the_wrong_suite_says_so():
    class Wrong(LiveSuite):
        handler = Plain

        def make_source(self):
            return Plain(b"\1\2")

    with pytest.raises(AssertionError, match="SaveVMHandlerSuite is for this one"):
        Wrong().test_pending_shrinks_to_nothing()

    class Other(PlainSuite):
        def make_source(self):
            return Live(1)

    with pytest.raises(AssertionError, match="LiveSaveVMHandlerSuite is for this one"):
        Other().test_saving_twice_gives_the_same()


def test_an_equal_destination_proves_nothing():
    class Equal(PlainSuite):
        def make_destination(self):
            return self.make_source()

    with pytest.raises(AssertionError, match="must differ"):
        Equal().test_round_trip(footers=True)


def test_a_stream_is_taken_apart_where_it_should_be():
    sent = PlainSuite().send(Plain(b"\1\2"))
    assert sent.data[sent.start :][:14] == b"\4\0\0\0\1\5plain\0\0\0"
    assert sent.data[sent.eof] == 0
    assert sent.data[sent.eof - 5 : sent.eof] == b"\x7e\0\0\0\1"
    inp = InStream(MemoryChannel(sent.data[sent.eof - 8 : sent.eof]))
    loaded = Plain()
    loaded.load(inp, None)
    assert loaded.value == b"\1\2"
