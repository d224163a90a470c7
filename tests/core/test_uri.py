"""URIs and filters."""

import pytest

from whimbrel import Filter, FilterSpec, PluginError, UriError, hookimpl
from whimbrel.uri import Uri, parse_uri

from .conftest import Number


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("tcp:host:4444", Uri("tcp", "host:4444")),
        ("tcp::4444", Uri("tcp", ":4444")),
        ("tcp:[::1]:4444", Uri("tcp", "[::1]:4444")),
        ("exec:a::b", Uri("exec", "a::b")),
        ("exec:cat > /tmp/zstd::x", Uri("exec", "cat > /tmp/zstd::x")),
        ("zstd::tcp:host:1", Uri("tcp", "host:1", ("zstd",))),
        ("meter::zstd::tcp::1", Uri("tcp", ":1", ("meter", "zstd"))),
        ("fd:", Uri("fd", "")),
    ],
)
def test_uris(text, uri):
    assert parse_uri(text, {"zstd", "meter"}) == uri
    assert str(uri) == text


def test_only_a_registered_filter_consumes_the_colons():
    assert parse_uri("zstd::tcp:h:1") == Uri("zstd", ":tcp:h:1")


@pytest.mark.parametrize("text", ["", "nonsense", ":4444", "/run/x.sock"])
def test_no_scheme(text):
    with pytest.raises(UriError, match="no scheme.*tcp:HOST:PORT"):
        parse_uri(text)


def test_a_host_where_the_scheme_should_be(world):
    with pytest.raises(UriError, match="unknown migration protocol 'host2'.*Write tcp:host2:4444"):
        world.side().kernel.route("host2:4444")


def test_filters_are_wrapped_around_both_ends(world):
    order = []

    class Noting(Filter):
        def __init__(self, name):
            self.name = name

        def wrap(self, channel, role):
            order.append((self.name, role.value))
            return channel

    class Filters:
        whimbrel_api = (1, 0)

        @hookimpl
        def filters(self):
            return [FilterSpec(name=n, factory=lambda n=n: Noting(n)) for n in ("outer", "inner")]

    world.plugins.register(Filters(), "filters")
    source, destination = world.side(Number("a")), world.side(Number("a"))
    incoming = destination.kernel.incoming("outer::inner::pair:")
    assert incoming.addresses == ("outer::inner::pair:",)
    source.kernel.migrate("outer::inner::pair:").wait(5)
    incoming.wait(5)
    for role in ("source", "destination"):
        assert [n for n, r in order if r == role] == ["inner", "outer"]


def test_a_filter_is_told_of_the_migration_and_adds_to_what_is_said_of_it(world):
    begun = []

    class Counting(Filter):
        def begin(self, ctx):
            begun.append((ctx.role.value, ctx.kernel))
            self.wrapped = 0

        def wrap(self, channel, role):
            self.wrapped += 1
            return channel

        def query(self):
            return {"x-counting": self.wrapped}

    class Filters:
        whimbrel_api = (1, 0)

        @hookimpl
        def filters(self):
            return [FilterSpec(name="counting", factory=Counting)]

    world.plugins.register(Filters(), "filters")
    source, destination = world.side(Number("a")), world.side(Number("a"))
    incoming = destination.kernel.incoming("counting::pair:")
    source.kernel.migrate("counting::pair:").wait(5)
    incoming.wait(5)
    assert begun == [("destination", destination.kernel), ("source", source.kernel)]
    for side in (source, destination):
        assert side.kernel.query()["x-counting"] == 1, "also after the end"


def test_a_factory_that_does_not_load_is_a_plugin_error():
    with pytest.raises(PluginError, match="no_such_module"):
        FilterSpec(name="x", factory="no_such_module:X").create()
