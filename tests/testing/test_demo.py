"""`make demo` on every way that it offers, its plain output, and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--ram", "16M", "--dirty-rate", "4M", "--bandwidth", "0"]


def demo(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "whimbrel_testing.demo", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        **options,
    )


def left_behind(pids, temporary):
    """Processes and files that should be gone: those processes, and whatever was told of the directory."""
    commands = [p for p in Path("/proc").glob("[0-9]*/cmdline") if told_of(p, temporary)]
    return [p for p in pids if Path(f"/proc/{p}").exists()] + commands + list(temporary.iterdir())


def told_of(command_line, temporary):
    try:
        return os.fsencode(temporary) in command_line.read_bytes()
    except OSError:  # it has just ended
        return False


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:", "fd:", "exec:"])
def test_every_way_moves_the_machine_and_proves_it(uri, tmp_path):
    done = demo("--uri", uri, "--json", *SMALL, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["ok"]
    assert result["proof_holds"]
    assert result["running"] == ["destination"]
    assert result["violations"] == []
    assert result["acknowledged"] is (uri != "exec:")
    assert result["transferred"] > (16 + 32) << 20
    assert result["disk_writes"] > 0
    assert 0 < result["felt_downtime"] < result["total_time"] + 1
    assert list(tmp_path.iterdir()) == []


def test_the_output_without_a_terminal_is_plain(tmp_path):
    done = demo(*SMALL)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    text = " ".join(done.stdout.split())
    assert re.search(
        r"downtime [\d,]+ ms as the engine measured it, [\d,]+ ms as the guest felt it", text
    )
    assert re.search(r"nothing lost 4,352 pages hold exactly their last of [\d,]+ writes", text)
    assert re.search(r"the disk holds its [\d,]+, the hash chain", text)
    assert "never twice the lease was held by one process at a time" in text


def test_own_commands_on_both_sides(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    done = demo(
        "--uri",
        f"exec:gzip -1c > {fifo}",
        "--incoming",
        f"exec:gzip -dc < {fifo}",
        "--json",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]


@pytest.mark.parametrize(
    ("signum", "uri"), [(signal.SIGINT, "tcp:127.0.0.1:0"), (signal.SIGTERM, "exec:")]
)
def test_an_interrupt_leaves_the_machine_at_the_source_and_nothing_behind(signum, uri, tmp_path):
    with subprocess.Popen(
        [
            *(sys.executable, "-u", "-m", "whimbrel_testing.demo"),
            *("--uri", uri, "--ram", "64M", "--bandwidth", "8M"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        pids = []
        for line in process.stdout:
            pids += re.findall(r"process (\d+),", line)
            if "active: pass" in line:
                break
        process.send_signal(signum)
        rest = process.stdout.read()
        assert process.wait(30) == 130, rest
    assert "The migration was interrupted: cancelled." in rest
    assert re.search(r"The machine ran on at the source: 16,640 pages hold exactly", rest)
    assert len(pids) == 2
    assert left_behind(pids, tmp_path) == []


@pytest.mark.parametrize(
    ("send", "receive", "outcome", "running"),
    [
        ("exec:head -c 100000 > /dev/null", "exec:true", "failed", ["source"]),
        ("exec:cat > /dev/null; exit 3", "exec:true", "unknown", []),
        ("exec:cat > /dev/null", "exec:true", "completed", []),  # as far as the source can know
    ],
)
def test_a_migration_that_does_not_arrive_is_told_and_proved_harmless(
    send, receive, outcome, running
):
    done = demo("--uri", send, "--incoming", receive, "--json", *SMALL)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert not result["ok"]
    assert (result["outcome"], result["running"]) == (outcome, running)
    assert result["proof_holds"]
    assert result["violations"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--uri", "nonsense:x"], "nonsense"),
        (["--uri", "exec:cat > /dev/null"], "say with --incoming"),
        (["--ram", "lots"], "is not a size"),
        (["--downtime", "soon"], "is not a time"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments, told):
    done = demo(*arguments)
    assert done.returncode not in (0, 130)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_has_examples():
    text = demo("--help").stdout
    assert 'make demo ARGS="--uri unix: --ram 1G' in text
    for option in (
        "--uri",
        "--incoming",
        "--ram",
        "--dirty-rate",
        "--downtime",
        "--bandwidth",
        "--json",
    ):
        assert option in text
