"""Capabilities that a stream names change its form: they must be the same on both sides."""

import pytest

from whimbrel import Capability, Machine, Settings
from whimbrel.channel import MemoryChannel
from whimbrel.errors import StreamError
from whimbrel.savevm import LoadDriver
from whimbrel.settings import TODAY
from whimbrel.stream import InStream
from whimbrel.wire.format import Dialect
from whimbrel_testing.wrong.pieces import HEADER, configuration, counted, subsection, u32


def load(sent, here):
    payload = u32(len(sent)) + b"".join(map(counted, sent))
    config = configuration("none", subsection("configuration/capabilities", payload))
    data = HEADER + (config if sent else configuration()) + b"\0"
    driver = LoadDriver(Machine("none"), [], Dialect(), capabilities=here)
    return driver.load(InStream(MemoryChannel(data)))


@pytest.mark.parametrize("both", [(), ("a",), ("a", "b")])
def test_the_same_on_both_sides(both):
    assert load(both, reversed(both)).eof


@pytest.mark.parametrize(
    ("sent", "here", "says"),
    [
        (["a"], [], "capability a on, and it is off here"),
        ([], ["a"], "capability a off, and it is on here"),
        (["a", "b"], ["a"], "capability b on, and it is off here"),
    ],
)
def test_other_ones(sent, here, says):
    with pytest.raises(StreamError, match=says) as caught:
        load(sent, here)
    assert (caught.value.section, caught.value.offset) == ("configuration", len(HEADER))


def test_those_that_are_on_and_on_the_wire():
    settings = Settings(TODAY)
    settings.declare(
        Capability(name=name, help="", on_wire=wire)
        for name, wire in (("a", 1), ("b", 0), ("c", 1))
    )
    settings.update({"a": True, "b": True})
    assert settings.on_wire() == ("a",)
