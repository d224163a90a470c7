"""Each example does what its first lines say."""

import ast
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ABSTRACT = EXAMPLES / "whimbrel-abstract"


def code_lines(path):
    """Lines that are neither blank, nor comment, nor docstring."""
    tree = ast.parse(path.read_text())
    lines = path.read_text().splitlines()
    docstring = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
    return [s for line in lines[docstring:] if (s := line.strip()) and not s.startswith("#")]


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix:{tmp}/moving.sock"])
def test_moving(uri, tmp_path):
    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, EXAMPLES / "moving.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start("wait", uri.format(tmp=tmp_path)) as there:
        try:
            address = there.stdout.readline().removeprefix("waiting at ").strip()
            with start("go", address) as here:
                said, errors = here.communicate(timeout=60)
            assert here.returncode == 0, errors
            left = re.fullmatch(r"postmigrate with the counter at (\d+)\n", said)
            arrived = re.fullmatch(r"running with the counter at (\d+)\n", there.stdout.readline())
            assert int(arrived[1]) >= int(left[1]) > 0
        finally:
            there.kill()


def test_moving_has_under_30_lines_of_code():
    assert len(code_lines(EXAMPLES / "moving.py")) < 30


def migctl(address, *arguments):
    run = "from whimbrel_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", run, "-m", address, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def end(address):
    """As a person would with socat: both lines at once, and the answers until the end."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(60)
        monitor.connect(address.removeprefix("unix:"))
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n')
        assert b"SHUTDOWN" in b"".join(iter(lambda: monitor.recv(4096), b""))


def test_monitored(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(name, *arguments):
            app = stack.enter_context(
                subprocess.Popen(
                    [
                        sys.executable,
                        EXAMPLES / "monitored.py",
                        f"unix:{tmp_path}/{name}",
                        *arguments,
                    ],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(app.kill)
            return app, app.stdout.readline().removeprefix("monitor at ").strip()

        (here, a), (there, b) = start("a.qmp"), start("b.qmp", "wait")
        uri = migctl(b, "incoming", "tcp:127.0.0.1:0").removeprefix("listening at ").strip()
        assert "the destination has taken over" in migctl(a, "migrate", uri)
        for app, address in ((here, a), (there, b)):
            end(address)
            said, errors = app.communicate(timeout=60)
            assert app.returncode == 0, errors
            state, counter = re.fullmatch(r"(\w+) with the counter at (\d+)\n", said).groups()
            assert state == ("postmigrate" if app is here else "running")
            assert int(counter) > 0


def test_monitored_has_under_40_lines_of_code():
    assert len(code_lines(EXAMPLES / "monitored.py")) < 40


def test_the_third_party_transport_complies():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ABSTRACT / "tests"],
        env={**os.environ, "PYTHONPATH": str(ABSTRACT / "src")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\b[2-9]\d passed", done.stdout), done.stdout[-300:]


@pytest.fixture
def installed(tmp_path):
    """An environment in which the third-party transport is installed, from its folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", tmp_path, ABSTRACT]
    subprocess.run(command, check=True, timeout=100, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_once_installed_its_scheme_works_in_every_program(installed):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "whimbrel_testing.demo", "--json", "--ram", "16M"),
            *("--uri", f"abstract:whimbrel-{os.getpid()}"),
        ],
        env=installed,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
