"""`migctl send` as it looks: the table of a comparison, a refusal in both words, and all of it for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel_cli.main import run
from whimbrel_testing.peers import QemuFactory

pytestmark = pytest.mark.interop

MACHINE = ("-machine", "pc-i440fx-7.2", "-m", "16M", "-S")
RNG = ("-device", "virtio-rng-pci,addr=6")
E1000 = ("-device", "e1000,addr=5,rombar=0")
Keep = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
WORST = ("refused", "silent")


def migctl(capsys: Capture, *args: object, status: int = 0) -> tuple[str, str]:
    """What it prints: standard output, standard error."""
    capsys.readouterr()
    assert run([str(a) for a in args]) == status
    return capsys.readouterr()


def events(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_dry_run_shows_what_differs_and_what_to_do(
    keep: Keep, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file, other = keep("7.2", (*MACHINE, *E1000)), keep("10.0", (*MACHINE, *RNG))
    out, _ = migctl(capsys, "send", file, "--against", other, "--dry-run", status=1)
    refused, silent = (next(x for x in out.splitlines() if x.startswith(w)) for w in WORST)
    assert refused.split() == ["refused", "0000:00:05.0/e1000", "-", "only", "in", "the", "guest"]
    assert "0000:00:06.0/virtio-rng" in silent
    assert "- Give the destination the device that the guest has at PCI address 05.0" in out
    assert "the destination would refuse it: 1 reason" in out.splitlines()[-1]


def test_dry_run_for_programs(keep: Keep, capsys: Capture) -> None:
    file, other = keep("7.2", (*MACHINE, *E1000)), keep("10.0", (*MACHINE, *RNG))
    out, _ = migctl(capsys, "send", file, "--against", other, "--dry-run", "--json", status=1)
    (event,) = events(out)
    assert (event["event"], event["refused"]) == ("compared", 1)
    assert [(d["verdict"], d["section"], d["field"]) for d in event["differences"]] == [
        ("refused", "0000:00:05.0/e1000", None),
        ("silent", "0000:00:06.0/virtio-rng", None),
    ]


def test_dry_run_of_what_fits(keep: Keep, capsys: Capture) -> None:
    file, other = keep("7.2", MACHINE), keep("10.0", MACHINE)
    out, _ = migctl(capsys, "send", file, "--against", f"exec:cat {other}", "--dry-run")
    assert out.startswith(f"{file}: pc-i440fx-7.2, prelaunch, 16")
    out, _ = migctl(capsys, "send", file, "--dry-run")
    assert out.endswith("device sections; it can be sent\n")


def test_what_would_be_refused_is_not_sent(keep: Keep, capsys: Capture, tmp_path: Path) -> None:
    file, other = keep("7.2", (*MACHINE, *E1000)), keep("10.0", MACHINE)
    uri = f"unix:{tmp_path}/nobody"
    out, errors = migctl(capsys, "send", file, uri, "--against", other, status=1)
    assert out == ""
    assert "the destination would refuse the guest: only in the guest" in errors
    assert "Nothing was sent" in errors
    out, _ = migctl(capsys, "send", file, uri, "--against", other, "--json", status=1)
    assert [e["event"] for e in events(out)] == ["compared", "error"]


def test_refusal_is_told_in_both_words(
    qemu: QemuFactory, keep: Keep, capsys: Capture, tmp_path: Path
) -> None:
    file = keep("7.2", (*MACHINE, *E1000))
    other_model = (*MACHINE, "-device", "e1000-82544gc,addr=5,rombar=0")
    shown: list[str] = []
    for n, more in enumerate(((), ("--json",))):
        target = qemu(*other_model, version="10.0", incoming=f"unix:{tmp_path}/{n}")
        log = f"/proc/{target.process.pid}/fd/2"
        shown += migctl(capsys, "send", file, f"unix:{tmp_path}/{n}", "--log", log, *more, status=1)
    out, errors, json_out, json_errors = shown
    assert out == ""
    words, error = errors.splitlines()[:-1], errors.splitlines()[-1]
    assert words[0] == "the destination's own words:"
    assert "  qemu-system-x86_64: Failed to load e1000:parent_obj" in words
    for part in ("device ID", "is 0e in the guest and 0c there", "field parent_obj.config"):
        assert part in error
    assert "section '0000:00:05.0/e1000', byte offset" in error
    event, last = events(json_out)
    assert last["event"] == "error"
    assert last["error"] in error
    assert json_errors.splitlines() == [error]
    assert (event["event"], event["section"], event["instance"], event["field"]) == (
        "refused",
        "0000:00:05.0/e1000",
        0,
        "parent_obj.config",
    )
    assert f"byte offset {event['offset']}" in error
    assert event["words"][0].startswith("qemu-system-x86_64: get_pci_config_device: Bad config")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{file}"], 2, "where the destination listens"),
        (["{file}", "unix:/x", "--dialect", "7"], 2, "no version of a machine type"),
        (["{file}", "unix:/x", "--log", "{file}.no"], 1, "standard error output"),
        (["{file}", "unix:/x", "--against", "{file}.no"], 1, "No such file"),
        (["{file}", "--dry-run", "--against", "nonsense:x"], 1, "nonsense"),
        (["{file}", "--dry-run", "--dialect", "2.3"], 1, "byte offset 8"),
    ],
)
def test_what_cannot_be_done_is_explained(
    keep: Keep, capsys: Capture, arguments: list[str], status: int, message: str
) -> None:
    file = keep("7.2", MACHINE)
    _, errors = migctl(capsys, "send", *(a.format(file=file) for a in arguments), status=status)
    assert message in errors


def test_stream_of_another_form_than_was_said_is_refused(
    keep: Keep, capsys: Capture, tmp_path: Path
) -> None:
    source = f"exec:cat {keep('7.2', MACHINE)}"
    _, errors = migctl(capsys, "receive", source, tmp_path / "f", "--dialect", "2013", status=1)
    assert "byte offset 8" in errors
    assert not (tmp_path / "f").exists()
    migctl(capsys, "receive", source, tmp_path / "f", "--dialect", "pc-i440fx-7.2")
    migctl(capsys, "send", tmp_path / "f", "--dry-run", "--dialect", "7.2")
