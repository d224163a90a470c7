"""Writes those pages of docs/reference that say what the code declares: URIs, settings, states and wrong streams.

    python tools/reference.py [--check]      --check: write nothing, exit with 1 when a page is not current

Only this repository's own distributions are looked at, whatever else is installed.
"""

import sys
import tomllib
from pathlib import Path

from whimbrel import Capability, Kernel, Parameter, PluginInfo, Plugins, Type
from whimbrel.settings import KERNEL_SETTINGS, MIB, PROFILE_2013, SIZE_MAX, TODAY, Profile, Setting
from whimbrel.state import diagram
from whimbrel_monitor import kinds
from whimbrel_monitor.commands import own as own_commands
from whimbrel_monitor.events import EVENTS
from whimbrel_monitor.reader import Limits
from whimbrel_ram.plugin import monitor_commands as ram_commands
from whimbrel_testing.wrong import Case, Side, all_cases

ROOT = Path(__file__).parents[1]
NOTE = "<!-- written by tools/reference.py: do not edit -->\n"


def own(info: PluginInfo) -> bool:
    return info.distribution in OWN


OWN = {
    tomllib.loads(path.read_text())["project"]["name"]
    for path in ROOT.glob("plugins/*/pyproject.toml")
}


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def code(text: str) -> str:
    return f"`{text}`" if text else ""


# ---- settings


def show(setting: Setting, value: object) -> str:
    """A value as a user would write it."""
    if isinstance(setting, Capability):
        return "on" if value else "off"
    assert isinstance(setting, Parameter)
    if setting.type is Type.SIZE and isinstance(value, int) and value and value % MIB == 0:
        return f"{value // MIB}MiB" + ("/s" if setting.unit.endswith("/s") else "")
    return f"{value}{' ' + setting.unit if setting.unit and value != '' else ''}"


def default(setting: Setting, profile: Profile) -> str:
    return show(setting, profile.values.get(setting.name, setting.default))  # type: ignore[attr-defined]


def allowed(setting: Setting) -> str:
    if isinstance(setting, Capability):
        return "on, off"
    assert isinstance(setting, Parameter)
    if setting.choices:
        return ", ".join(setting.choices)
    if setting.type is Type.BOOL:
        return "on, off"
    if setting.minimum is None and setting.maximum is None:
        return setting.type.value
    low = "" if setting.minimum is None else f"{setting.minimum:.0f}"
    unbounded = setting.maximum is None or setting.maximum >= SIZE_MAX
    text = f"{low} or more" if unbounded else f"{low} to {setting.maximum:.0f}"
    text += ", a power of two" if setting.power_of_two else ""
    return text + (f", no less than {code(setting.not_below)}" if setting.not_below else "")


def remarks(setting: Setting) -> str:
    parts = [setting.help + ("" if setting.help.endswith(".") else ".")]
    if setting.aliases:
        parts.append(f"Also called {', '.join(map(code, setting.aliases))}.")
    if setting.requires:
        parts.append(f"Requires {', '.join(map(code, setting.requires))}.")
    if setting.conflicts:
        parts.append(f"Excludes {', '.join(map(code, setting.conflicts))}.")
    return " ".join(parts)


def settings_table(settings: tuple[Setting, ...]) -> str:
    rows = [
        (
            code(s.name),
            "capability" if isinstance(s, Capability) else "parameter",
            default(s, TODAY),
            default(s, PROFILE_2013),
            allowed(s),
            s.side.value,
            s.when.value,
            remarks(s),
        )
        for s in settings
    ]
    headings = ("name", "kind", "default", "2013", "allowed", "side", "may change", "meaning")
    return table(headings, rows)


def settings_page(plugins: Plugins) -> str:
    parts = [
        "# Settings\n",
        NOTE,
        (
            "`kernel.settings[name] = value`, or `kernel.settings.update({...})` for several at once: all or none. Texts"
            " are understood: `500MiB/s`, `64M`, `300ms`, `0.3s`, `on`. Units are powers of 1024.\n"
        ),
        (
            'The column 2013 holds the defaults of `Kernel(profile="2013")`, which are those of QEMU 1.7. Side: who needs'
            " the setting; `both` must set it alike. `idle`: not while a migration runs.\n"
        ),
        "## whimbrel-core\n",
        settings_table(KERNEL_SETTINGS),
    ]
    for info, declared in plugins.settings():
        if own(info) and declared:
            parts += [f"## {info.distribution}\n", settings_table(tuple(declared))]
    return "\n".join(parts)


# ---- URIs


def uris_page(plugins: Plugins) -> str:
    rows = [
        (", ".join(map(code, spec.syntax.split(", "))), info.distribution, spec.summary)
        for spec, info in sorted(plugins._transports.values(), key=lambda pair: pair[0].schemes)
        if own(info)
    ]
    filters = [
        (code(f"{spec.name}::URI"), info.distribution, spec.summary)
        for spec, info in sorted(plugins._filters.values(), key=lambda pair: pair[0].name)
        if own(info)
    ]
    parts = [
        "# URIs\n",
        NOTE,
        (
            "`[FILTER::]...SCHEME:REST`. What follows the scheme is for its transport to understand. Only the name of a"
            " registered filter consumes `::`, so `tcp::4444` and `exec:a::b` mean what they always meant. `migctl --plugins`"
            " lists the schemes that are installed.\n"
        ),
        table(("transport", "distribution", ""), list(dict.fromkeys(rows))),
    ]
    if filters:
        parts.append(table(("filter", "distribution", ""), filters))
    return "\n".join(parts)


def states_page() -> str:
    return "\n".join(
        [
            "# States\n",
            NOTE,
            (
                "The states of a migration, in QEMU's words; both sides use the same table. A change that the table does not"
                " have is an error. `completed`, `failed` and `cancelled` are final until the next migration.\n"
            ),
            f"```mermaid\n{diagram()}\n```\n",
            (
                "How a finished migration ended, for the question who may run the machine, is its *outcome*: `completed`,"
                " `failed`, `cancelled`, or `unknown` when the link was lost after the [point of no"
                " return](../explanation/promise.md).\n"
            ),
        ]
    )


# ---- the monitor


def kind(of: kinds.Kind) -> str:
    match of:
        case kinds.Unsigned(wraps=True):
            return "size"
        case kinds.Unsigned():
            return "uint64"
        case kinds.Builtin():
            return of.name
        case kinds.Array():
            return f"[{kind(of.of)}]"
        case kinds.Choice():
            return ", ".join(of.words) if len(of.words) < 5 else "a word"
        case kinds.Union():
            return f"{{{of.tag}, …}}"
        case kinds.Object():
            return f"{{{', '.join(m.name for m in of.members)}}}"
    raise TypeError(of)


def members(of: tuple[kinds.Member, ...]) -> str:
    return ", ".join(f"{code(m.name)}{'' if m.required else '?'} {kind(m.kind)}" for m in of)


def monitor_page(plugins: Plugins) -> str:
    kernel = Kernel(plugins=plugins)
    rows = []
    for each in sorted([*own_commands(), *ram_commands()], key=lambda c: c.name):
        text = " ".join(each.help.split())
        arguments = members(each.members(kernel))
        if each.name == "migrate-set-parameters":
            arguments = "any [parameter](settings.md), aliases as well"
        rows.append((code(each.name), arguments, text))
    told = [(code(name), members(of)) for name, of in EVENTS.items()]
    limits = Limits()
    return "\n".join(
        [
            "# Monitor\n",
            NOTE,
            (
                "What [whimbrel-monitor](../../plugins/monitor/README.md) serves by QMP: the commands, and the differences from"
                " QEMU's. An argument with `?` may be left out. `query-qmp-schema` says the same to programs.\n"
            ),
            "## Commands\n",
            table(("command", "arguments", "what it does"), rows),
            "## Events\n",
            table(("event", "data"), told),
            (
                "STOP and RESUME always come; MIGRATION and MIGRATION_PASS with the capability `events`; SHUTDOWN before the app's"
                " `quit`.\n"
            ),
            "## What is other than in QEMU\n",
            table(
                ("what", "here", "why"),
                [
                    (
                        "version",
                        "10.0.0, `package` is `whimbrel` and its version",
                        "`device` on the way to `completed`, `channels` and `exit-on-error` are the surface of that release",
                    ),
                    ("clients", "several at once", "a person can look on while a program migrates"),
                    (
                        "`oob`",
                        "not offered",
                        "no command needs it: none waits for another client's",
                    ),
                    (
                        "limits of a message",
                        f"{limits.size >> 10} KiB, {limits.tokens} tokens, nesting {limits.nesting}; QEMU: 64 MiB, 2 Mi, 1024",
                        "memory that any client can take is bounded; requests here are small",
                    ),
                    (
                        "numbers",
                        "integers of any length come back in `id` as they were; what is no finite number is an error",
                        "QEMU makes floating-point numbers of the former, and answers `inf` to `1e999`, which is no JSON",
                    ),
                    (
                        "capabilities and parameters",
                        "those that the kernel and the plugins declare, by aliases as well",
                        "without the plugin there is no setting",
                    ),
                    (
                        "`return-path`",
                        "on unless switched off",
                        "[the promise](../explanation/promise.md) lives by it",
                    ),
                    (
                        "`migrate_cancel`",
                        "an error after the point of no return",
                        "the destination may run the machine already",
                    ),
                    (
                        "`pre-switchover`",
                        "ends in `failed` when the destination gives up",
                        "QEMU notices when it is continued; the machine stands still meanwhile",
                    ),
                    (
                        "`stop` during a switchover",
                        "is remembered: the machine runs on neither side afterwards",
                        "QEMU forgets it",
                    ),
                    (
                        "a failure after the machine was stopped",
                        "RESUME, then `failed`",
                        "with `failed` the machine is back already; QEMU lets it run behind that, but before `cancelled`",
                    ),
                    (
                        "`cont` after a migration",
                        "asks the fence, where the machine has one; refused while it is unknown who has the machine",
                        "never twice",
                    ),
                    (
                        "`migrate` when blocked",
                        "all reasons, separated by `; `",
                        "QEMU names one",
                    ),
                    (
                        "`migrate-incoming`",
                        "`exit-on-error` is false unless asked for, and needs an app that can be ended",
                        "an app is more than its machine; after a failure it may be told to listen again",
                    ),
                    (
                        "`add-fd`",
                        "a set holds one descriptor, whose name for `fd:` is `/dev/fdset/N`; `opaque` is not kept",
                        "one list of named descriptors, the kernel's",
                    ),
                    (
                        "`announce-self`",
                        "announces once; `interfaces` is refused; refused where the machine is not",
                        "how the network is told is the machine's and the plugins' affair",
                    ),
                    ("`quit`", "refused unless the app allows it", "see `Machine(quit=)`"),
                    (
                        "`calc-dirty-rate`",
                        "by `page-sampling` only; `query-dirty-rate` tells `x-written`, `x-memory`, `x-used` besides",
                        "tracking would have to be switched on in the machine; `dirty-rate` is whole MiB/s",
                    ),
                    (
                        "`query-migrate`",
                        "`x-outcome`, `x-acknowledged`, `x-addresses` besides",
                        "who may run the machine, whether the destination said so, where one can connect",
                    ),
                    (
                        "`query-qmp-schema`",
                        "of return values without declared members it says `any`",
                        "generated from the functions",
                    ),
                    (
                        "a mistake",
                        "delays that client's next request by a few milliseconds",
                        "a flood of them takes no time of others'",
                    ),
                    (
                        "a syntax error of a tcp client that has not negotiated",
                        "ends the connection",
                        "a web page can make a browser of this host send requests of HTTP with commands in them",
                    ),
                ],
            ),
        ]
    )


# ---- wrong streams

CLASSES = {
    "header": "magic and version",
    "configuration": "machine type, page bits, capabilities, uuid",
    "item": "what begins no item, at each place where one may begin",
    "section": "names, instances, versions, ids, parts of what was not started",
    "footer": "missing, of another section, of no section",
    "setup": "the list of RAM blocks: names, lengths, sums, counts",
    "page": "records of pages: offsets, blocks, flags, lengths, runs over the end",
    "ram": "RAM that does not come",
    "device": "payloads that are shorter, longer, unknown or missing",
    "state": "the run state",
    "command": "unknown, of another length, without what must come before",
    "end": "what follows the EOF byte, and vmdescriptions that do not fit",
    "cut": "the stream ends: at each boundary and inside of each item",
    "legal": "odd and right: to be taken by all",
}


def _takes(case: Case, side: Side) -> str:
    return "takes it" if side in case.taken_by else "refuses"


def wrong_streams_page() -> str:
    cases = all_cases()
    kinds = [(kind, sum(c.name.startswith(kind + "-") for c in cases)) for kind in CLASSES]
    assert sum(n for _, n in kinds) == len(cases)
    differ: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        if case.why:
            key = (*(_takes(case, side) for side in Side), case.why)
            differ.setdefault(key, []).append(case.name)
    rows = [
        (", ".join(map(code, names)), qemu_7, qemu_10, app, keep, why)
        for (app, keep, qemu_7, qemu_10, why), names in differ.items()
    ]
    return "\n".join(
        [
            "# Wrong streams\n",
            NOTE,
            (
                f"`whimbrel_testing.wrong` has {len(cases)} streams, each wrong in one place, of the machine"
                " `qemu-system-x86_64 -M none -m 1`. The tests give them to an app's machine with the same parts (app), to"
                " `migctl receive` (receive), to `migctl relay`, and to QEMU 7.2 and 10.0 with `-incoming`. Whoever refuses one"
                " says the section, the byte offset, what was expected and what was found; nobody waits for more, and no"
                " length that a stream claims is allocated.\n"
            ),
            table(
                ("class", "streams", "what is wrong"),
                [(code(k), str(n), CLASSES[k]) for k, n in kinds],
            ),
            "## Where whimbrel and QEMU differ\n",
            (
                "All else is taken by all or refused by all. A machine of whimbrel's is stricter where something is missing;"
                " `migctl receive` keeps what it has no machine to compare with, and asks for a stream that is whole.\n"
            ),
            table(("streams", "QEMU 7.2", "QEMU 10.0", "app", "receive", "why"), rows),
        ]
    )


def main() -> int:
    plugins = Plugins.load()
    broken = [i for i in plugins.infos() if own(i) and i.state in ("broken", "conflict")]
    Kernel(plugins=plugins)  # refuses settings that are declared twice
    pages = {
        "uris.md": uris_page(plugins),
        "settings.md": settings_page(plugins),
        "states.md": states_page(),
        "monitor.md": monitor_page(plugins),
        "wrong-streams.md": wrong_streams_page(),
    }
    stale = []
    for name, text in pages.items():
        path = ROOT / "docs" / "reference" / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"{', '.join(stale)}: not current; run `make docs`", file=sys.stderr)
        return 1
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
