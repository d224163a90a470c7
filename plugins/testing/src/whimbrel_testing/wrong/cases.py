"""The wrong streams, by class. Rows of the destination matrix of QEMU 7.2 and 10.0, and their neighbours.

What the two QEMUs do was seen with them, and is seen again in each run of the tests that compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from whimbrel_testing.wrong.case import Case, Refusal, Side
from whimbrel_testing.wrong.pieces import (
    ADVISE,
    BITMAP,
    COLO,
    CONTINUE,
    DISCARD,
    END,
    EOF,
    EOS,
    EOS_FLAG,
    GOOD,
    LISTEN,
    MEM_SIZE,
    OPEN_RETURN_PATH,
    PACKAGED,
    PAGE,
    PAGE_FLAG,
    PAGES,
    PART,
    PING,
    RAM,
    RAM_ID,
    RESUME,
    RUN,
    START,
    STATE,
    STATE_ID,
    STATE_TEXT,
    SWITCHOVER,
    TIMER,
    TIMER_ID,
    TIMER_PAYLOAD,
    TIMER_TEXT,
    ZERO,
    Bad,
    Piece,
    command,
    configuration,
    counted,
    delta,
    described,
    description,
    end,
    entry,
    footer,
    full,
    head,
    opaque,
    page,
    part,
    record,
    setup,
    start,
    state,
    stream,
    subsection,
    text,
    u16,
    u32,
    u64,
    zero,
)

_SAME: Final = Refusal("as the other")
_BOTH = frozenset((Side.QEMU_7_2, Side.QEMU_10_0))
_ONLY_7_2 = frozenset((Side.QEMU_7_2,))
_ONLY_10_0 = frozenset((Side.QEMU_10_0,))
_NONE: frozenset[Side] = frozenset()

# ---- why the sides differ

KEEPS = "a keeper has no machine to compare with: the destination that gets the file does that"
WHOLE_NAME = "a prefix of a name is another name; QEMU compares as many bytes as came"
MISSING_BLOCK = "RAM that does not come would be zero: the machine is not the same"
MISSING_DEVICE = (
    "a device that does not come would be in its reset state: the machine is not the same"
)
TAIL_ONLY = (
    "the device sections are kept as they came; a vmdescription that fits them is the only check"
)
UNREAD = "a live section that nobody here can read is kept as it came; the destination that gets the file decides"
FORM_SHOWS = "a keeper finds out the form of the stream, which an old machine type has"
NO_TEXT = (
    "without a vmdescription nothing shows where the device sections end, nor that they are whole"
)


def _case(
    name: str,
    pieces: Piece,
    app: str | None,
    section: str | None = None,
    *,
    exact: bool = True,
    keep: Refusal | None = _SAME,
    qemu: frozenset[Side] = _NONE,
    why: str = "",
) -> Case:
    refusal = None if app is None else Refusal(app, section, exact)
    assert isinstance(pieces, tuple)
    return Case(
        name=name,
        pieces=pieces,
        app=refusal,
        keep=refusal if keep is _SAME else keep,
        qemu=qemu,
        why=why,
    )


#: What a keeper says when the device sections and their description do not fit.
_NO_FIT = Refusal("before a vmdescription that fits the device sections", "timer", False)


def _header() -> Iterator[Case]:
    magic = "this is not a migration stream"
    yield _case("header-nothing", (Bad(),), "the stream ended")
    yield _case("header-one-byte", (b"Q", Bad()), "the stream ended")
    yield _case("header-magic", stream(header=[Bad(b"QEVN"), u32(3)]), magic)
    yield _case("header-little-endian", stream(header=[Bad(b"MVEQ"), u32(3)]), magic)
    yield _case("header-lower-case", stream(header=[Bad(b"qevm"), u32(3)]), magic)
    yield _case("header-http", (Bad(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"),), magic)
    yield _case("header-gzip", (Bad(bytes.fromhex("1f8b0800000000000003")), bytes(64)), magic)
    yield _case("header-multifd-channel", (Bad(u32(0x11223344)), u32(1), bytes(56)), magic)
    for version in (0, 2, 4, 9, 0x03000000):
        yield _case(
            f"header-version-{version}",
            stream(header=[b"QEVM", Bad(u32(version))]),
            "unsupported stream version",
        )


def _configuration() -> Iterator[Case]:
    def case(
        name: str, config: Piece, app: str | None, *, why: str = "", exact: bool = True,
        qemu: frozenset[Side] = _NONE, keep: Refusal | None = _SAME,
        section: str | None = "configuration",
    ) -> Case:  # fmt: skip
        return _case(
            f"configuration-{name}", stream(configuration=config), app, section,
            exact=exact, keep=keep, qemu=qemu, why=why,
        )  # fmt: skip

    good = configuration()
    other = "the machine type of the source is another"
    unprintable = "a machine type without a printable name"
    sub = "configuration/"
    yield case("other-machine", Bad(configuration("isapc")), other, keep=None, why=KEEPS)
    yield case("longer-name", Bad(configuration("none-2.0")), other, keep=None, why=KEEPS)
    yield case(
        "prefix", Bad(configuration("non")), other, keep=None, qemu=_BOTH,
        why=f"{WHOLE_NAME}; {KEEPS}",
    )  # fmt: skip
    yield case(
        "empty-name", Bad(configuration("")), unprintable, qemu=_BOTH, why=WHOLE_NAME,
    )  # fmt: skip
    yield case("nul-behind-name", Bad(configuration("none\0")), unprintable, qemu=_BOTH,
               why=f"{WHOLE_NAME}, and a NUL is part of none")  # fmt: skip
    yield case("name-of-4-gib", [b"\7", Bad(u32(0xFFFFFFFF)), b"none"], "is too long")
    yield case("name-of-1-mib", [b"\7", Bad(u32(1 << 20)), b"n" * (1 << 20)], "is too long")
    yield case("not-ascii", Bad(configuration(b"n\xf6ne")), unprintable)
    yield case("page-bits-13", [Bad(good + subsection(sub + "target-page-bits", u32(13)))],
               "the target page bits of the source is another", exact=False,
               keep=Refusal("unknown combination of flags", "ram", False))  # fmt: skip
    for bits in (0, 9, 200, 0xFFFFFFFF):
        yield case(f"page-bits-{bits}", [Bad(good + subsection(sub + "target-page-bits", u32(bits)))],
                   "the target page bits of the source is another", exact=False,
                   keep=Refusal("bad page size", "configuration", False))  # fmt: skip
    capabilities = sub + "capabilities"
    yield case("capability-ignore-shared",
               [Bad(good + subsection(capabilities, u32(1) + counted("x-ignore-shared")))],
               "the source has capability x-ignore-shared on")  # fmt: skip
    yield case("capability-mapped-ram",
               [Bad(good + subsection(capabilities, u32(1) + counted("mapped-ram")))],
               "the source has capability mapped-ram on")  # fmt: skip
    yield case("capability-unknown",
               [Bad(good + subsection(capabilities, u32(1) + counted("x-nobody-knows")))],
               "the source has capability x-nobody-knows on")  # fmt: skip
    yield case("capabilities-4-gi", [good, Bad(subsection(capabilities, u32(0xFFFFFFFF)))],
               "too many capabilities")  # fmt: skip
    yield case("capabilities-too-few-names", [good, Bad(subsection(capabilities, u32(3)))],
               "a capability without a printable name", exact=False)  # fmt: skip
    yield case("unknown-subsection", [good, Bad(subsection(sub + "weather", u32(1)))],
               "unknown subsection")  # fmt: skip
    yield case("subsection-version", [good, Bad(subsection(sub + "uuid", bytes(16), version=2))],
               "unsupported version")  # fmt: skip
    yield case("foreign-subsection", [good, Bad(subsection("cpu/weather", u32(1)))],
               "unknown subsection")  # fmt: skip
    yield _case("configuration-missing", stream(configuration=b"", start=Bad(START)),
                "the configuration section is missing", keep=None,
                why=f"{FORM_SHOWS}; {KEEPS}")  # fmt: skip
    yield case("twice", [good, Bad(good)], "unknown item type", section=None)


def _items() -> Iterator[Case]:
    for kind in (0x05, 0x09, 0x0A, 0x42, 0x7E, 0x80, 0xFF):
        for where in ("start", "end", "state"):
            late = where == "state"
            early_05 = kind == 0x05 and where == "start"  # taken for a subsection
            yield _case(
                f"item-type-{kind:02x}-before-{where}",
                stream(**{where: [Bad(bytes((kind,))), GOOD[where]]}),
                "has an unsupported version" if early_05 else "unknown item type",
                "configuration" if early_05 else None,
                exact=not early_05,
                keep=_NO_FIT if late else _SAME,
            )
    yield _case("item-vmdescription-before-eof", stream(eof=b"", state=[STATE, Bad()]),
                "unknown item type", keep=_NO_FIT)  # fmt: skip
    yield _case("item-configuration-late", stream(part=[PART, Bad(configuration())]),
                "unknown item type")  # fmt: skip


def _sections() -> Iterator[Case]:
    def devices(
        name: str, bad: Piece, app: str | None, section: str | None, **facts: object
    ) -> Case:
        return _case(f"section-{name}", stream(state=bad), app, section, **facts)  # type: ignore[arg-type]

    unprintable = "a section without a printable name"
    nobody = full(9, "nobody", b"1234")
    told = description(TIMER_TEXT, opaque("nobody", 4), STATE_TEXT)
    yield _case("section-unknown", stream(state=[Bad(nobody), STATE], description=told),
                "unknown section 'nobody'", "nobody", keep=None, why=KEEPS)  # fmt: skip
    wrong = description(TIMER_TEXT | {"instance_id": 1}, STATE_TEXT)
    yield _case("section-wrong-instance",
                stream(timer=Bad(full(0, "timer", TIMER_PAYLOAD, 1, 2)), description=wrong),
                "unknown section 'timer' instance 1", "timer", keep=None, why=KEEPS)  # fmt: skip
    for version in (3, 0xFFFFFFFF):
        yield _case(f"section-newer-{version}",
                    stream(timer=Bad(full(0, "timer", TIMER_PAYLOAD, 0, version))),
                    "unsupported version", "timer", keep=None, why=KEEPS)  # fmt: skip
    yield _case("section-version-0", stream(timer=Bad(full(0, "timer", TIMER_PAYLOAD, 0, 0))),
                "unsupported version", "timer", keep=None, why=KEEPS)  # fmt: skip
    yield devices("no-name", [Bad(full(9, "", b"")), STATE], unprintable, None,
                  keep=_NO_FIT)  # fmt: skip
    yield devices("name-of-255", [Bad(full(9, "n" * 255, b"")), STATE], "unknown section", "n" * 255,
                  keep=_NO_FIT)  # fmt: skip
    yield devices("name-not-ascii", [Bad(head(4, 9, b"\xff\xfe") + footer(9)), STATE],
                  unprintable, None, keep=_NO_FIT)  # fmt: skip
    yield devices("name-for-a-terminal", [Bad(head(4, 9, "\x1b[2J[/red]") + footer(9)), STATE],
                  unprintable, None, keep=_NO_FIT)  # fmt: skip
    yield _case("section-live-name-for-a-terminal",
                stream(start=[START, Bad(head(1, 9, "\x1b[2J[/red]") + u32(1) + footer(9))]),
                unprintable)  # fmt: skip
    yield _case("section-live-name-for-a-format",
                stream(start=[START, Bad(head(4, 9, "[/red]%s{0}") + u32(1) + footer(9))], eof=b""),
                "unknown section '[/red]%s{0}'", "[/red]%s{0}",
                keep=Refusal("before a vmdescription that fits", "[/red]%s{0}", exact=False))  # fmt: skip
    yield _case("section-live-unknown",
                stream(start=[START, Bad(head(1, 9, "weather") + u32(1) + footer(9))]),
                "unknown section 'weather'", "weather", keep=None,
                why=UNREAD)  # fmt: skip
    weather = head(1, 9, "weather") + u32(1) + footer(9)
    late = Refusal("the live section 'weather' needs a plugin", "weather")
    yield _case("section-live-unknown-behind-pages", stream(end=[Bad(weather), END]),
                "unknown section 'weather'", "weather", keep=late)  # fmt: skip
    never = "of a section that was never started"
    yield _case("section-part-of-unknown-id", stream(part=[Bad(part(EOS, 77)), PART]), never)
    yield _case("section-end-of-unknown-id", stream(end=[Bad(end(EOS, 77)), END]), never)
    yield _case("section-part-before-start", stream(start=[Bad(PART), START]), never)
    yield _case("section-end-before-start", stream(start=[Bad(END), START]), never)
    yield _case("section-part-of-id-0", stream(part=[Bad(part(EOS, 0)), PART]), never)
    yield _case("section-part-of-a-device", stream(state=[Bad(part(TIMER_PAYLOAD, TIMER_ID)), STATE]),
                never, keep=_NO_FIT, qemu=_BOTH,
                why="QEMU takes PART for any section whose id it has seen; a device has none")  # fmt: skip
    yield _case("section-ram-instance-1", stream(start=Bad(start(setup(entry("ram", RAM)), 1))),
                "unknown section 'ram' instance 1", "ram", keep=None, why=UNREAD)  # fmt: skip
    for version in (0, 3, 5):
        yield _case(f"section-ram-version-{version}",
                    stream(start=Bad(start(setup(entry("ram", RAM)), 0, version))),
                    "unsupported version", "ram")  # fmt: skip
    yield _case("section-part-without-payload", stream(part=Bad(b"\2" + u32(RAM_ID)), stops="part"),
                "the stream ended", "ram")  # fmt: skip


def _legal() -> Iterator[Case]:
    """Odd, and right: these must not be refused."""

    def legal(name: str, pieces: Piece, **facts: object) -> Case:
        facts = {"keep": None, "qemu": _BOTH} | facts
        return _case(f"legal-{name}", pieces, None, **facts)  # type: ignore[arg-type]

    setup_all = setup(entry("ram", RAM))
    yield legal("plain", stream())
    yield legal("page-bits-12", stream(configuration=configuration(
        "none", subsection("configuration/target-page-bits", u32(12)))))  # fmt: skip
    yield legal("uuid", stream(configuration=configuration(
        "none", subsection("configuration/uuid", bytes(range(16))))))  # fmt: skip
    uuid = subsection("configuration/uuid", bytes(range(16)))
    yield legal("uuid-twice", stream(configuration=configuration("none", uuid, uuid)))
    yield legal("no-capabilities", stream(configuration=configuration(
        "none", subsection("configuration/capabilities", u32(0)))))  # fmt: skip
    yield legal("ram-as-full", stream(start=start(setup_all[:-8] + PAGES + EOS, kind=4), part=b"", end=b""),
                )  # fmt: skip
    yield legal("start-twice", stream(start=[START, START]))
    yield legal("pages-in-start", stream(start=start(setup_all[:-8] + PAGES + EOS), part=b""))
    yield legal("setup-in-part", stream(part=[part(setup_all), PART]))
    yield legal("no-part", stream(part=b""))
    yield legal("no-end", stream(end=b""))
    yield legal("end-twice", stream(end=[END, END]))
    yield legal("part-after-end", stream(end=[END, PART]))
    yield legal("empty-parts", stream(part=[PART, *([part(EOS)] * 50)]))
    yield legal("id-of-32-bits", stream(
        start=head(1, 0xFFFFFFFF, "ram", 0, 4) + setup_all + footer(0xFFFFFFFF),
        part=part(PAGES + EOS, 0xFFFFFFFF), end=end(EOS, 0xFFFFFFFF)))  # fmt: skip
    yield legal("ids-reused", stream(state=full(TIMER_ID, "globalstate", state())))
    yield legal("devices-reversed", stream(timer=STATE, state=TIMER,
                description=description(STATE_TEXT, TIMER_TEXT)))  # fmt: skip
    yield legal("device-twice", stream(timer=[TIMER, TIMER],
                description=description(TIMER_TEXT, TIMER_TEXT, STATE_TEXT)))  # fmt: skip
    yield legal("device-before-ram", stream(configuration=[configuration(), TIMER], timer=b""))
    yield legal("continue-across-parts", stream(part=[PART, part(zero(9) + page(10) + EOS)]))
    yield legal("eos-with-address", stream(part=part(PAGES + u64(7 * PAGE | EOS_FLAG))))
    yield legal("eos-with-continue", stream(part=part(PAGES + u64(EOS_FLAG | CONTINUE))))
    yield legal("page-many-times", stream(part=part(PAGES + page(3) * 20 + zero(3) * 20 + EOS)))
    yield legal("run-of-zero-pages", stream(
        part=part(zero(0, "ram") + b"".join(zero(i) for i in range(1, 256)) + EOS)))  # fmt: skip
    yield legal("open-twice", stream(commands=command(OPEN_RETURN_PATH) * 2))
    yield legal("advise-of-dirty-bitmaps", stream(commands=command(ADVISE)))
    for size in (0, 101, 0xFFFFFFFF):
        yield legal(
            f"state-of-length-{size}", stream(state=full(STATE_ID, "globalstate", state(size=size)))
        )
    yield legal("state-absent", stream(state=b"", description=description(TIMER_TEXT)))
    yield legal(
        "vmdescription-of-length-0", stream(description=described(b"")), keep=_NO_FIT, why=NO_TEXT
    )


def _footers() -> Iterator[Case]:
    """The form of the stream is the machine type's; whimbrel finds it out at the first footer."""
    base = {"start": START, "part": PART, "end": END, "timer": TIMER, "state": STATE}
    for name, whole in base.items():
        late = name in ("timer", "state")
        section = {"timer": "timer", "state": "globalstate"}.get(name, "ram")
        section_id = whole[1:5]
        keep = _NO_FIT if late else _SAME
        if name != "start":
            yield _case(f"footer-missing-{name}", stream(**{name: (whole[:-5], Bad())}),
                        "the footer is missing", section, keep=keep, exact=False)  # fmt: skip
        yield _case(f"footer-wrong-id-{name}",
                    stream(**{name: (whole[:-5], Bad(b"\x7e" + u32(0x0BADF00D)))}),
                    "wrong section id in the footer", section, keep=keep)  # fmt: skip
        yield _case(f"footer-wrong-type-{name}",
                    stream(**{name: (whole[:-5], Bad(b"\x7f" + section_id))}),
                    "the footer is missing", section,
                    keep=Refusal("unknown item type") if name == "start" else keep)  # fmt: skip
    yield _case("footer-missing-start", stream(start=[START[:-5], Bad()]), "the footer is missing",
                "ram", exact=False, keep=Refusal("unknown item type", None, False))  # fmt: skip
    bare = {name: whole[:-5] for name, whole in base.items()}
    yield _case("footer-nowhere", stream(**{**bare, "start": [bare["start"], Bad()]}), "the footer is missing",
                "ram", keep=None, exact=False, why=FORM_SHOWS)  # fmt: skip


def _setup() -> Iterator[Case]:
    def case(name: str, payload: Piece, app: str | None, **facts: object) -> Case:
        pieces = [head(1, RAM_ID, "ram", 0, 4), payload, EOS + footer(RAM_ID)]
        return _case(f"setup-{name}", stream(start=pieces), app, "ram", **facts)  # type: ignore[arg-type]

    word = u64(RAM | MEM_SIZE)
    length = "bad length of RAM block"
    yield case("unknown-block", [Bad(word), entry("rom", RAM)], "unknown RAM block 'rom'",
               keep=Refusal("unknown RAM block 'ram'", "ram", False))  # fmt: skip
    yield case("half-size", [Bad(u64(RAM // 2 | MEM_SIZE)), entry("ram", RAM // 2)],
               "has another length on the source", keep=None, why=KEEPS)  # fmt: skip
    yield case("double-size", [Bad(u64(2 * RAM | MEM_SIZE)), entry("ram", 2 * RAM)],
               "has another length on the source", keep=None, why=KEEPS)  # fmt: skip
    yield case("further-block", [Bad(u64(2 * RAM | MEM_SIZE)), entry("ram", RAM), entry("rom", RAM)],
               "unknown RAM block 'rom'", keep=None, why=KEEPS)  # fmt: skip
    yield case("block-twice", [u64(2 * RAM | MEM_SIZE), entry("ram", RAM), Bad(entry("ram", RAM))],
               "listed twice", qemu=_BOTH,
               why="a list that names a block twice is not one that any QEMU writes")  # fmt: skip
    yield case("total-too-small", [u64(RAM // 2 | MEM_SIZE), Bad(entry("ram", RAM))], length)
    yield case("total-too-large", [u64(2 * RAM | MEM_SIZE), entry("ram", RAM), Bad()],
               "a RAM block without a printable name")  # fmt: skip
    yield case("total-of-8-eib", [Bad(u64(1 << 63 | MEM_SIZE)), entry("ram", 1 << 63)],
               "larger than this side accepts")  # fmt: skip
    yield case("total-of-1-tib", [Bad(u64(1 << 40 | MEM_SIZE)), entry("ram", 1 << 40)],
               "has another length on the source",
               keep=Refusal("larger than this side accepts", "ram"))  # fmt: skip
    yield case("length-of-16-eib", [word, Bad(entry("ram", (1 << 64) - PAGE))], length)
    yield case("length-0", [word, Bad(entry("ram", 0)), entry("ram", RAM)], length)
    yield case("length-not-of-pages",
               [u64(RAM | MEM_SIZE), Bad(entry("ram", RAM - 100)), entry("rom", 100)], length)  # fmt: skip
    yield case("name-empty", [word, Bad(entry("", RAM))], "without a printable name")
    yield case("name-with-nul", [word, Bad(entry(b"r\0m", RAM))], "without a printable name")
    yield case("name-not-ascii", [word, Bad(entry(b"r\xe4m", RAM))], "without a printable name")
    yield case("name-of-255", [word, Bad(b"\xff" + b"ram")], "without a printable name")
    yield case("65537-blocks",
               [u64((1 << 44) | MEM_SIZE), b"".join(entry(f"b{i}", PAGE) for i in range(65536)),
                Bad(entry("last", PAGE))], "too many RAM blocks",
               keep=Refusal("larger than this side accepts", "ram", False))  # fmt: skip


def _pages() -> Iterator[Case]:
    def case(name: str, payload: Piece, app: str | None, **facts: object) -> Case:
        pieces = [b"\2" + u32(RAM_ID), payload, footer(RAM_ID)]
        return _case(f"page-{name}", stream(part=pieces), app, "ram", **facts)  # type: ignore[arg-type]

    beyond = "a page behind the end of RAM block 'ram'"
    flags = "unknown combination of flags"
    yield case("behind-the-end", [Bad(zero(RAM // PAGE, "ram")), EOS], beyond)
    yield case("far-behind-the-end", [Bad(page(RAM // PAGE + 5, "ram")), EOS], beyond)
    yield case(
        "at-16-eib", [Bad(u64(-PAGE & (1 << 64) - 1 | ZERO) + counted("ram") + b"\0"), EOS], beyond
    )
    yield case("run-over-the-end",
               [zero(200, "ram"), b"".join(zero(i) for i in range(201, 256)), Bad(zero(256)), zero(257), EOS],
               beyond)  # fmt: skip
    yield case("data-run-over-the-end",
               [page(200, "ram"), b"".join(page(i) for i in range(201, 256)), Bad(page(256)), page(257), EOS],
               beyond)  # fmt: skip
    yield case("scattered-run-over-the-end",
               [zero(0, "ram"), b"".join(zero(i * 5 % 256) for i in range(60)), Bad(zero(999)), zero(3), EOS],
               beyond)  # fmt: skip
    yield case(
        "unknown-block", [Bad(record(ZERO, 0, "rom") + b"\0"), EOS], "unknown RAM block 'rom'"
    )
    yield case(
        "block-without-name", [Bad(record(ZERO, 0, "") + b"\0"), EOS], "unknown RAM block ''"
    )
    yield case("block-not-ascii", [Bad(record(PAGE_FLAG, 0, b"\xff\xff") + bytes(PAGE)), EOS],
               "unknown RAM block")  # fmt: skip
    yield case("continue-first", [Bad(zero(0)), EOS], "CONTINUE comes first")
    yield case("data-continue-first", [Bad(page(0)), EOS], "CONTINUE comes first")
    for value in (
        0x000,
        0x001,
        0x00A,
        0x018,
        0x012,
        0x014,
        0x006,
        0x02A,
        0x048,
        0x400,
        0x800,
        0xFFF,
    ):
        yield case(f"flags-{value:03x}", [Bad(u64(value) + counted("ram") + bytes(8)), EOS], flags)
    yield case("flags-100", [zero(0, "ram"), Bad(record(0x100) + u32(8) + bytes(8)), EOS],
               "a COMPRESS_PAGE record needs")  # fmt: skip
    for value, name in ((0x080, "HOOK"), (0x200, "MULTIFD_FLUSH")):
        yield case(f"flags-{value:03x}", [zero(0, "ram"), Bad(u64(value)), EOS],
                   f"a {name} record needs", qemu=_ONLY_10_0,
                   why="a record for RDMA or multifd where there is none says that pages are missing; 10.0 ignores it")  # fmt: skip
    yield case(
        "xbzrle", [zero(0, "ram"), record(0x040) + delta(b"\0\1\xf9"), EOS], None, qemu=_BOTH
    )
    for data, what in (
        (b"\0" + u16(3) + b"\0\1\xf9", "encoding"),
        (b"\1" + u16(0xFFFF) + bytes(64), "length"),
    ):
        yield case(f"xbzrle-{what}", [zero(0, "ram"), record(0x040), Bad(data), EOS],
                   "bad head of a XBZRLE record")  # fmt: skip
    for data, what in (
        (b"\5", "unchanged-only"),
        (b"\0\1\xf9\5", "unchanged-last"),
        (b"\0\1\xf9\0\1\xf9", "unchanged-nothing"),
        (b"\1\0", "changed-nothing"),
        (b"\1\4\xf9", "changed-beyond-data"),
        (b"\xff\x1f\2\xf9\xf9", "beyond-page"),
    ):
        yield case(f"xbzrle-{what}", [zero(0, "ram"), Bad(record(0x040) + delta(data)), EOS],
                   "a XBZRLE record cannot be decoded")  # fmt: skip
    yield case("filled-41", [zero(0, "ram", 0x41), EOS], None, keep=None, qemu=_ONLY_7_2,
               why="sources before QEMU 1.5 send such pages; QEMU refuses them since 8.2")  # fmt: skip
    yield case("eos-missing", [PAGES, Bad()], flags, exact=False)
    yield case("short", [page(0, "ram")[:-1], Bad(), EOS], "", exact=False)
    yield case("long", [page(0, "ram"), Bad(b"\xaa" * 8), EOS], flags)


def _devices() -> Iterator[Case]:
    footer_says = "the payload is longer or shorter"
    yield _case("device-short",
                stream(timer=[head(4, 0, "timer", 0, 2), TIMER_PAYLOAD[:-8], Bad(footer(0) + STATE[:3])],
                       state=STATE[3:]), footer_says, "timer", keep=_NO_FIT, exact=False)  # fmt: skip
    yield _case("device-long",
                stream(timer=[head(4, 0, "timer", 0, 2), TIMER_PAYLOAD, Bad(bytes(8)), footer(0)]),
                footer_says, "timer", keep=_NO_FIT)  # fmt: skip
    sub = subsection("timer/weather", u32(1))
    with_sub = dict(TIMER_TEXT)
    with_sub["subsections"] = [
        {"vmsd_name": "timer/weather", "version": 1,
         "fields": [{"name": "sun", "type": "uint32", "size": 4}]}
    ]  # fmt: skip
    yield _case("device-unknown-subsection",
                stream(timer=[head(4, 0, "timer", 0, 2), TIMER_PAYLOAD, Bad(sub), footer(0)],
                       description=description(with_sub, STATE_TEXT)),
                "timer/weather", "timer", keep=None, why=KEEPS)  # fmt: skip
    yield _case("device-foreign-subsection",
                stream(timer=[head(4, 0, "timer", 0, 2), TIMER_PAYLOAD,
                              Bad(subsection("rtc/weather", u32(1))), footer(0)]),
                footer_says, "timer", keep=_NO_FIT)  # fmt: skip
    yield _case("device-missing", stream(timer=b"", description=[Bad(), description(STATE_TEXT)]),
                "the stream ended without timer", "timer", keep=None, qemu=_BOTH,
                why=f"{MISSING_DEVICE}; {KEEPS}")  # fmt: skip
    yield _case("device-all-missing", stream(timer=b"", state=b"", description=[Bad(), description()]),
                "the stream ended without timer", "timer", keep=None, qemu=_BOTH,
                why=f"{MISSING_DEVICE}; {KEEPS}")  # fmt: skip
    for name, payload in (
        ("no-nul", state(b"x" * 100, size=100)),
        ("not-a-state", state(b"dreaming")),
        ("empty", state(b"")),
        ("not-ascii", state(b"\xff\xfe")),
    ):
        yield _case(f"state-{name}", stream(state=[head(4, STATE_ID, "globalstate"), Bad(payload),
                                                   footer(STATE_ID)]),
                    "no run state that is known", "globalstate", keep=None, why=KEEPS)  # fmt: skip


def _ram_missing() -> Iterator[Case]:
    yield _case("ram-missing", stream(start=b"", part=b"", end=b"", eof=[EOF, Bad()]),
                "the stream ended without ram", "ram", keep=None, qemu=_BOTH,
                why=f"{MISSING_BLOCK}; {KEEPS}")  # fmt: skip
    yield _case("ram-no-blocks", stream(start=start(setup(total=0)), part=part(EOS), eof=[EOF, Bad()]),
                "the stream left out RAM block 'ram'", "ram", keep=None, qemu=_BOTH,
                why=f"{MISSING_BLOCK}; {KEEPS}")  # fmt: skip
    yield _case("ram-no-setup", stream(start=start(EOS), eof=[EOF, Bad()]),
                "the stream left out RAM block 'ram'", "ram", qemu=_BOTH,
                why="without the list of blocks nothing shows that all of RAM came",
                keep=Refusal("unknown RAM block 'ram'", "ram", False))  # fmt: skip
    yield _case("ram-no-setup-no-pages", stream(start=start(EOS), part=part(EOS), eof=[EOF, Bad()]),
                "the stream left out RAM block 'ram'", "ram", keep=None, qemu=_BOTH,
                why=f"{MISSING_BLOCK}; {KEEPS}")  # fmt: skip


def _commands() -> Iterator[Case]:
    def case(name: str, bad: Piece, app: str | None, **facts: object) -> Case:
        return _case(f"command-{name}", stream(commands=bad), app, None, **facts)  # type: ignore[arg-type]

    unknown, length = "unknown command", "bad length of command"
    for number in (0, 12, 99, 0xFFFF):
        yield case(f"unknown-{number}", Bad(command(number)), unknown)
    yield case("unknown-with-64-kib", Bad(command(99, bytes(65535))), unknown)
    yield case("switchover-start", command(SWITCHOVER), None, keep=None, qemu=_ONLY_10_0,
               why="QEMU knows the command since 9.2; it asks for nothing")  # fmt: skip
    yield case("ping-without-return-path", Bad(command(PING, u32(1))), "PING without a return path")
    rp = command(OPEN_RETURN_PATH)
    for size in (0, 3, 5, 200):
        yield case(f"ping-of-{size}", [rp, Bad(command(PING, bytes(size)))], length)
    yield case(
        "ping-longer-than-the-stream", [rp, Bad(command(PING, u32(1), length=0xFFFF))], length
    )
    yield case("open-of-4", Bad(command(OPEN_RETURN_PATH, u32(1))), length)
    needs = "needs a capability that this side does not have"
    yield case("advise-16", Bad(command(ADVISE, u64(PAGE) + u64(PAGE))), needs)
    yield case("advise-8", Bad(command(ADVISE, u64(PAGE))), needs)
    yield case("listen-without-advise", Bad(command(LISTEN)), needs)
    yield case("run-without-listen", Bad(command(RUN)), needs)
    yield case("discard-without-advise", Bad(command(DISCARD, b"\0" + counted("ram\0") + u64(0) + u64(PAGE))),
               needs)  # fmt: skip
    late_asks = {"qemu": _BOTH, "why": "QEMU logs that it is illegal and goes on"}
    yield case("resume-without-pause", Bad(command(RESUME)), needs, **late_asks)
    yield case("bitmap-without-pause", Bad(command(BITMAP, counted("ram"))), needs, **late_asks)
    yield case(
        "colo",
        Bad(command(COLO)),
        needs,
        qemu=_ONLY_7_2,
        why="7.2 becomes the second of a COLO pair unasked; newer ones want the capability",
    )
    yield case("package-of-4-gib", Bad(command(PACKAGED, u32(0xFFFFFFFF))), needs)
    yield case(
        "package-in-package", Bad(command(PACKAGED, u32(9)) + command(PACKAGED, u32(0))), needs
    )
    yield case("package-of-5", Bad(command(PACKAGED, bytes(5))), length)
    late = stream(timer=[TIMER, Bad(command(99))])
    yield _case("command-unknown-among-devices", late, unknown, keep=_NO_FIT)


def _end() -> Iterator[Case]:
    def case(name: str, bad: Piece, **facts: object) -> Case:
        facts = {"keep": _NO_FIT, "qemu": _BOTH, "why": TAIL_ONLY} | facts
        return _case(f"end-{name}", stream(description=bad), None, **facts)  # type: ignore[arg-type]

    devices = text(TIMER_TEXT, STATE_TEXT)
    yield case("closed-after-eof", b"", keep=None, why="")
    yield case("other-byte-after-eof", Bad(b"\x42"), why=NO_TEXT)
    yield case("section-after-eof", Bad(TIMER), why=NO_TEXT)
    yield case("vmdescription-cut", Bad(described(devices)[:-20]), why=NO_TEXT)
    yield case("vmdescription-of-4-gib", Bad(described(devices, 0xFFFFFFFF)), why=NO_TEXT)
    yield case(
        "vmdescription-longer-than-sent", Bad(described(devices, len(devices) + 9)), why=NO_TEXT
    )
    yield case("vmdescription-shorter-than-sent", Bad(described(devices, len(devices) - 9)))
    yield case("vmdescription-not-json", Bad(described(b"{" + b"x" * 99)))
    yield case("vmdescription-not-an-object", Bad(described(b"[1, 2]")))
    yield case("vmdescription-nested", Bad(described(b'{"devices": ' + b"[" * 100_000)))
    yield case("vmdescription-of-others", Bad(description(opaque("nobody", 9))))
    yield case("vmdescription-without-one", Bad(description(TIMER_TEXT)))
    yield case(
        "vmdescription-with-one-more", Bad(description(TIMER_TEXT, STATE_TEXT, opaque("x", 1)))
    )
    huge = opaque("timer", 1 << 40)
    yield case("vmdescription-of-1-tib", Bad(description(huge, STATE_TEXT)))
    yield case("vmdescription-of-negative-size", Bad(description(opaque("timer", -24), STATE_TEXT)))
    deep: dict[str, object] = {"name": "x", "type": "uint8", "size": 1}
    for _ in range(200):
        deep = {"name": "x", "type": "struct", "size": 1, "struct": {"vmsd_name": "x", "version": 1,
                "fields": [deep]}}  # fmt: skip
    yield case(
        "vmdescription-200-deep", Bad(description(TIMER_TEXT | {"fields": [deep]}, STATE_TEXT))
    )
    yield case("bytes-behind-vmdescription", [described(devices), Bad(b"more")], keep=None, why="")


def _truncated() -> Iterator[Case]:
    """Cut at each boundary between items, and in the middle of each item."""
    names = list(GOOD)
    for name in names[: names.index("eof")]:
        whole = GOOD[name]
        assert isinstance(whole, bytes)
        if not whole:
            continue
        before = stream(stops=name)[:-1]
        late = name in ("timer", "state")
        inside = {"timer": "timer", "state": "globalstate", "header": None}.get(name, "ram")
        if name == "configuration":
            inside = None
        for cut in sorted({1, len(whole) // 2, len(whole) - 1, len(whole)}):
            section = inside if 5 < cut < len(whole) and cut > len(whole) // 4 else None
            keep: Refusal | None = _SAME
            if late and (name, cut) != ("timer", 1):
                keep = _NO_FIT
            yield _case(f"cut-{name}-{cut}", (*before, whole[:cut], Bad()), "the stream ended", section,
                        keep=keep)  # fmt: skip


def all_cases() -> tuple[Case, ...]:
    """All of them, each name once."""
    groups = (
        _header, _configuration, _items, _sections, _footers, _setup, _pages, _ram_missing, _devices,
        _commands, _end, _truncated, _legal,
    )  # fmt: skip
    cases = tuple(case for group in groups for case in group())
    names = [case.name for case in cases]
    double = {name for name in names if names.count(name) > 1}
    assert not double, f"two cases are called {double}"
    return cases
