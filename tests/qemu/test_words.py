"""What QEMU says, as it was seen, and what we make of it. Most of it is seen again in test_refusals; here is the rest."""

import pytest
from hypothesis import given, strategies as st

from whimbrel_qemu import advice, pci, words

INVALID = "qemu-system-x86_64: load of migration failed: Invalid argument\n"

#: Lines of QEMU 7.2.22 and 10.0.2: section, instance, field, guest, there, part of the reason.
SEEN = {
    "a stream of an old machine type": (
        "qemu-system-x86_64: Configuration section missing\n" + INVALID,
        ("configuration", None, None, None, None),
        "older than 2.4, the destination's is newer",
    ),
    "an old destination": (
        "qemu-system-x86_64: Unknown savevm section type 7\n" + INVALID,
        ("configuration", None, None, None, None),
        "destination's machine type is older than 2.4",
    ),
    "page size": (
        "qemu-system-x86_64: Received TARGET_PAGE_BITS is 13 but local is 12\n" + INVALID,
        ("configuration", None, "target page bits", "13", "12"),
        "8192 bytes, the destination's 4096",
    ),
    "a capability of the source": (
        "qemu-system-x86_64: Capability x-ignore-shared is off, but received capability is on\n"
        + INVALID,
        ("configuration", None, "x-ignore-shared", "on", "off"),
        "is on in the guest's stream, and off there",
    ),
    "a capability of the destination": (
        "qemu-system-x86_64: Capability x-ignore-shared is on, but received capability is off\n",
        ("configuration", None, "x-ignore-shared", "off", "on"),
        "is off in the guest's stream, and on there",
    ),
    "a capability of tomorrow": (
        "qemu-system-x86_64: Received unknown capability x-ignore-sharXX\n"
        "qemu-system-x86_64: Failed to load configuration/capabilities:capabilities\n" + INVALID,
        ("configuration", None, "x-ignore-sharXX", "on", None),
        "does not know the capability",
    ),
    "a newer subsection": (
        "qemu-system-x86_64: e1000/tx_tso_state: incoming version_id 9 is too new for local version_id 1\n"
        "qemu-system-x86_64: error while loading state for instance 0x0 of device '0000:00:05.0/e1000'\n"
        + INVALID,
        ("0000:00:05.0/e1000", 0, "e1000/tx_tso_state", "9", "1"),
        "too new",
    ),
    "an older section": (
        "qemu-system-x86_64: e1000: incoming version_id 0 is too old for local minimum version_id  1\n"
        "qemu-system-x86_64: error while loading state for instance 0x0 of device '0000:00:05.0/e1000'\n"
        + INVALID,
        ("0000:00:05.0/e1000", 0, "e1000", "0", "1"),
        "too old",
    ),
    "a field within a struct": (
        "qemu-system-x86_64: warning: nic e1000.0 has no peer\n"
        "qemu-system-x86_64: 2 != 3\n"
        "qemu-system-x86_64: Failed to load fdc:num_floppies\n"
        "qemu-system-x86_64: Failed to load fdc:state\n"
        "qemu-system-x86_64: error while loading state for instance 0x0 of device 'fdc'\n"
        + INVALID,
        ("fdc", 0, "state.num_floppies", "3", "2"),
        "3 (hex) in the guest and 2 there",
    ),
    "a damaged footer": (
        "qemu-system-x86_64: Mismatched section id in footer for 0000:00:05.0/e1000 - read 0x777 expected 0x27\n"
        + INVALID,
        ("0000:00:05.0/e1000", None, None, "0x777", "0x27"),
        "damaged",
    ),
    "a failure of its own": (
        (
            "qemu-system-x86_64: migration/vmstate.c:172: vmstate_load_state: Assertion"
            " `first_elem || !n_elems || !size' failed.\n"
        ),
        (None, None, None, None, None),
        "QEMU itself failed",
    ),
    "a destination without a way back": (
        (
            "qemu-system-x86_64: CMD_PING (0x1) received with no return path\n"
            "qemu-system-x86_64: load of migration failed: Operation not permitted\n"
        ),
        ("configuration", None, None, None, None),
        "cannot answer",
    ),
    "a place and no reason": (
        "qemu-system-x86_64: error while loading state for instance 0x3 of device 'apic'\n"
        + INVALID,
        ("apic", 3, None, None, None),
        "could not take it",
    ),
    "with the time in front": (
        (
            "2026-11-23T08:29:00.123456Z qemu-system-x86_64: Size mismatch: pc.ram: 0x1000000 != 0x2000000:"
            " Invalid argument\n"
        ),
        ("ram", 0, "pc.ram", "16 MiB", "32 MiB"),
        "16 MiB in the guest and 32 MiB there",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_words_that_were_seen(name: str) -> None:
    said, facts, what = SEEN[name]
    reason = words.explain(said)
    assert reason is not None
    assert (
        reason.section,
        reason.instance_id,
        reason.field,
        reason.guest,
        reason.there,
    ) == facts
    assert what in reason.what
    assert reason.hint


@pytest.mark.parametrize(
    "said",
    [
        "",
        INVALID,
        "qemu-system-x86_64: warning: nic e1000.0 has no peer\n",
        "qemu-system-x86_64: terminating on signal 15 from pid 1 (/sbin/init)\n",
        "qemu-system-x86_64: load of migration failed: No such file or directory\n",
    ],
)
def test_words_that_tell_nothing(said: str) -> None:
    assert words.explain(said) is None


def test_warnings_are_not_repeated_nor_is_there_an_end_of_lines() -> None:
    said = "qemu: warning: x\n\n" + "".join(f"line {n}\n" for n in range(100)) + "y" * 9999
    kept = words.lines(said)
    assert (len(kept), kept[0]) == (20, "line 81")
    assert kept[-1] == "y" * 500


@given(st.text(), st.sampled_from([s for s, _, _ in SEEN.values()]), st.integers(0, 200))
def test_no_words_break_it(noise: str, said: str, at: int) -> None:
    words.explain(said[:at] + noise + said[at:])
    words.lines(noise)


@pytest.mark.parametrize("line", ["a" * 70_000, "1" * 70_000 + " != ", "x: incoming " * 6000])
def test_long_words_take_no_time(line: str) -> None:
    """A log holds what it wants; looking through it must not take longer than its length."""
    words.explain(line)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("0000:00:05.0/e1000", "at PCI address 05.0 (e1000)"),
        ("0000:02:05.1/e1000.rom", "at PCI address 02:05.1 (e1000)"),
        ("0000:00:08.0/1/usb-ptr", "at PCI address 08.0, port 1 (usb-ptr)"),
        ("0000:00:09.0:00.0/e1000e", "at PCI address 09.0, behind that at 00.0 (e1000e)"),
        ("timer", None),
        ("/rom@etc/acpi/tables", None),
    ],
)
def test_places(name: str, where: str | None) -> None:
    assert advice.place(name) == where


@pytest.mark.parametrize(
    ("advised", "part"),
    [
        (advice.have("cpu", 3), "-smp 4"),
        (advice.have("serial", 1), "-serial"),
        (advice.have("something", 0), "devices and machine options"),
        (advice.have_block("m"), "memory backend 'm'"),
        (advice.have_block("pc.rom"), "machine type"),
        (advice.resize_block("ppc_spapr.ram", 256 << 20), "-m 256M"),
        (advice.resize_block("m", 4096), "4096 bytes"),
    ],
)
def test_advice(advised: str, part: str) -> None:
    assert part in advised


# ---- PCI


def config(*capabilities: tuple[int, int], msix_vectors: int = 1) -> bytes:
    """A configuration space with these (offset, number), the first one pointed at."""
    raw = bytearray(256)
    raw[0:4] = bytes.fromhex("86800e10")
    if capabilities:
        raw[0x06] = 0x10
        raw[0x34] = capabilities[0][0]
    for (at, number), following in zip(capabilities, [*capabilities[1:], (0, 0)], strict=True):
        raw[at : at + 4] = bytes((number, following[0], msix_vectors - 1, 0x80))
    return bytes(raw)


@pytest.mark.parametrize(
    ("offset", "name"),
    [
        (0x00, "vendor ID"),
        (0x03, "device ID"),
        (0x0A, "class"),
        (0x34, "pointer to the capabilities"),
        (0x40, "capability MSI-X"),
        (0x42, "number of MSI-X vectors"),
        (0x4C, "capability vendor-specific"),
        (0xFF, "capability vendor-specific"),
        (0x100, "PCI Express"),
    ],
)
def test_names_of_bytes(offset: int, name: str) -> None:
    assert pci.name_of(offset, config((0x40, 0x11), (0x4C, 0x09))) == name


def test_identity_is_what_tells_two_devices_apart() -> None:
    one = pci.identity(config((0x40, 0x11), (0x4C, 0x09), msix_vectors=3))
    assert [(i.name, i.value) for i in one] == [
        ("vendor ID", 0x8086),
        ("device ID", 0x100E),
        ("revision", 0),
        ("class", 0),
        ("header type", 0),
        ("capability MSI-X", 0x40),
        ("number of MSI-X vectors", 3),
        ("capability vendor-specific", 0x4C),
    ]


@given(st.binary(max_size=300))
def test_no_configuration_breaks_it(raw: bytes) -> None:
    pci.identity(raw)
    for capability in pci.capabilities(raw):
        assert 0x40 <= capability.offset < 0xFF
        pci.name_of(capability.offset, raw)


def test_capabilities_that_point_at_each_other_end() -> None:
    raw = bytearray(config((0x40, 0x01), (0x50, 0x05)))
    raw[0x51] = 0x40
    assert [c.offset for c in pci.capabilities(raw)] == [0x40, 0x50]
