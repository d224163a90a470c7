"""What the plugin declares, and whole migrations through the kernel."""

import subprocess
import sys
import types

import numpy as np
import pytest

from whimbrel import Kernel, LocalError, Machine, MigrationError, SettingError, hookimpl
from whimbrel.plugins import Plugins
from whimbrel_ram import PageTransport, RAMBlock, StreamPages, TrackerSpec
from whimbrel_ram.trackers.explicit import ExplicitTracker

SIZE = 2 << 20
PATIENCE = 60


def test_declaring_imports_nothing_heavy():
    code = (
        "import sys, whimbrel_ram.plugin as p; p.settings(); p.dirty_trackers();"
        "from whimbrel_ram import RAMBlock; b = RAMBlock('ram', 1 << 20); b.buffer[0] = 1; b.mark_dirty(0, 1);"
        "print([m for m in ('numpy', 'click', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_it_is_discovered_with_its_section_and_settings():
    info = next(i for i in Plugins.load().infos() if i.name == "ram")
    assert (info.kind, info.distribution, info.state) == ("savevm", "whimbrel-ram", "ready")
    assert info.provides == ("ram",)
    assert {"xbzrle", "xbzrle-cache-size", "auto-converge", "dirty-tracker"} <= set(info.settings)


def test_settings_and_their_bounds():
    settings = Kernel(Machine("m")).settings
    assert settings["xbzrle-cache-size"] == 64 << 20
    settings["xbzrle-cache-size"] = "128M"
    assert settings["xbzrle-cache-size"] == 128 << 20
    for wrong in (100_000, 0, 2048, -1):
        with pytest.raises(SettingError, match="xbzrle-cache-size"):
            settings["xbzrle-cache-size"] = wrong
    assert settings["dirty-tracker"] == "auto"


def test_a_machine_without_ram_has_no_such_section():
    assert not [h for h in Kernel(Machine("m")).collect_handlers() if h.idstr == "ram"]


class Both:
    """Two kernels of one process, and their blocks."""

    def __init__(self, plugins=None):
        self.sides = []
        for _ in range(2):
            machine = Machine("m-1")
            machine.add(RAMBlock("ram", SIZE))
            machine.add(RAMBlock("vram", 8192))
            self.sides.append(Kernel(machine, plugins=plugins))
        self.source, self.destination = self.sides
        self.blocks, self.copies = ([*k.machine.parts(RAMBlock)] for k in self.sides)
        rng = np.random.default_rng(5)
        for block in self.blocks:
            block.rows[::2] = rng.integers(0, 256, block.rows[::2].shape, np.uint8)

    def migrate(self):
        incoming = self.destination.incoming("tcp:127.0.0.1:0")
        try:
            self.source.migrate(incoming.addresses[0]).wait(PATIENCE)
            incoming.wait(PATIENCE)
        except BaseException:
            incoming.cancel()
            raise

    def check(self):
        for block, copy in zip(self.blocks, self.copies, strict=True):
            assert (block.view == copy.view).all()


@pytest.mark.parametrize("tracker", ["auto", "shadow", "explicit"])
def test_a_migration_through_the_kernel(tracker):
    both = Both()
    both.source.settings["dirty-tracker"] = tracker
    both.migrate()
    both.check()
    info = both.source.query()
    assert info["status"] == "completed"
    assert info["ram"]["remaining"] == 0
    assert info["ram"]["total"] == SIZE + 8192
    assert info["ram"]["normal"] == 256 + 1
    assert info["ram"]["skipped"] == 0
    assert info["ram"]["mbps"] == both.source.state.figures.mbps > 0
    assert info["ram"]["dirty-sync-count"] == both.source.state.figures.passes == 2


def test_a_tracker_that_cannot_watch_refuses_before_anything_is_sent():
    machine = Machine("m")
    machine.add(RAMBlock("ram", memory=memoryview(bytearray(9000))[7:8199]))
    kernel = Kernel(machine)
    kernel.settings["dirty-tracker"] = "uffd-wp"
    with pytest.raises(LocalError, match="does not begin and end on a page boundary"):
        kernel.migrate("tcp:127.0.0.1:9")


def plugin(name, **hooks):
    module = types.ModuleType(name)
    module.whimbrel_api = (1, 0)
    for hook, function in hooks.items():
        function.__name__ = hook
        setattr(module, hook, hookimpl(function))
    return module


def test_a_tracker_of_a_third_party_is_known_and_chosen():
    used = []

    class Mine(ExplicitTracker):
        def start(self, blocks):
            used.extend(b.idstr for b in blocks)

    def specs():
        return [TrackerSpec(name="mine", priority=500, factory=Mine, probe=lambda blocks: None)]

    def broken():
        raise RuntimeError("boom")

    plugins = Plugins.load()
    plugins.register(plugin("third", dirty_trackers=specs), "third")
    plugins.register(plugin("bad", dirty_trackers=broken), "bad")
    both = Both(plugins)
    both.migrate()
    both.check()
    assert used == ["ram", "vram"]
    other = Both(plugins)
    other.source.settings["dirty-tracker"] = "yours"
    with pytest.raises(MigrationError, match="auto, mine, uffd-wp, shadow, explicit"):
        other.migrate()


def test_a_page_transport_of_a_third_party_is_asked_on_both_sides():
    asked = []

    class Mine(StreamPages):
        pass

    def transports(kernel, channel):
        asked.append(kernel)
        return Mine(4096)

    plugins = Plugins.load()
    plugins.register(plugin("third", page_transports=transports), "third")
    both = Both(plugins)
    both.migrate()
    both.check()
    assert sorted(map(id, asked)) == sorted(map(id, both.sides))


def test_two_page_transports_are_one_too_many():
    plugins = Plugins.load()
    for name in ("one", "two"):
        plugins.register(
            plugin(name, page_transports=lambda kernel, channel: PageTransport()), name
        )
    both = Both(plugins)
    incoming = both.destination.incoming("tcp:127.0.0.1:0")
    with pytest.raises(MigrationError, match="claimed by one of .* and two of"):
        both.source.migrate(incoming.addresses[0]).wait(PATIENCE)
    with pytest.raises(MigrationError):
        incoming.wait(PATIENCE)


@pytest.mark.parametrize("bits", [10, 14, 16, 20])
def test_machines_with_other_page_sizes(bits):
    kernels = []
    for _ in range(2):
        machine = Machine("m-1", target_page_bits=bits)
        machine.add(RAMBlock("ram", 4 << 20, page_size=1 << bits))
        kernels.append(Kernel(machine))
    source, destination = kernels
    block, copy = (k.machine.parts(RAMBlock)[0] for k in kernels)
    block.view[1 << 20 : 3 << 20] = np.arange(2 << 20) % 253
    incoming = destination.incoming("tcp:127.0.0.1:0")
    source.migrate(incoming.addresses[0]).wait(PATIENCE)
    incoming.wait(PATIENCE)
    assert (block.view == copy.view).all()
    assert source.query()["ram"]["page-size"] == 1 << bits


def test_memory_of_the_app_that_is_not_aligned_is_compared():
    memories = [bytearray((1 << 20) + 5000) for _ in range(2)]
    memories[0][5000:] = np.random.default_rng(1).bytes(1 << 20)
    kernels = []
    for memory in memories:
        machine = Machine("m-1")
        machine.add(RAMBlock("ram", memory=memoryview(memory)[5000:]))
        kernels.append(Kernel(machine))
    incoming = kernels[1].incoming("tcp:127.0.0.1:0")
    kernels[0].migrate(incoming.addresses[0]).wait(PATIENCE)
    incoming.wait(PATIENCE)
    assert memories[0] == memories[1]


def test_other_page_sizes_on_both_sides_are_refused():
    machine = Machine("m-1", target_page_bits=16)
    machine.add(RAMBlock("ram", 1 << 20))
    with pytest.raises(MigrationError, match="pages of 4096 bytes, the machine of 65536"):
        Kernel(machine).migrate("tcp:127.0.0.1:9")
