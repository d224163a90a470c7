"""The network itself goes down behind the point of no return, in a network namespace of the test's own.

What the system then says of the connection (`connection timed out`, and after that the end of it) looks like an end, but
proves nothing about the process at the other end.
"""

import shutil
import subprocess
import sys

import pytest

SCRIPT = '''
import struct
import subprocess
import threading

import whimbrel.outgoing
from whimbrel import Kernel, Machine, MigrationError, SaveVMHandler
from whimbrel.wire.return_path import encode_pong

import socket

def run(command):
    subprocess.run(command, shell=True, check=True, capture_output=True)

run("ip link set lo up")
open("/proc/sys/net/ipv4/tcp_retries2", "w").write("2")  # the system gives up after about a second, not 15 minutes
server = socket.create_server(("127.0.0.1", 0))
seen = bytearray()

def destination():
    sock, _ = server.accept()
    answered = 0
    while data := sock.recv(65536):
        seen.extend(data)
        for value in (1, 0x80000001):
            ping = b"\\x08\\x00\\x02\\x00\\x04" + struct.pack(">I", value)
            if answered != value and value > answered and ping in seen:
                sock.sendall(encode_pong(value))
                answered = value

threading.Thread(target=destination, daemon=True).start()

class LastWord(SaveVMHandler):
    """Written as the last device; asked for the vmdescription after the PONG and before EOF."""

    idstr = "last"

    def save(self, out):
        out.u64(1)

    def load(self, inp, header):
        inp.u64()

    @property
    def vmdescription(self):
        run("ip link set lo down")
        return None

calls = []
machine = Machine("m", stop=lambda: calls.append("stop"), start=lambda: calls.append("start"))
machine.register(LastWord())
kernel = Kernel(machine)
kernel.settings["commit-timeout"] = 60_000
m = kernel.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
try:
    m.wait(60)
except MigrationError as error:
    print(type(error).__name__, m.result.outcome, *calls)
    print(error)
'''


def test_a_connection_that_timed_out_proves_nothing(tmp_path):
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare (util-linux) and ip (iproute2)")
    enter = ["unshare", "--map-root-user", "--net"]
    if subprocess.run(
        [*enter, "ip", "link", "set", "lo", "up"], capture_output=True, check=False
    ).returncode:
        pytest.skip("no network namespace can be made here")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [*enter, sys.executable, script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "OutcomeUnknown unknown stop", done.stdout
    assert "timed out" in done.stdout
