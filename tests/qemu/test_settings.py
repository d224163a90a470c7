"""--set: the same form for receive, send and relay, and what there is to set is said."""

import json
from pathlib import Path

import pytest

from whimbrel import Kernel, SettingError
from whimbrel_cli.main import run
from whimbrel_qemu import options
from whimbrel_qemu.receiving import receive
from whimbrel_qemu.relaying import relay
from whimbrel_qemu.sending import send

WAYS = {"ssh-config", "ssh-host-key", "zstd-level"}
COMMANDS = {
    "receive": ["unix:{0}/in", "{0}/guest.mig"],
    "relay": ["unix:{0}/in", "unix:{0}/nobody"],
    "send": ["{0}/guest.mig", "unix:{0}/nobody"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--set NAME=VALUE" in text
    assert " --set " in text.partition("Example")[2]


@pytest.mark.parametrize("command", ["receive", "relay"])
@pytest.mark.parametrize("text", ["ssh-config", "=x", "="])
def test_another_form_is_a_wrong_command_line(
    command: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [a.format(tmp_path) for a in COMMANDS[command]]
    assert run([command, *arguments, "--set", text]) == 2
    assert f"'{text}' is not of the form NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("receive", "ssh-confg=x", "Did you mean 'ssh-config'? There are:"),
        ("receive", "auto-converge=on", "'auto-converge' cannot be set here"),
        ("receive", "max-bandwidth=1", "multifd, multifd-channels, multifd-compression"),
        ("receive", "multifd-channels=0", "expects a value between 1 and 255"),
        ("receive", "multifd=perhaps", "expects on or off"),
        ("relay", "multifd=on", "'multifd' cannot be set here"),
        ("relay", "ssh-host-key=any", "does not accept value 'any'"),
    ],
)
def test_what_cannot_be_set_is_said_before_anything_is_done(
    command: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [a.format(tmp_path) for a in COMMANDS[command]]
    assert run([command, *arguments, "--json", "--set", text]) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert json.loads(told.out)["event"] == "error"
    assert not list(tmp_path.iterdir())


def test_what_there_is() -> None:
    kernel = Kernel()
    everywhere = set(options.settable(kernel, options.RELAYING))
    assert everywhere >= WAYS
    assert everywhere.isdisjoint({"events", "dirty-tracker", "return-path", "block"})
    receiving = set(options.settable(kernel, options.RECEIVING))
    assert receiving - everywhere == set(options.RECEIVING)
    assert set(options.settable(kernel, options.SENDING)) - receiving == {
        "multifd-zlib-level",
        "multifd-zstd-level",
        "zero-page-detection",
        "commit-timeout",
    }


def test_all_or_nothing_and_aliases() -> None:
    kernel = Kernel()
    with pytest.raises(SettingError, match="'nothing' cannot be set here"):
        options.set_those(kernel, {"zstd-level": "3", "nothing": "1"}, ())
    before = kernel.settings["zstd-level"]
    options.set_those(kernel, None, ())
    assert kernel.settings["zstd-level"] == before
    options.set_those(kernel, {"zstd-level": "3", "x-rdma-pin-all": "on"}, ())
    assert kernel.settings["rdma-pin-all"] is True
    assert kernel.settings["zstd-level"] != before


@pytest.mark.parametrize("kind", ["receive", "send", "relay"])
def test_a_setting_reaches_the_transport(
    kind: str, tmp_path: Path, keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that the ssh transport is told to read, which is not there."""
    file = tmp_path / "none.conf"
    uri, settings = "ssh://host.invalid/tcp:localhost:1", {"ssh-config": str(file)}
    run_it = {
        "receive": lambda: receive(uri, tmp_path / "x.mig", settings=settings),
        "relay": lambda: relay(uri, "tcp:127.0.0.1:1", settings=settings),
        "send": lambda: send(
            keep("7.2", ("-M", "none", "-nodefaults", "-display", "none", "-S")),
            uri,
            settings=settings,
        ),
    }[kind]
    pytest.importorskip("paramiko")
    with pytest.raises(Exception, match=f"there is no {file}"):
        run_it()
