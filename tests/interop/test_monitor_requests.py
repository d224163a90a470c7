"""The same requests to the monitors of QEMUs and to ours, valid and invalid, in the same order and the same states: keys,
types, error classes, and the texts that clients match on. Whatever differs is in the table of differences, with its reason.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import attrs
import pytest

from whimbrel_testing.peers import QemuBinaries, wait_until

from .monitors import Client, Difference, Start, differences, qemus, request, shape, whimbrels

pytestmark = pytest.mark.interop

VERSIONS = ("7.2", "10.0")

#: What clients look for in the text of an error: where it is in QEMU's, it must be in ours; elsewhere the words are free.
FRAGMENTS = (
    "migration process in progress",
    "waiting for an incoming migration",
    "paused due to previous migration",
    "Cannot resume if there is no paused migration",
    "has not been found",
    "already been started",
    "'-incoming' was not specified",
    "Migration not in expected state: ",
    "Migration is not finalized yet",
    "Invalid parameter type for",
    "JSON parse error",
    "No file descriptor supplied via SCM_RIGHTS",
    "unknown migration protocol",
)


@attrs.frozen
class Step:
    """One request under a name, or something done between two of them."""

    name: str
    payload: bytes = b""
    do: Callable[[Client], object] | None = None
    with_fd: bool = False


def ask(name: str, payload: bytes | str | dict[str, Any], *, with_fd: bool = False) -> Step:
    if isinstance(payload, dict):
        payload = json.dumps(payload)
    return Step(name, payload.encode() if isinstance(payload, str) else payload, with_fd=with_fd)


def call(command: str, /, **arguments: Any) -> Step:
    """A command, named by what is sent."""
    shown = ", ".join(f"{k.replace('_', '-')}={v!r}" for k, v in arguments.items())
    return Step(f"{command}({shown})", request(command, **arguments))


def capability(name: str, state: Any) -> Step:
    return call("migrate-set-capabilities", capabilities=[{"capability": name, "state": state}])


def channel(addr: dict[str, Any], kind: Any = "main", **arguments: Any) -> Step:
    return call("migrate", channels=[{"channel-type": kind, "addr": addr}], **arguments)


def negotiated(client: Client) -> object:
    return client.run("qmp_capabilities")


NEGOTIATE = Step("", do=negotiated)
NOWHERE = "exec:cat > /dev/null"


def wait(*states: str) -> Step:
    return Step("", do=lambda client: client.wait(*states))


def dirty_rate(status: str) -> Step:
    """Wait until a measurement is under way, which QEMU is not at once, or has ended."""

    def there(client: Client) -> bool:
        return bool(client.run("query-dirty-rate")["status"] == status)

    return Step("", do=lambda client: wait_until(lambda: there(client), status))


BEFORE_NEGOTIATION = [
    ask("a command before negotiation", {"execute": "query-status"}),
    ask("an unknown command before negotiation", {"execute": "no-such-command"}),
    ask("a command before negotiation, with id", {"execute": "query-status", "id": 7}),
    ask(
        "negotiation with an unknown capability",
        {"execute": "qmp_capabilities", "arguments": {"enable": ["flying"]}},
    ),
    ask(
        "negotiation with a capability that is a number",
        {"execute": "qmp_capabilities", "arguments": {"enable": [1]}},
    ),
    ask(
        "negotiation with capabilities that are no list",
        {"execute": "qmp_capabilities", "arguments": {"enable": "oob"}},
    ),
    ask(
        "negotiation with an unknown argument",
        {"execute": "qmp_capabilities", "arguments": {"disable": []}},
    ),
    ask("still before negotiation", {"execute": "query-status"}),
    ask("garbage before negotiation", "{]"),
    ask("negotiation", {"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": "n"}),
    ask("negotiation once more", {"execute": "qmp_capabilities", "id": "again"}),
]

WIRE = [
    NEGOTIATE,
    *(
        ask(f"id {json.dumps(value)}", {"execute": "query-name", "id": value})
        for value in (0, -1, 1.5, "", "text", "\u00fc\U0001f426", True, None, [], {}, [1, {"a": None}], 2**63, 10**18)
    ),
    ask("id of an unknown command", {"execute": "no-such-command", "id": {"a": [1]}}),
    ask("id of a bad argument", {"execute": "migrate", "arguments": {"uri": 1}, "id": [None]}),
    ask("unknown command", {"execute": "no-such-command"}),
    ask("command in capitals", {"execute": "QUERY-STATUS"}),
    ask("empty command", {"execute": ""}),
    ask("execute is a number", {"execute": 1}),
    ask("execute is null", {"execute": None}),
    ask("no execute", {"arguments": {}}),
    ask("no execute, with id", {"id": 5}),
    ask("nothing in it", {}),
    ask("unknown member", {"execute": "query-status", "extra": 1}),
    ask("unknown member, with id", {"execute": "query-status", "extra": 1, "id": "x"}),
    ask("exec-oob without oob", {"exec-oob": "query-status", "id": 1}),
    ask("both execute and exec-oob", {"execute": "query-status", "exec-oob": "query-status"}),
    ask("arguments is a list", {"execute": "query-status", "arguments": []}),
    ask("arguments is null", {"execute": "query-status", "arguments": None}),
    ask("arguments are empty", {"execute": "query-status", "arguments": {}}),
    ask("argument of a command that has none", {"execute": "query-status", "arguments": {"a": 1}}),
    ask("a list", "[]"),
    ask("a number", "17 "),
    ask("a string", '"query-status"'),
    ask("null", "null "),
    ask("a word", "query-status "),
    ask("an unfinished object, closed wrongly", '{"execute": "query-status"]'),
    ask("a comma too many", '{"execute": "query-status",}'),
    ask("a colon too few", '{"execute" "query-status"}'),
    ask("a key that is no string", '{1: "query-status"}'),
    ask("a bad escape", r'{"execute": "\z"}'),
    ask("a control character in a string", b'{"execute": "a\x01b"}'),
    ask("bytes that are not UTF-8", b'{"execute": "\xc3\x28"}'),
    ask("a lone surrogate", r'{"execute": "\ud800"}'),
    ask("a NUL", b"\0"),
    ask("resynchronised by a byte FF", b'{"execute": "query-st\xff'),
    ask("single quotes", "{'execute': 'query-name'}"),
    ask("white space everywhere", '\n {\t"execute"\r\n:\n"query-name" }\n\n'),
    ask("two requests at once", '{"execute":"query-name","id":1}{"execute":"query-name","id":2}'),
    ask("a good one behind a bad one", '{"execute":}{"execute":"query-name","id":2}'),
    ask("nested too deep", "[" * 1025 + "]" * 1025),
    ask("a whole number that is none", '{"execute": "query-name", "id": 01}'),
    ask("a huge whole number as id", '{"execute": "query-name", "id": 123456789012345678901234567890}'),
]  # fmt: skip

IDLE = [
    NEGOTIATE,
    call("query-status"),
    call("query-version"),
    call("query-name"),
    call("query-commands"),
    call("query-migrate"),
    call("query-migrate-capabilities"),
    call("query-migrate-parameters"),
    call("query-migrate", extra=1),
    call("migrate_cancel"),
    call("migrate_cancel", extra=1),
    call("migrate-continue", state="pre-switchover"),
    call("migrate-continue", state="none"),
    call("migrate-continue", state="flying"),
    call("migrate-continue", state=1),
    call("migrate-continue"),
    # migrate
    call("migrate"),
    call("migrate", uri=1),
    call("migrate", uri=None),
    call("migrate", uri=["tcp:127.0.0.1:1"]),
    call("migrate", uri=""),
    call("migrate", uri="nonsense"),
    call("migrate", uri="carrier:pigeon"),
    call("query-migrate"),
    call("migrate", uri="tcp:127.0.0.1"),
    call("migrate", uri="tcp:127.0.0.1:99999"),
    wait("failed"),
    call("migrate", uri="unix:"),
    call("migrate", uri="fd:nobody"),
    call("migrate", uri=NOWHERE, extra=True),
    call("migrate", uri=NOWHERE, blk="yes"),
    call("migrate", uri=NOWHERE, inc=1),
    call("migrate", uri=NOWHERE, detach="yes"),
    call("migrate", uri=NOWHERE, resume=True),
    call("migrate", uri=NOWHERE, resume="no"),
    call("migrate-incoming", uri="tcp:127.0.0.1:0"),
    call("migrate-incoming"),
    # channels instead of a uri
    call("migrate", channels=[]),
    call("migrate", channels={}),
    call("migrate", channels="tcp:127.0.0.1:1"),
    call("migrate", channels=[1]),
    call("migrate", channels=[{}]),
    call("migrate", channels=[{"channel-type": "main"}]),
    channel({}),
    channel({"transport": "pigeon"}),
    channel({"transport": 1}),
    channel({"transport": "socket"}),
    channel({"transport": "socket", "type": "inet"}),
    channel({"transport": "socket", "type": "inet", "host": "127.0.0.1"}),
    channel({"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": 4444}),
    channel({"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "4444", "extra": 1}),
    channel({"transport": "socket", "type": "unix"}),
    channel({"transport": "exec", "args": "cat"}),
    channel({"transport": "exec", "args": [1]}),
    channel({"transport": "file", "filename": "/x"}),
    channel({"transport": "socket", "type": "unix", "path": "/x"}, uri=NOWHERE),
    channel({"transport": "socket", "type": "unix", "path": "/x"}, kind="side"),
    channel({"transport": "socket", "type": "unix", "path": "/x"}, kind=1),
    # capabilities
    capability("events", True),
    capability("flying", True),
    capability("events", 1),
    capability("events", "on"),
    capability("", True),
    call("migrate-set-capabilities"),
    call("migrate-set-capabilities", capabilities=[]),
    call("migrate-set-capabilities", capabilities={}),
    call("migrate-set-capabilities", capabilities=["events"]),
    call("migrate-set-capabilities", capabilities=[{"capability": "events"}]),
    call("migrate-set-capabilities", capabilities=[{"state": True}]),
    call("migrate-set-capabilities", capabilities=[{"capability": 1, "state": True}]),
    call("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True, "x": 1}]),
    call(
        "migrate-set-capabilities",
        capabilities=[{"capability": "events", "state": False}, {"capability": "flying", "state": True}],
    ),
    # parameters
    call("migrate-set-parameters"),
    call("migrate-set-parameters", flying=1),
    call("migrate-set-parameters", max_bandwidth=1 << 20),
    call("migrate-set-parameters", max_bandwidth="1M"),
    call("migrate-set-parameters", max_bandwidth=1.5),
    call("migrate-set-parameters", max_bandwidth=None),
    call("migrate-set-parameters", max_bandwidth=True),
    call("migrate-set-parameters", max_bandwidth=-1),
    call("migrate-set-parameters", max_bandwidth=(1 << 64) - 1),
    call("migrate-set-parameters", max_bandwidth=1 << 64),
    call("migrate-set-parameters", max_bandwidth=0),
    call("migrate-set-parameters", downtime_limit=250),
    call("migrate-set-parameters", downtime_limit=2_000_000),
    call("migrate-set-parameters", downtime_limit=2_000_001),
    call("migrate-set-parameters", downtime_limit=-1),
    call("migrate-set-parameters", downtime_limit=1 << 64),
    call("migrate-set-parameters", downtime_limit="300"),
    call("migrate-set-parameters", downtime_limit=250, flying=1),
    call("query-migrate-parameters"),
    call("query-migrate-capabilities"),
    # the commands of 2013, which 7.2 has no more
    call("migrate_set_speed", value=1 << 20),
    call("migrate_set_downtime", value=0.1),
    call("migrate-set-cache-size", value=1 << 20),
    call("query-migrate-cache-size"),
    # descriptors
    call("getfd", fdname="mig"),
    call("getfd"),
    call("getfd", fdname=1),
    ask("getfd with a descriptor", request("getfd", fdname="mig"), with_fd=True),
    ask("getfd with a name that begins with a digit", request("getfd", fdname="1mig"), with_fd=True),
    call("closefd", fdname="mig"),
    call("closefd", fdname="mig"),
    call("closefd"),
    call("add-fd"),
    call("add-fd", fdset_id="one"),
    ask("add-fd with a descriptor", request("add-fd", fdset_id=3, opaque="x"), with_fd=True),
    ask("add-fd with a negative set", request("add-fd", fdset_id=-1), with_fd=True),
    call("announce-self"),
    call("announce-self", initial=50, max=550, rounds=5, step=100),
    call("announce-self", initial="50", max=550, rounds=5, step=100),
    # the dirty rate. Nothing is asked of another mode than page-sampling: QEMU 7.2 ends itself then, without KVM
    call("query-dirty-rate"),
    call("query-dirty-rate", calc_time_unit="hour"),
    call("query-dirty-rate", extra=1),
    call("calc-dirty-rate"),
    call("calc-dirty-rate", calc_time="1"),
    call("calc-dirty-rate", calc_time=1.5),
    call("calc-dirty-rate", calc_time=0),
    call("calc-dirty-rate", calc_time=-1),
    call("calc-dirty-rate", calc_time=61),
    call("calc-dirty-rate", calc_time=49, calc_time_unit="millisecond"),
    call("calc-dirty-rate", calc_time=60_001, calc_time_unit="millisecond"),
    call("calc-dirty-rate", calc_time=1, calc_time_unit="hour"),
    call("calc-dirty-rate", calc_time=1, sample_pages=127),
    call("calc-dirty-rate", calc_time=1, sample_pages=16_385),
    call("calc-dirty-rate", calc_time=1, sample_pages="512"),
    call("calc-dirty-rate", calc_time=1, mode="guessing"),
    call("calc-dirty-rate", calc_time=1, extra=1),
    call("query-dirty-rate"),
    call("calc-dirty-rate", calc_time=2, sample_pages=128, mode="page-sampling"),
    dirty_rate("measuring"),
    call("calc-dirty-rate", calc_time=1),
    dirty_rate("measured"),
    call("query-dirty-rate"),
    call("query-dirty-rate", calc_time_unit="millisecond"),
    # running
    call("cont"),
    call("query-status"),
    call("cont"),
    call("stop"),
    call("stop"),
    call("query-status"),
    call("stop", now=True),
]  # fmt: skip

ACTIVE = [
    NEGOTIATE,
    call("migrate-set-parameters", max_bandwidth=4096),
    call("migrate", uri=NOWHERE),
    wait("active"),
    call("query-migrate"),
    call("query-status"),
    call("migrate", uri=NOWHERE),
    call("migrate", uri=NOWHERE, resume=True),
    call("migrate-incoming", uri="tcp:127.0.0.1:0"),
    capability("pause-before-switchover", True),
    capability("events", False),
    call("migrate-set-parameters", max_bandwidth=8192),
    call("migrate-set-parameters", downtime_limit=200),
    call("migrate-continue", state="pre-switchover"),
    call("calc-dirty-rate", calc_time=1),
    call("cont"),
    call("query-status"),
    call("stop"),
    call("query-status"),
    call("migrate_cancel"),
    wait("cancelled"),
    call("query-migrate"),
    call("query-status"),
    call("migrate_cancel"),
]

PAUSED = [
    NEGOTIATE,
    capability("pause-before-switchover", True),
    call("cont"),
    call("migrate", uri=NOWHERE),
    wait("pre-switchover"),
    call("query-migrate"),
    call("query-status"),
    call("cont"),
    call("migrate", uri=NOWHERE),
    capability("events", True),
    call("migrate-continue", state="active"),
    call("query-status"),
    call("migrate-continue", state="pre-switchover"),
    wait("completed"),
    call("query-migrate"),
    call("migrate-continue", state="pre-switchover"),
]

COMPLETED = [
    NEGOTIATE,
    call("migrate-set-parameters", max_bandwidth=0),
    call("migrate", uri=NOWHERE),
    wait("completed"),
    call("query-migrate"),
    call("query-status"),
    call("migrate", uri=NOWHERE),
    call("migrate_cancel"),
    call("migrate-continue", state="pre-switchover"),
    capability("events", True),
    call("stop"),
    call("query-status"),
    call("cont"),
    call("query-status"),
    call("migrate", uri="unix:/nobody/listens/here"),
    wait("failed"),
    call("query-migrate"),
    call("query-status"),
    call("migrate", uri=NOWHERE),
    wait("completed"),
    call("query-migrate"),
]

INCOMING = [
    NEGOTIATE,
    call("query-status"),
    call("query-migrate"),
    call("migrate", uri=NOWHERE),
    call("cont"),
    call("query-status"),
    call("stop"),
    call("migrate-incoming"),
    call("migrate-incoming", uri=1),
    call("migrate-incoming", uri="carrier:pigeon"),
    call("migrate-incoming", uri="tcp:127.0.0.1:0", extra=1),
    call("migrate-incoming", uri="tcp:127.0.0.1:0"),
    call("query-migrate"),
    call("query-status"),
    call("migrate-incoming", uri="tcp:127.0.0.1:0"),
    call("migrate", uri=NOWHERE),
    call("migrate-continue", state="pre-switchover"),
]

#: Each in a machine of its own; the last one waits for a migration.
SCRIPTS = {
    "before negotiation": BEFORE_NEGOTIATION,
    "wire": WIRE,
    "idle": IDLE,
    "active": ACTIVE,
    "paused": PAUSED,
    "completed": COMPLETED,
    "incoming": INCOMING,
}

#: What a monitor of an app has to have. Of QEMU's other commands it has none.
COMMANDS = [
    "qmp_capabilities",
    "migrate",
    "migrate_cancel",
    "migrate-incoming",
    "migrate-continue",
    "query-migrate",
    "migrate-set-capabilities",
    "query-migrate-capabilities",
    "migrate-set-parameters",
    "query-migrate-parameters",
    "migrate_set_speed",
    "migrate_set_downtime",
    "migrate-set-cache-size",
    "query-migrate-cache-size",
    "query-status",
    "stop",
    "cont",
    "query-version",
    "query-commands",
    "query-name",
    "query-qmp-schema",
    "getfd",
    "closefd",
    "add-fd",
    "announce-self",
    "calc-dirty-rate",
    "query-dirty-rate",
    "quit",
]
_COMMANDS_OF_2013 = "(migrate_set_speed|migrate_set_downtime|(query-)?migrate-(set-)?cache-size)"


def lacks(names: str, reason: str) -> list[Difference]:
    """Capabilities and parameters that only QEMU has."""
    where = r".* idle: query-migrate-(capabilities|parameters)\(.*"
    return [Difference(where, f"{name}: QEMU's only", reason) for name in names.split()]


#: Every difference that there may be. One that no QEMU shows any more fails its test.
DIFFERENCES = [
    # ---- more, here
    Difference(".*: query-migrate.*", "x-(outcome|acknowledged|addresses): ours only", "ours; x- is for such members"),
    Difference(".*: query-commands.*", "x-whimbrel-.*: ours only", "ours; x- is for such commands"),
    Difference(".*: query-commands.*", f"{_COMMANDS_OF_2013}: ours only", "for scripts of 2013; gone from QEMU 6.0"),
    Difference(f".*: {_COMMANDS_OF_2013}.*", "'The command .* has not been found' at QEMU, success here", "for scripts of 2013; gone from QEMU 6.0"),
    Difference(".*: query-migrate-(parameters|capabilities).*", r"[\w-]+: ours only", "of the kernel and of plugins for what QEMU has not"),
    Difference("10.0 .*: query-migrate.*", "ram.skipped: ours only", "gone from QEMU 9.1; older clients look for it"),
    Difference("7.2 incoming: query-migrate.*", "status: ours only", "QEMU 10.0 tells the status of a listening destination, too"),
    Difference("7.2 idle: query-migrate.*", "error-desc: ours only", "QEMU 7.2 has a failed migration without a reason"),
    Difference("10.0 idle: query-migrate.*", "(status|error-desc): ours only", "a start that was refused counts as one that failed, as in QEMU 7.2"),
    Difference(".*: query-dirty-rate.*", "x-(written|memory|used): ours only", "exact, and how much is in use; x- is for such members"),
    Difference("7.2 .*: query-dirty-rate.*", "calc-time-unit: ours only", "QEMU has units since 8.2"),
    Difference("7.2 .*: (calc|query)-dirty-rate.*calc-time-unit=.*", "'Parameter 'calc-time-unit' is unexpected' at QEMU, .*", "QEMU has units since 8.2"),
    Difference("7.2 .*: calc-dirty-rate.*", r"'calc-time is out of range\[1, 60\]\.' at QEMU, 'Calculation time is out of range .*", "the text of QEMU 10.0, which has units"),
    Difference(".*: a huge whole number as id", r"id 1.2\d*e\+29 at QEMU, 123456789012345678901234567890 here", "an id comes back as it was"),
    # ---- less
    Difference(".*: greeting", r"QMP\.capabilities: .*", "oob is not offered: nothing here could be served by it"),
    Difference("7.2 .*: (query-status.*|arguments are empty)", "singlestep: QEMU's only", "gone from QEMU 8.2"),
    Difference(".*: query-commands.*", rf"(?!({'|'.join(COMMANDS)}):)[\w-]+: QEMU's only", "a monitor of migrations, not of QEMU's devices"),
    *lacks("announce-initial announce-max announce-rounds announce-step", "a machine is announced once, by its callback"),
    *lacks("postcopy-ram postcopy-blocktime postcopy-preempt release-ram max-postcopy-bandwidth", "no postcopy"),
    *lacks("multifd-qatzip-level", "no qatzip"),
    *lacks("zero-copy-send", "not in multifd here"),
    *lacks("tls-creds tls-hostname tls-authz", "no TLS"),
    *lacks("x-colo x-checkpoint-delay", "no COLO"),
    *lacks("background-snapshot", "no snapshots"),
    *lacks("x-ignore-shared", "all RAM is sent"),
    *lacks("validate-uuid", "a uuid that both sides have is always compared"),
    *lacks("late-block-activate", "what only one side may hold is taken before the start, never earlier"),
    *lacks("dirty-bitmaps", "no bitmaps of disks"),
    Difference(".* idle: query-migrate-capabilities.*", "zero-blocks False at QEMU, True here", "every QEMU since 1.6 takes them"),
    *lacks("compress compress-level compress-threads compress-wait-thread decompress-threads", "gone from QEMU 9.1"),
    *lacks("mapped-ram direct-io", "no file with fixed offsets"),
    *lacks("dirty-limit vcpu-dirty-limit x-vcpu-dirty-limit-period", "needs KVM's dirty ring"),
    *lacks("switchover-ack avail-switchover-bandwidth mode", "no such thing here"),
    # ---- other values
    Difference(".*: query-migrate-capabilities.*", "return-path False at QEMU, True here", "our commit lives by it: never lost, never twice"),
    # ---- other words
    Difference("7.2 .*", "'Parameter 'uri' is missing' at QEMU, .*", "QEMU 8.2 made uri optional"),
    Difference(r"10.0 .*channels=\[\].*", "'need either .* at QEMU, 'Channel list must have one entry.*", "says what is wrong with the list"),
    Difference("7.2 .*channels=.*", "'Parameter '(uri' is missing|channels' is unexpected)' at QEMU, .*", "QEMU has channels since 8.2"),
    Difference("7.2 .*: migrate.*", "'Parameter 'uri' expects a valid migration protocol' at QEMU, 'unknown migration protocol.*", "the text of QEMU 8.2"),
    Difference(".*: migrate.*'(tcp|unix):.*", "'(error parsing address|invalid Unix socket address).* at QEMU, .*", "the transport says what to write"),
    Difference(".*: migrate.*99999.*", "success at QEMU, 'port 99999 is above 65535.*", "what cannot work is refused, not tried"),
    Difference(".*: migrate-set-parameters.*", "'Parameter 'downtime_limit' expects an integer in the range .* at QEMU, 'Parameter 'downtime-limit' expects a value between 0 and 2000000 ms' here", "all ranges are told alike, and the parameter by its name"),
    Difference("10.0 .*: migrate.*(blk|inc)=.*", "'Parameter '(blk|inc)' is unexpected' at QEMU, 'Invalid parameter type.*", "gone from QEMU 9.1; older clients send them"),
    Difference(".*: negotiation with an unknown capability", "'Parameter 'null' does not accept.*", "QEMU has lost the name"),
    Difference(".*: nested too deep", "1026 answers at QEMU, 515 here", "of garbage behind an error each side finds another amount of further errors"),
]  # fmt: skip


Answers = dict[str, list[dict[str, Any]]]


def play(client: Client, steps: list[Step]) -> Answers:
    """The answers, by the names of the steps. A name that comes again is numbered."""
    answers: Answers = {"greeting": [client.greeting]}
    for step in steps:
        if step.do is not None:
            step.do(client)
            continue
        name, n = step.name, 1
        while name in answers:
            n += 1
            name = f"{step.name} #{n}"
        fds = os.pipe() if step.with_fd else ()
        answers[name] = client.ask(step.payload, fds[:1])
        for fd in fds:
            os.close(fd)
    return answers


def names(steps: list[Step]) -> list[str]:
    class Silent:
        greeting: dict[str, Any] = {}  # noqa: RUF012

        def ask(self, *_: object) -> list[dict[str, Any]]:
            return []

    return list(play(Silent(), [s for s in steps if s.do is None]))  # type: ignore[arg-type]


CASES = [(script, name) for script, steps in SCRIPTS.items() for name in names(steps)]


def play_all(machines: Callable[[], AbstractContextManager[Start]]) -> dict[str, Answers]:
    answers = {}
    for name, steps in SCRIPTS.items():
        with machines() as start:
            answers[name] = play(start(name == "incoming"), steps)
    return answers


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """All answers of our monitor."""
    return play_all(lambda: whimbrels(tmp_path_factory.mktemp("monitors")))


Found = dict[str, list[str]]


@pytest.fixture(scope="module")
def found(qemu_binaries: QemuBinaries, ours: dict[str, Answers]) -> Callable[[str], Found]:
    """What differs between a QEMU of a version and ours: by version, script and request."""

    @functools.cache
    def of(version: str) -> Found:
        binary = qemu_binaries.find(version)
        theirs = play_all(lambda: qemus(binary))
        return {
            f"{version} {script}: {name}": list(
                compare(name, theirs[script][name], ours[script][name])
            )
            for script, name in CASES
        }

    return of


def compare(name: str, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> Iterator[str]:
    if len(theirs) != len(ours):
        yield f"{len(theirs)} answers at QEMU, {len(ours)} here"
        return
    for a, b in zip(theirs, ours, strict=True):
        told = _told(a), _told(b)
        if a.get("id", "none") != b.get("id", "none"):
            yield f"id {a.get('id', 'none')} at QEMU, {b.get('id', 'none')} here"
        if ("error" in a) != ("error" in b):
            yield "{} at QEMU, {} here".format(*told)
        elif "error" in a:
            yield from differences(shape(a["error"]), shape(b["error"]))
            if a["error"]["class"] != b["error"]["class"]:
                yield f"class {a['error']['class']} at QEMU, {b['error']['class']} here"
            if not same_text(a["error"]["desc"], b["error"]["desc"]):
                yield "{} at QEMU, {} here".format(*told)
        else:  # the greeting has no "return"
            returned = by_name(a.get("return", a)), by_name(b.get("return", b))
            yield from differences(*map(shape, returned))
            yield from unequal(name.partition("(")[0], *returned)


def _told(answer: dict[str, Any]) -> str:
    return f"'{answer['error']['desc']}'" if "error" in answer else "success"


def by_name(returned: Any) -> Any:
    """Lists of what has a name, by it."""
    if isinstance(returned, list) and returned and set(returned[0]) == {"capability", "state"}:
        return {each["capability"]: each["state"] for each in returned}
    if isinstance(returned, list) and returned and "name" in returned[0]:
        return {each["name"]: "" for each in returned}
    return returned


#: What is compared as it is, of what both sides have: of these answers all members, of any other these members.
ALIKE_AS_A_WHOLE = (
    *("query-migrate-capabilities", "query-migrate-parameters", "query-name", "query-status"),
    "query-migrate-cache-size",
)
ALIKE_ANYWHERE = (
    *("status", "page-size", "expected-downtime"),
    *("sample-pages", "mode", "calc-time-unit", "dirty-rate"),
)


def unequal(command: str, theirs: Any, ours: Any) -> Iterator[str]:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        if command in ALIKE_AS_A_WHOLE and theirs != ours:
            yield f"{theirs} at QEMU, {ours} here"
        return
    for key in theirs.keys() & ours.keys():
        a, b = theirs[key], ours[key]
        if isinstance(a, dict):
            yield from unequal(command, a, b)
        elif (command in ALIKE_AS_A_WHOLE or key in ALIKE_ANYWHERE) and a != b:
            yield f"{key} {a} at QEMU, {b} here"


def same_text(theirs: str, ours: str) -> bool:
    """Equal, ours perhaps with a hint behind it; or with what clients look for in it."""
    if ours == theirs or ours.startswith(theirs + ". "):
        return True
    return any(f in theirs and f in ours for f in FRAGMENTS)


def allows(difference: Difference, where: str, what: str) -> bool:
    return bool(re.fullmatch(difference.where, where) and re.fullmatch(difference.what, what))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("script", "name"), CASES)
def test_same_answer(found: Callable[[str], Found], version: str, script: str, name: str) -> None:
    where = f"{version} {script}: {name}"
    unlisted = [
        what
        for what in found(version)[where]
        if not any(allows(d, where, what) for d in DIFFERENCES)
    ]
    assert not unlisted, f"{where}: {unlisted}"


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda d: f"{d.where} {d.what}")
def test_listed_difference_is_needed(found: Callable[[str], Found], difference: Difference) -> None:
    assert any(
        allows(difference, where, what)
        for version in VERSIONS
        for where, some in found(version).items()
        for what in some
    ), f"the answers are alike now: take it off the list ({difference.reason})"


def test_there_are_enough_requests() -> None:
    assert len(CASES) >= 80
