"""Between two kernels of ours, over real verbs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whimbrel import Cancelled, Kernel, Machine, MigrationError, Role, RunState, Status
from whimbrel.channel import TransportContext
from whimbrel_ram import RAMBlock
from whimbrel_rdma.limits import OWN_USE
from whimbrel_rdma.link import Link
from whimbrel_rdma.protocol import Kind
from whimbrel_rdma.transport import RdmaTransport
from whimbrel_testing.harness import Pair
from whimbrel_testing.peers import wait_until
from whimbrel_testing.stress import StressConfig

from . import mortal

MIB = 1 << 20
SIZES = {"ram": 24 * MIB, "odd": MIB + 4096, "tiny": 4096}


def machine(fill: int | None = None) -> Machine:
    """Several blocks: 6 MiB of random pages in the middle of the first, zero ranges, and a few pages here and there."""
    made = Machine("test-1.0", run_state=RunState.PRELAUNCH if fill is None else RunState.RUNNING)
    for name, size in SIZES.items():
        block = made.add(RAMBlock(name, size))
        if fill is not None:
            rng = np.random.default_rng(fill)
            if name == "ram":
                block.view[5 * MIB : 11 * MIB] = rng.integers(256, size=6 * MIB, dtype=np.uint8)
                block.rows[rng.integers(block.pages, size=50)] = 7
            else:
                block.view[-100:] = rng.integers(256, size=100, dtype=np.uint8)
    return made


class Two:
    """A source with a filled machine and a destination, in one process: nothing may block with the GIL held."""

    def __init__(self, uri: str, source: dict[str, Any], destination: dict[str, Any]) -> None:
        self.uri = uri
        self.source, self.destination = Kernel(machine(1)), Kernel(machine())
        self.source.settings.update({"max-bandwidth": 0, "dirty-tracker": "explicit"} | source)
        self.destination.settings.update(destination)

    def incoming(self) -> Any:
        return self.destination.incoming(self.uri)

    def check_equal(self) -> None:
        ours, theirs = (k.machine.parts(RAMBlock) for k in (self.source, self.destination))
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(one.view, other.view), one.idstr


@pytest.fixture
def two(uri: str) -> Callable[..., Two]:
    return lambda source=None, destination=None: Two(uri, source or {}, destination or {})


@pytest.mark.parametrize(
    ("here", "there"), [(False, False), (True, True), (True, False), (False, True)]
)
@pytest.mark.parametrize("way_back", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_of_it_arrives(two: Callable[..., Two], here: bool, there: bool, way_back: bool):
    pair = two({"rdma-pin-all": here, "return-path": way_back}, {"rdma-pin-all": there})
    arriving = pair.incoming()
    result = pair.source.migrate(pair.uri).wait(60)
    arriving.wait(60)
    pair.check_equal()
    assert result.acknowledged is way_back
    assert pair.destination.machine.is_running
    assert not pair.source.machine.is_running
    said = pair.source.query()["x-rdma"]
    assert said["pin-all"] is here
    assert said["outstanding"] == 0
    if here:
        assert said["bytes"] == sum(SIZES.values())
        assert said["registrations"] == len(SIZES)
    else:
        assert 6 * MIB <= said["bytes"] < sum(SIZES.values())
        assert said["zero-chunks"] > 0


def test_a_destination_that_may_not_pin_all_says_so(
    two: Callable[..., Two], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("whimbrel_rdma.transport.pin_limit", lambda: MIB)
    pair = two({"rdma-pin-all": True})
    arriving = pair.incoming()
    pair.source.migrate(pair.uri).wait(60)
    arriving.wait(60)
    pair.check_equal()
    assert pair.source.query()["x-rdma"]["pin-all"] is False


def test_old_chunks_are_given_up_where_no_more_may_be_pinned(
    two: Callable[..., Two], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("whimbrel_rdma.sending.pin_limit", lambda: 3 * MIB)
    asked: list[Kind] = []
    ask = Link.ask
    monkeypatch.setattr(
        Link,
        "ask",
        lambda link, message, kind: asked.append(message.kind) or ask(link, message, kind),
    )
    pair = two()
    arriving = pair.incoming()
    pair.source.migrate(pair.uri).wait(60)
    arriving.wait(60)
    pair.check_equal()
    given_up = asked.count(Kind.UNREGISTER_REQUEST)
    assert 0 <= pair.source.query()["x-rdma"]["registrations"] - given_up <= 3


@pytest.mark.slow
@pytest.mark.parametrize("obeyed", [True, False])
def test_a_source_keeps_to_what_the_kernel_lets_it_pin(uri: str, obeyed: bool):
    """1 MiB of its RAM at a time, beside its own buffers; one that does not look is refused by the kernel."""
    kernel = mortal.prepared("destination")
    incoming = kernel.incoming(uri, autostart=False)
    code = f"import sys; sys.path.insert(0, {str(Path(mortal.__file__).parent)!r}); import mortal;"
    if not obeyed:
        code += "import whimbrel_rdma.sending as s; s.pin_limit = lambda: None;"
    subprocess.run(
        [
            *("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"),
            *("prlimit", f"--memlock={OWN_USE}"),
            *(sys.executable, "-c", code + "mortal.main()"),
        ],
        input=f"source\t{uri}\t-\tSIGKILL\n",
        stdout=subprocess.PIPE,  # its end is that of the source
        text=True,
        timeout=100,
        check=True,
    )
    if not obeyed:
        with pytest.raises(MigrationError):
            incoming.wait(30)
        return
    incoming.wait(30)
    (theirs,) = kernel.machine.parts(RAMBlock)
    (ours,) = mortal.prepared("source").machine.parts(RAMBlock)
    assert np.array_equal(ours.view, theirs.view)


def test_a_machine_that_writes_meanwhile(two: Callable[..., Two]):
    pair = two({"downtime-limit": 1000})
    block = pair.source.machine.parts(RAMBlock)[0]
    ended = threading.Event()

    def write() -> None:
        page = 0
        while not ended.wait(0.01) and pair.source.machine.is_running:
            page = (page + 7) % block.pages
            with pair.source.machine.turn:
                if pair.source.machine.is_running:
                    block.rows[page] = page & 0xFF or 1
                    block.mark_dirty(page * 4096, 4096)

    thread = threading.Thread(target=write)
    arriving = pair.incoming()
    thread.start()
    try:
        pair.source.migrate(pair.uri).wait(60)
        arriving.wait(60)
    finally:
        ended.set()
        thread.join()
    pair.check_equal()


@pytest.mark.slow
def test_a_machine_under_stress_moves_and_runs_on(uri: str):
    """From process to process, while it writes faster than it may be sent: no write of it is lost."""
    config = StressConfig(ram=2 * MIB, rate=1e6)
    with Pair(config, settings={"max-bandwidth": MIB // 2}) as pair:
        pair.source.call("boot")
        pair.destination.call("incoming", uri=uri)
        pair.source.call("migrate", uri=uri)
        wait_until(
            lambda: pair.source.call("query").get("ram", {}).get("dirty-sync-count", 0) > 3,
            "three passes",
        )
        pair.source.call("set", **{"max-bandwidth": 0, "downtime-limit": 5000})
        assert pair.source.call("wait")["acknowledged"]
        pair.destination.call("ticked")
        proof = pair.destination.call("verify")
        assert proof["holds"], proof["text"]
        assert pair.running() == ["destination"]
        assert pair.violations() == []


def test_cancelled_on_the_source(two: Callable[..., Two]):
    pair = two({"max-bandwidth": MIB})
    arriving = pair.incoming()
    migration = pair.source.migrate(pair.uri)
    wait_until(lambda: pair.source.query().get("x-rdma", {}).get("bytes"), "writes")
    migration.cancel()
    with pytest.raises(Cancelled):
        migration.wait(30)
    with pytest.raises(MigrationError):
        arriving.wait(30)
    assert pair.source.machine.is_running
    assert not pair.destination.machine.is_running


def test_cancelled_on_the_destination(two: Callable[..., Two]):
    pair = two({"max-bandwidth": MIB})
    arriving = pair.incoming()
    migration = pair.source.migrate(pair.uri)
    wait_until(lambda: pair.source.query().get("x-rdma", {}).get("bytes"), "writes")
    arriving.cancel()
    with pytest.raises(MigrationError):
        migration.wait(30)
    with pytest.raises(Cancelled):
        arriving.wait(30)
    assert pair.source.machine.is_running


def test_cancelled_before_the_destination_accepts(two: Callable[..., Two]):
    pair = two()
    transport = RdmaTransport()
    address = transport.parse(pair.uri.removeprefix("rdma:"))
    with transport.listen(address, TransportContext(role=Role.DESTINATION)):
        migration = pair.source.migrate(pair.uri)
        with pytest.raises(TimeoutError):
            migration.wait(1)
        migration.cancel()
        with pytest.raises(Cancelled):
            migration.wait(30)
    assert pair.source.machine.is_running


def test_cancelled_when_the_machine_stands_still(two: Callable[..., Two]):
    pair = two({"pause-before-switchover": True})
    arriving = pair.incoming()
    migration = pair.source.migrate(pair.uri)
    wait_until(lambda: pair.source.state.status is Status.PRE_SWITCHOVER or None, "the switchover")
    migration.cancel()
    with pytest.raises(Cancelled):
        migration.wait(30)
    with pytest.raises(MigrationError):
        arriving.wait(30)
    assert pair.source.machine.is_running
    assert not pair.destination.machine.is_running


def test_cancelled_while_nobody_came(two: Callable[..., Two]):
    arriving = two().incoming()
    arriving.cancel()
    with pytest.raises(Cancelled):
        arriving.wait(30)


def test_nobody_listens(two: Callable[..., Two]):
    pair = two()
    with pytest.raises(MigrationError, match="Start the destination first"):
        pair.source.migrate(pair.uri).wait(30)
    assert pair.source.machine.is_running
    assert pair.source.state.status is Status.FAILED


def test_other_blocks_on_the_destination(two: Callable[..., Two]):
    pair = two()
    pair.destination = Kernel(Machine("test-1.0", run_state=RunState.PRELAUNCH))
    pair.destination.machine.add(RAMBlock("ram", 24 * MIB))
    arriving = pair.incoming()
    with pytest.raises(MigrationError):
        pair.source.migrate(pair.uri).wait(30)
    with pytest.raises(MigrationError, match="unknown RAM block 'odd'"):
        arriving.wait(30)
    assert pair.source.machine.is_running
