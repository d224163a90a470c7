"""Each wrong stream is refused for what is wrong with it, at the byte where it is, and no stream makes a loader wait."""

import tracemalloc

import attrs
import pytest

from whimbrel.channel import MemoryChannel
from whimbrel.errors import EndOfStream, MigrationError, RemoteError
from whimbrel.wire.return_path import encode_shut
from whimbrel_testing.wrong import Side, all_cases
from whimbrel_testing.wrong.loaders import (
    LOADERS,
    App,
    ClosedSource,
    SilentSource,
    WaitsForever,
    keep,
    load_app,
    load_keep,
)
from whimbrel_testing.wrong.pieces import OPEN_RETURN_PATH, Bad, command, stream, u32

CASES = all_cases()
BY_NAME = {case.name: case for case in CASES}
LOAD = dict(LOADERS)
#: A stream is read through a buffer that is not counted, a page of 4 KiB at a time into memory that is not either.
LIMIT = 8 << 20

pytestmark = pytest.mark.timeout(20)


def refused(load, data, source=ClosedSource):
    """The error, or None."""
    try:
        load(data, source)
    except MigrationError as error:
        return error
    return None


def check(error, refusal, case):
    assert isinstance(error, RemoteError), repr(error)
    assert refusal.says in str(error)
    assert error.section == refusal.section
    assert error.offset is not None
    assert 0 <= error.offset <= len(case.data())
    if refusal.exact:
        assert error.offset in case.bad
    assert error.expected is not None or error.hint
    assert str(error).isprintable()


@pytest.mark.parametrize("loader", LOAD)
@pytest.mark.parametrize("name", BY_NAME)
def test_each_is_refused_for_what_is_wrong_with_it(name, loader):
    case = BY_NAME[name]
    refusal = getattr(case, loader)
    error = refused(LOAD[loader], case.data())
    if refusal is None:
        assert error is None
    else:
        check(error, refusal, case)


@pytest.mark.parametrize("loader", LOAD)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_source_that_stays_connected_makes_nobody_wait(name, loader):
    """Only where bytes are missing, waiting for them is right: what is wrong is wrong without a further byte."""
    case = BY_NAME[name]
    refusal = getattr(case, loader)
    closed = refused(LOAD[loader], case.data())
    if isinstance(closed, EndOfStream):
        with pytest.raises(WaitsForever):
            LOAD[loader](case.data(), SilentSource)
        return
    silent = refused(LOAD[loader], case.data(), SilentSource)
    if (name, loader) == ("end-closed-after-eof", "keep"):
        assert "nothing came for 30 s" in str(
            silent
        )  # only its end shows that no description follows
    elif refusal is None:
        assert silent is None
    else:
        check(silent, refusal, case)


@pytest.mark.parametrize("loader", LOAD)
def test_no_claim_of_a_stream_takes_memory(loader):
    """A length, a count or a size that a stream claims is not what is allocated."""
    refused(LOAD[loader], BY_NAME["legal-plain"].data())  # imports, once
    for case in CASES:
        data = case.data()
        tracemalloc.start()
        try:
            refused(LOAD[loader], data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < LIMIT + 8 * len(data), case.name


def test_the_app_is_the_machine_that_sent_the_legal_streams():
    app = App()
    app.load(ClosedSource(BY_NAME["legal-plain"].data()))
    assert (app.timer.cpu_ticks_offset, app.timer.cpu_clock_offset) == (1000, 2000)
    assert bytes(app.ram.buffer[4096:8192]) == b"\x5a" * 4096
    assert bytes(app.ram.buffer[8192:]).count(0) == len(app.ram.buffer) - 8192
    assert app.machine.received_run_state == "prelaunch"


@pytest.mark.parametrize(
    "name", ["page-flags-000", "footer-wrong-id-part", "end-vmdescription-not-json"]
)
def test_a_source_that_wants_answers_is_told(name):
    case = BY_NAME[name]
    data = case.data().replace(
        b"\x01\0\0\0\x02\x03ram", command(OPEN_RETURN_PATH) + b"\x01\0\0\0\x02\x03ram"
    )
    answers = MemoryChannel()
    error = refused(load_keep, data, lambda data, **_: ClosedSource(data, answers=answers))
    assert case.keep.says in str(error)
    assert bytes(answers.data) == encode_shut(1)


def test_an_error_among_the_devices_is_found_by_the_offset_in_the_stream():
    data = stream(state=[Bad(b"\x42"), *stream()[7:8]])
    whole = b"".join(p.data if isinstance(p, Bad) else p for p in data)
    error = refused(load_keep, whole)
    assert f"byte offset {whole.index(b'globalstate') - 7}, " not in str(error)
    assert f"(section 'globalstate', byte offset {whole.index(b'B', 4200)})" in str(error)


def test_the_classes_of_the_matrix_are_all_there():
    assert {case.name.split("-")[0] for case in CASES} == {
        *("header", "configuration", "item", "section", "footer", "setup", "page", "ram", "device"),
        *("state", "command", "end", "cut", "legal"),
    }
    assert len(CASES) >= 200


@pytest.mark.parametrize("name", BY_NAME)
def test_a_difference_has_a_reason_and_only_a_difference(name):
    case = BY_NAME[name]
    alike = case.taken_by in (frozenset(), frozenset(Side))
    assert bool(case.why) != alike


def test_the_offsets_of_a_piece():
    data = stream(start=[b"ab", Bad(u32(1)), b"cd"], stops="start")
    assert b"".join(p.data if isinstance(p, Bad) else p for p in data)[-8:] == b"ab\0\0\0\1cd"


def test_apps_may_be_given_any_source():
    assert refused(load_app, b"QEVM") is not None


BOTH = [case.name for case in CASES if case.app is None and case.keep is None]


@pytest.mark.parametrize("name", BOTH)
def test_the_two_loaders_got_the_same_machine(name, tmp_path):
    data = BY_NAME[name].data()
    app, again = App(), App()
    app.load(ClosedSource(data, answers=MemoryChannel()))
    kept = keep(ClosedSource(data, answers=MemoryChannel()), tmp_path / "kept")
    again.load(ClosedSource(kept))
    assert bytes(again.ram.buffer) == bytes(app.ram.buffer)
    assert attrs.asdict(again.timer) == attrs.asdict(app.timer)
    assert again.machine.received_run_state == app.machine.received_run_state
