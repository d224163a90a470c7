"""migctl watch, against real QEMUs: what it shows, who gets at the monitor meanwhile, and the terminal afterwards."""

import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time

import pytest

from whimbrel_testing.peers import PATIENCE, wait_until

interop = pytest.mark.interop
ALTERNATE, BACK, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


@pytest.fixture
def vm(qemu, tmp_path):
    """A machine with a monitor for migctl at .address; nothing runs in it."""

    def start(name, **kwargs):
        peer = qemu(
            *("-M", "pc-i440fx-7.2", "-m", "16", "-S"),
            *("-qmp", f"unix:{tmp_path}/{name}.qmp,server=on,wait=off"),
            version="7.2",
            **kwargs,
        )
        peer.address = f"unix:{tmp_path}/{name}.qmp"
        return peer

    return start


class Watching:
    """A migctl watch that runs, with its end of a terminal or of a pipe."""

    def __init__(self, site, *args, columns=None, **changes):
        self.ours, theirs = pty.openpty() if columns else os.pipe()
        self.columns = columns
        ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        if columns is None:
            ends |= {"stdin": subprocess.DEVNULL}
        else:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            self.before = termios.tcgetattr(theirs)
        environment = site.environment(**changes)
        del environment["COLUMNS"]
        self.child = subprocess.Popen(
            site.command(*args), env=environment, start_new_session=True, **ends
        )
        self.theirs = theirs
        self.text = ""

    def wait_for(self, *texts):
        """All of them, in what came since the last call. Returns that."""
        deadline = time.monotonic() + PATIENCE
        while not all(text in self.text for text in texts):
            assert time.monotonic() < deadline, (texts, self.text)
            if select.select([self.ours], [], [], 0.1)[0]:
                self.text += os.read(self.ours, 65536).decode("utf-8", "replace")
        text, self.text = self.text, ""
        return text

    def type(self, text):
        os.write(self.ours, text.encode())

    def end(self):
        """Its exit status, and what it wrote at last."""
        status = self.child.wait(PATIENCE)
        while select.select([self.ours], [], [], 0)[0]:
            self.text += os.read(self.ours, 65536).decode("utf-8", "replace")
        return status, self.text

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def watch(site):
    running = []

    def start(*addresses, args=(), **kwargs):
        monitors = [word for address in addresses for word in ("-m", address)]
        running.append(Watching(site, *monitors, "watch", "--interval", "0.1s", *args, **kwargs))
        return running[-1]

    yield start
    for watching in running:
        watching.close()


def rows(screen):
    """The words of screens, without colours and movements."""
    screen = screen.replace("\x1b[H", "\r\n")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)


@interop
@pytest.mark.parametrize("columns", [80, 200])
def test_a_migration_is_seen_from_both_sides(vm, watch, tmp_path, columns):
    source, destination = vm("src"), vm("dst", incoming=f"unix:{tmp_path}/m.sock")
    watching = watch(source.address, destination.address, columns=columns)
    watching.wait_for(ALTERNATE, "2 machines", "no migration", "inmigrate")
    source.migrate(f"unix:{tmp_path}/m.sock", max_bandwidth=10_000)
    seen = rows(watching.wait_for("2 machines, 2 migrating", "prelaunch, active, pass 1", "/s"))
    for heading in ("done", "left", "sent at", "dirty at", "downtime", "to go"):
        assert heading in seen
    assert re.search(r"\d+ % +\d+\.\d MiB", seen)
    assert max(map(len, seen.split("\r\n"))) <= columns + 1
    source.qmp("migrate-set-parameters", max_bandwidth=0)
    watching.wait_for("postmigrate, completed", "prelaunch, completed", "100 %")
    watching.type("q")
    assert watching.end()[0] == 0


@pytest.mark.parametrize("leave", ["q", "\x03", signal.SIGTERM])
def test_the_terminal_is_left_as_it_was(watch, tmp_path, leave):
    watching = watch(f"unix:{tmp_path}/none", columns=80)
    watching.wait_for(ALTERNATE, "no answer", "No such file")
    if isinstance(leave, str):
        if leave == "\x03":  # it is no session leader's terminal here: the signal is sent by hand
            watching.child.send_signal(signal.SIGINT)
        else:
            watching.type(leave)
    else:
        watching.child.send_signal(leave)
    status, text = watching.end()
    assert status == 0
    assert text.rfind(BACK) > text.rfind(ALTERNATE)
    assert CURSOR in text
    assert termios.tcgetattr(watching.theirs) == watching.before


@pytest.mark.parametrize(("changes", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_left_out_on_request(watch, tmp_path, changes, coloured):
    watching = watch(f"unix:{tmp_path}/none", columns=80, **changes)
    text = watching.wait_for("No such file")
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", text)) == coloured


def test_more_machines_than_lines_are_on_several_pages(watch, tmp_path):
    watching = watch(*(f"unix:{tmp_path}/vm-{n:02}" for n in range(30)), columns=80)
    first = rows(watching.wait_for("30 machines, 30 without an answer", "(1 of 3)"))
    assert "vm-00" in first
    assert "vm-29" not in first
    watching.type("  ")
    watching.wait_for("(3 of 3)", "vm-29")
    watching.type(" ")
    watching.wait_for("(1 of 3)", "vm-00")


@interop
def test_a_machine_that_goes_away_comes_back(vm, watch, tmp_path):
    machine = vm("src")
    watching = watch(machine.address, columns=80)
    watching.wait_for("prelaunch, no migration")
    machine.kill()
    watching.wait_for("no answer", "1 without an answer")
    os.unlink(tmp_path / "src.qmp")
    vm("src")
    watching.wait_for("prelaunch, no migration")


@interop
def test_a_monitor_that_serves_another_program_is_told_and_the_rest_goes_on(vm, watch, tmp_path):
    taken, free = vm("taken"), vm("free")
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "taken.qmp"))
        assert other.recv(4096)  # the greeting: it is served
        watching = watch(taken.address, free.address, columns=80)
        watching.wait_for("it serves another program", "prelaunch, no migration")
    while "without an answer" in watching.wait_for("machines", "q: leave"):
        pass  # until the other is gone


@interop
def test_others_get_at_a_monitor_that_is_watched(vm, watch, site):
    machine = vm("src")
    watching = watch(machine.address)
    watching.wait_for("no migration")
    for _ in range(5):
        done = site.migctl("-m", machine.address, "status", "--json")
        assert done.returncode == 0, done.stderr
    assert watching.child.poll() is None


@interop
def test_the_reason_of_a_failure_is_shown(vm, watch, tmp_path):
    source = vm("src")
    source.migrate(f"unix:{tmp_path}/nobody.sock")
    source.wait_migration("failed")
    watch(source.address, columns=80).wait_for("prelaunch, failed", "No such file or directory")
    watch(source.address).wait_for("prelaunch, failed, ", "No such file or directory\n")


def test_one_that_answers_nonsense_does_not_hide_the_others(watch, tmp_path):
    """No QEMU does that."""
    greeting = {"QMP": {"version": {"qemu": {"major": 1}}, "capabilities": []}}
    replies = [greeting, {"return": {}}, {"return": ["\x1b[2J"], "id": "__qmp#00000"}]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "odd.qmp"))
        listener.listen()
        watching = watch(f"unix:{tmp_path}/odd.qmp", f"unix:{tmp_path}/none", columns=80)
        peer, _ = listener.accept()
        with peer:
            for reply in replies:
                peer.sendall(json.dumps(reply).encode() + b"\r\n")
                peer.recv(4096)
            text = watching.wait_for("odd answer: TypeError", "2 without an answer")
    assert "\x1b[2J" not in text.replace(ALTERNATE + "\x1b[2J", "")


@interop
def test_without_a_terminal_a_change_is_a_line(vm, watch, tmp_path):
    source, _ = vm("src"), vm("dst", incoming=f"unix:{tmp_path}/m.sock")
    watching = watch(source.address, f"unix:{tmp_path}/none")
    text = watching.wait_for("src.qmp: prelaunch, no migration\n", "No such file or directory\n")
    source.migrate(f"unix:{tmp_path}/m.sock")
    text += watching.wait_for("src.qmp: postmigrate, completed, pass 2, 100 % done, 0 B left\n")
    lines = text.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d unix:", line) for line in lines)
    said = [line.split(" ", 1)[1] for line in lines]
    assert all(a != b for a, b in itertools.pairwise(said))  # and the one that does not answer once
    assert len([line for line in said if "No such file" in line]) == 1
    watching.child.send_signal(signal.SIGINT)
    assert watching.end()[0] == 0


@interop
def test_json_lines_tell_each_look_at_one_that_migrates(vm, watch, tmp_path):
    source, _ = vm("src"), vm("dst", incoming=f"unix:{tmp_path}/m.sock")
    watching = watch(source.address, args=["--json"])
    text = watching.wait_for("\n")
    source.migrate(f"unix:{tmp_path}/m.sock", max_bandwidth=10_000)
    wait_until(lambda: (source.migration().get("ram") or {}).get("normal"), "pages")
    text += watching.wait_for('"status": "active"', "\n")
    text += watching.wait_for('"status": "active"', "\n")
    source.qmp("migrate-set-parameters", max_bandwidth=0)
    text += watching.wait_for('"status": "completed"', "\n")
    looks = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    assert looks[0] == {
        "machine": source.address,
        "run-state": "prelaunch",
        "trouble": None,
        "reason": None,
        "migration": None,
    }
    fractions = [look["migration"]["fraction"] for look in looks[1:]]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_an_address_that_names_no_monitor_is_an_error_at_once(site):
    done = site.migctl("-m", "localhost:99999", "-m", "unix:/a", "watch")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no port 99999" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["watch"], "migctl -m unix:/run/vm.qmp watch"),
        (["-m", "unix:/a", "watch", "--interval", "0"], "at least 100 ms"),
        (["-m", "unix:/a", "watch", "--interval", "often"], "is not a time"),
    ],
)
def test_a_wrong_command_line_is_2(site, args, said):
    done = site.migctl(*args)
    assert done.returncode == 2
    assert said in done.stderr
