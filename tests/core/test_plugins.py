"""Discovery: whatever a plugin does wrong, it is listed as such and harms nobody else."""

import importlib.metadata
import sys
import types

import pytest

from whimbrel import Kernel, Machine, Plugins, TransportSpec, UriError, hookimpl
from whimbrel.errors import PluginError
from whimbrel.plugins import PluginState, _admits
from whimbrel.settings import Capability


class Distribution(importlib.metadata.Distribution):
    """A distribution that exists in memory."""

    def __init__(self, name, requires=("whimbrel-core>=0.1",)):
        lines = [f"Name: {name}", "Version: 1.5", *(f"Requires-Dist: {r}" for r in requires)]
        self._text = "Metadata-Version: 2.1\n" + "\n".join(lines) + "\n"

    def read_text(self, filename):
        return self._text if filename in ("METADATA", "PKG-INFO") else None

    def locate_file(self, path):
        raise NotImplementedError


@pytest.fixture
def entry(monkeypatch):
    """Make an entry point to a module given by its attributes."""
    count = 0

    def make(
        name, group="whimbrel.transports", dist=None, requires=("whimbrel-core>=0.1",), **attributes
    ):
        nonlocal count
        count += 1
        module = types.ModuleType(f"a_plugin_{count}")
        module.__dict__.update({"whimbrel_api": (1, 0)} | attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        point = importlib.metadata.EntryPoint(name, module.__name__, group)
        vars(point)["dist"] = Distribution(dist or f"third-{name}", requires)
        return point

    return make


def offers(*schemes, **options):
    @hookimpl
    def transports():
        return [TransportSpec(schemes=schemes, factory=object, syntax=f"{schemes[0]}:X", **options)]

    return transports


def load(*entries, **options):
    plugins = Plugins.load(entry_points=entries, **options)
    return plugins, {(i.distribution, i.name): i for i in plugins.infos()}


def test_a_sound_plugin(entry):
    plugins, infos = load(entry("good", transports=offers("good", "x-good")))
    info = infos["third-good", "good"]
    assert (info.kind, info.version, info.provides, info.state) == (
        "transport",
        "1.5",
        ("good", "x-good"),
        PluginState.READY,
    )
    assert plugins.transport("x-good") is plugins.transport("good")
    assert [t.schemes[0] for t in plugins.transports()] == ["good"]


def fails():
    raise RuntimeError("it does not work")


@pytest.mark.parametrize(
    ("options", "state", "detail"),
    [
        ({"whimbrel_api": (2, 0)}, "incompatible", "written for plugin API 2.0; this is 1.0"),
        ({"whimbrel_api": (1, 1)}, "incompatible", "written for plugin API 1.1"),
        ({"whimbrel_api": None}, "broken", "whimbrel_api"),
        ({"requires": ("whimbrel-core>=9",)}, "incompatible", "requires whimbrel-core>=9"),
        ({"transports": hookimpl(fails)}, "broken", "it does not work"),
        ({"transprots": hookimpl(lambda: [None][1:])}, "broken", "no hook 'transprots'"),
        ({"transports": hookimpl(lambda nonsense: [])}, "broken", "nonsense"),
        ({"transports": hookimpl(lambda: ["not a spec"])}, "broken", "str"),
        ({"settings": hookimpl(fails)}, "broken", "it does not work"),
        (
            {"transports": offers("other", needs=lambda: "apt-get install x")},
            "needs",
            "apt-get install x",
        ),
        ({"transports": offers("other", needs=fails)}, "broken", "it does not work"),
    ],
)
def test_an_unsound_plugin_is_listed_with_its_reason_and_harms_nobody(
    entry, options, state, detail
):
    bad = entry("bad", **options)
    plugins, infos = load(entry("good", transports=offers("good")), bad)
    info = infos["third-bad", "bad"]
    assert info.state == state
    assert detail in info.detail
    assert infos["third-good", "good"].state is PluginState.READY
    assert plugins.transport("good")
    Kernel(Machine("m"), plugins=plugins)


def test_a_plugin_that_fails_to_import(entry):
    point = importlib.metadata.EntryPoint("bad", "no_such_module_at_all", "whimbrel.transports")
    plugins, infos = load(entry("good", transports=offers("good")), point)
    (bad,) = [i for i in infos.values() if i.name == "bad"]
    assert bad.state is PluginState.BROKEN
    assert "no_such_module_at_all" in bad.detail
    with pytest.raises(UriError, match="no_such_module_at_all"):
        plugins.transport("bad")


def test_disabled_ones_are_not_imported(entry, monkeypatch):
    one = importlib.metadata.EntryPoint("one", "no_such_module", "whimbrel.transports")
    monkeypatch.setenv("WHIMBREL_DISABLE", "two, three")
    two = importlib.metadata.EntryPoint("two", "no_such_module", "whimbrel.transports")
    _, infos = load(one, two, disabled=["one"])
    assert {i.state for i in infos.values()} == {PluginState.DISABLED}


def test_two_claims_on_one_scheme_are_both_refused(entry):
    points = [entry(n, dist=f"dist-{n}", transports=offers("tcp")) for n in ("tcp", "mine")]
    plugins, infos = load(*points, entry("good", transports=offers("good")))
    for info in (infos["dist-tcp", "tcp"], infos["dist-mine", "mine"]):
        assert info.state is PluginState.CONFLICT
        assert "dist-tcp" in info.detail
        assert "dist-mine" in info.detail
    with pytest.raises(PluginError, match="-p tcp=DISTRIBUTION"):
        plugins.transport("tcp")
    assert plugins.transport("good")


def test_the_user_picks_the_winner(entry):
    points = [entry(n, dist=f"dist-{n}", transports=offers("tcp")) for n in ("tcp", "mine")]
    plugins, infos = load(*points, prefer={"tcp": "dist-mine"})
    assert plugins.transport("tcp").syntax == "tcp:X"
    assert infos["dist-mine", "mine"].state is PluginState.READY


def test_two_claims_on_one_section(entry):
    points = [
        entry("ram", "whimbrel.savevm", dist=f"dist-{n}", whimbrel_sections=("ram",)) for n in "ab"
    ]
    _, infos = load(*points)
    assert {i.state for i in infos.values()} == {PluginState.CONFLICT}


def test_a_setting_that_exists_already_leaves_the_kernel_alone(entry, caplog):
    steals = hookimpl(lambda: [Capability(name="return-path", help="")])
    plugins, _ = load(entry("thief", "whimbrel.plugins", settings=steals))
    kernel = Kernel(Machine("m"), plugins=plugins)
    assert kernel.settings["return-path"] is True
    assert "third-thief" in caplog.text


def test_a_plugin_may_bring_hooks_of_its_own(entry):
    import pluggy

    specs = types.ModuleType("specs")

    def dirty_trackers():
        """Trackers."""

    specs.dirty_trackers = pluggy.HookspecMarker("whimbrel")(dirty_trackers)
    brings = entry("brings", "whimbrel.savevm", whimbrel_hookspecs=(specs,))
    uses = entry("uses", "whimbrel.plugins", dirty_trackers=hookimpl(lambda: ["uffd"]))
    plugins, infos = load(uses, brings)
    assert {i.state for i in infos.values()} == {PluginState.READY}
    assert [found for _, found in plugins.each("dirty_trackers")] == [["uffd"]]


@pytest.mark.parametrize(
    ("specifier", "version", "admitted"),
    [
        (">=0.1,<0.2", "0.1.0", True),
        (">=0.1,<0.2", "0.2.0", False),
        ("~=0.1.2", "0.1.5", True),
        ("~=0.1.2", "0.2.0", False),
        ("==0.1.*", "0.1.9", True),
        ("==0.1", "0.1.0", True),
        ("!=0.1.0", "0.1.0", False),
        (">0.1", "0.1.0", False),
        ("", "0.1.0", True),
    ],
)
def test_requirements(specifier, version, admitted):
    assert _admits(specifier, version) == admitted


def test_the_installed_plugins_are_sound():
    broken = [i for i in Plugins.load().infos() if i.state is PluginState.BROKEN]
    assert broken == []
