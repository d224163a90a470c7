"""Which form of the stream belongs to which machine type."""

import itertools

import attrs
import pytest

from whimbrel import Kernel, Machine
from whimbrel.wire import dialects
from whimbrel.wire.format import Dialect, GlobalStateForm


def test_newer_machine_types_only_add():
    """What one version sends, the next ones send as well; globalstate takes other forms."""
    names = ("configuration", "footers", "vmdescription", "described_configuration")
    names += ("switchover_start", "multifd_flush")
    versions = [dialects.by_name(name) for name in dialects.NAMES]
    for older, newer in itertools.pairwise(versions):
        assert older != newer
        assert all(getattr(newer, n) >= getattr(older, n) for n in names)


@pytest.mark.parametrize(
    ("machine", "version"),
    [
        ("pc-i440fx-1.7", (1, 7)),
        ("pc-i440fx-2.12", (2, 12)),
        ("pc-q35-4.0.1", (4, 0)),
        ("pc-1.3", (1, 3)),
        ("virt-10.0", (10, 0)),
        ("pseries-7.2", (7, 2)),
    ],
)
def test_machine_types_of_qemu_carry_their_version(machine, version):
    assert dialects.for_machine(machine) == dialects.for_version(*version)


@pytest.mark.parametrize("machine", ["isapc", "microvm", "none", "game-1.0", "whimbrel-2.0", ""])
def test_others_speak_what_every_qemu_since_2_4_takes(machine):
    assert dialects.for_machine(machine) == Dialect() == dialects.for_version(2, 4)


def test_a_version_between_two_is_the_older():
    assert dialects.for_version(2, 12) == dialects.by_name("2.4") == dialects.by_name("8.0")
    assert dialects.for_version(99, 0) == dialects.by_name("10.0")
    assert dialects.by_name("2013") == dialects.for_version(1, 4)
    assert dialects.by_name("pc-q35-9.0").globalstate is GlobalStateForm.SPLIT


@pytest.mark.parametrize("name", ["", "2", "new", "isapc", "2.3.1", "v2.3"])
def test_a_name_that_says_nothing_is_refused_with_those_that_do(name):
    with pytest.raises(ValueError, match=r"2013, 2\.0, 2\.3, 2\.4"):
        dialects.by_name(name)


def test_a_kernel_speaks_the_dialect_of_its_machine_unless_told_otherwise():
    assert Kernel(Machine("pc-i440fx-2.3")).dialect == dialects.by_name("2.3")
    mine = attrs.evolve(Dialect(), footers=False)
    assert Kernel(Machine("pc-i440fx-2.3"), dialect=mine).dialect == mine


def test_described_for_people_and_json():
    assert dialects.described(Dialect())["globalstate"] == "always"


@pytest.mark.parametrize(
    ("machine", "bits"), [("virt-2.7", 10), ("virt-2.8", 12), ("pc", 12), (None, 12)]
)
def test_pages_of_a_stream_that_does_not_say(machine, bits):
    assert dialects.unsaid_page_bits(machine) == bits
