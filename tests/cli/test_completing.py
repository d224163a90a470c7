"""Completion in the shell, and what a command line that only asks for help may cost."""

import subprocess
import sys

import pytest

from whimbrel_cli.completing import join_colons


@pytest.fixture
def complete(site):
    """What bash is offered for the last of these words, which it has taken apart at colons."""

    def run(*words, **changes):
        done = site.migctl(
            _MIGCTL_COMPLETE="bash_complete",
            COMP_WORDS=" ".join(["migctl", *words]),
            COMP_CWORD=str(len(words)),
            **changes,
        )
        assert done.stderr == ""
        return [line.partition(",")[2] for line in done.stdout.splitlines() if line]

    return run


@pytest.mark.parametrize(
    ("words", "current", "joined", "at"),
    [
        (
            ["migctl", "-m", "unix", ":", "/run/a", "se"],
            5,
            ["migctl", "-m", "unix:/run/a", "se"],
            3,
        ),
        (["migctl", "-m", "host", ":", "44", "st"], 5, ["migctl", "-m", "host:44", "st"], 3),
        (["migctl", "-m", "unix", ":", "/ru"], 4, ["migctl", "-m", "unix:/ru"], 2),
        (["migctl", "migrate", "tcp", "::", "44"], 4, ["migctl", "migrate", "tcp::44"], 2),
        (["migctl", "st"], 1, ["migctl", "st"], 1),
        ([], 0, [], 0),
    ],
)
def test_what_bash_took_apart_is_put_together(words, current, joined, at):
    assert join_colons(words, current) == (joined, at)


def test_commands_of_all_kinds_are_completed(complete):
    assert complete("wa") == ["watch"]
    assert "receive" in complete("re")


@pytest.mark.interop
def test_names_come_from_the_machine(complete, qemu, tmp_path):
    qemu("-M", "none", "-qmp", f"unix:{tmp_path}/vm.qmp,server=on,wait=off", version="10.0")
    machine = ("-m", "unix", ":", f"{tmp_path}/vm.qmp")
    assert complete(*machine, "set", "bandw") == ["bandwidth"]
    assert complete(*machine, "set", "max-b") == ["max-bandwidth"]
    assert complete(*machine, "set", "bandwidth", "u") == ["unlimited"]
    assert complete(*machine, "set", "cpu-throttle-tailslow", "o") == ["off", "on"]
    assert complete(*machine, "caps", "xb") == ["xbzrle=on"]
    assert complete("caps", "xb", MIGCTL_MONITOR=f"unix:{tmp_path}/vm.qmp") == ["xbzrle=on"]


def test_without_the_machine_there_is_what_is_always_there(complete, tmp_path):
    assert complete("-m", f"{tmp_path}/none", "set", "b") == ["bandwidth"]
    assert complete("-m", f"{tmp_path}/none", "caps", "x") == []
    assert complete("set", "d") == ["downtime"]


@pytest.mark.parametrize("arguments", [["--help"], ["watch", "--help"], ["status", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys\nfrom whimbrel_cli.main import run\n"
        f"run({arguments})\n"
        "heavy = ('asyncio', 'email.mime', 'numpy', 'qemu', 'rich', 'ssl')\n"
        "print(sorted(m for m in heavy if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Usage: migctl" in done.stdout
    assert done.stderr == "[]\n"
