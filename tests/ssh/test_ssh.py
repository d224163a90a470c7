"""What is particular to ssh: getting to the host, trusting it, being let in, and errors that tell these apart."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time

import paramiko
import pytest

from whimbrel import Cancelled, ChannelError, DeadlineExceeded, LocalError, Role, UriError
from whimbrel_ssh.address import parse
from whimbrel_ssh.config import Config
from whimbrel_ssh.errors import AuthRefused, FarEndRefused, HostKeyRefused, LinkLost, Unreachable
from whimbrel_ssh.transport import SshTransport
from whimbrel_testing.peers import wait_until
from whimbrel_testing.sshd import make_key
from whimbrel_testing.transport_suite import (
    Task,
    full_backlog,
    nothing_left_behind,
    pattern,
    read_exactly,
)

from .conftest import context

PATIENCE = 15.0
ECHO = "exec:exec cat"


@pytest.fixture(autouse=True)
def _clean(host):
    with nothing_left_behind():
        yield


def soon():
    return time.monotonic() + PATIENCE


def say_hello(channel):
    with channel:
        channel.send([b"hello"])
        assert read_exactly(channel, 5) == b"hello"


def refused(kind, call, *words):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text
    assert caught.value.hint
    return text


# ---- reaching


def test_nobody_listens(connect):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    refused(Unreachable, lambda: connect(ECHO, name=f"127.0.0.1:{port}"), "Connection refused")


def test_no_such_name(connect):
    refused(Unreachable, lambda: connect(ECHO, name="no-such-host.invalid"), "cannot reach")


def test_no_ssh_server_there(connect):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def other_protocol():
            with contextlib.suppress(OSError):
                client, _ = server.accept()
                with client:
                    client.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n" * 200)

        thread = threading.Thread(target=other_protocol)
        thread.start()
        name = f"127.0.0.1:{server.getsockname()[1]}"
        refused(Unreachable, lambda: connect(ECHO, name=name), "no agreement with an SSH server")
        thread.join()


def test_connect_timeout_of_the_configuration(connect, host, tmp_path):
    with full_backlog() as (address, port):
        server = with_config(host, tmp_path, f"Host *\n ConnectTimeout 1\n Port {port}\n")
        refused(Unreachable, lambda: connect(ECHO, server, name=address), "no answer within 1 s")


def with_config(host, tmp_path, text):
    """The same server, seen by a configuration that begins with this text."""
    folder = tmp_path / "seen"
    folder.mkdir()
    path = folder / "config"
    path.write_text(text + host.config.read_text())

    class Seen:
        name = host.name
        config = path
        known_hosts = host.known_hosts

    return Seen


# ---- trusting


def test_unknown_host_is_refused_with_its_fingerprint(connect, sshd):
    server = sshd()
    server.known_hosts.write_text("")
    key = subprocess.run(
        ["ssh-keygen", "-lf", server.folder / "host_key.pub"],
        capture_output=True,
        text=True,
        check=True,
    )
    fingerprint = key.stdout.split()[1]
    words = (server.name, fingerprint, "accept-new", "is unknown")
    refused(HostKeyRefused, lambda: connect(ECHO, server), *words)
    assert server.known_hosts.read_text() == ""


def test_accept_new_notes_the_key_and_never_takes_another(connect, sshd, caplog):
    server = sshd()
    server.known_hosts.write_text("other ssh-ed25519 AAAA")  # without an end of the line
    say_hello(connect(ECHO, server, policy="accept-new"))
    assert "is new" in caplog.text
    say_hello(connect(ECHO, server))
    server.kill()
    make_key(server.folder / "host_key")
    server.start()
    for policy in ("strict", "accept-new"):
        text = refused(HostKeyRefused, lambda p=policy: connect(ECHO, server, policy=p))
        assert "has changed its key" in text
        assert f"ssh-keygen -R '{server.name}'" in text


def test_accept_new_in_the_configuration(connect, sshd, tmp_path):
    server = sshd()
    server.known_hosts.write_text("")
    seen = with_config(server, tmp_path, "StrictHostKeyChecking accept-new\n")
    say_hello(connect(ECHO, seen))
    assert server.name in server.known_hosts.read_text()
    seen.config.write_text("StrictHostKeyChecking no\n" + server.config.read_text())
    server.known_hosts.write_text("")
    refused(HostKeyRefused, lambda: connect(ECHO, seen), "is unknown")


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ("{name}", True),
        ("other,h*", True),
        ("h*,!{name}", False),
        ("HOST?", True),
        ("host", False),
        ("@revoked {name}", None),
        ("@cert-authority {name}", False),
        ("# {name}", False),
        ("{hashed}", True),
    ],
)
def test_lines_of_known_hosts(connect, sshd, names, known):
    server = sshd()
    hashed = paramiko.HostKeys.hash_host(server.name)
    line = f"{names.format(name=server.name, hashed=hashed)} "
    line += (server.folder / "host_key.pub").read_text()
    server.known_hosts.write_text(f"damaged\n\n{line}")
    if known:
        say_hello(connect(ECHO, server))
    else:
        word = "is unknown" if known is False else "line 3 revokes"
        refused(HostKeyRefused, lambda: connect(ECHO, server), word)


def test_a_host_is_asked_for_the_key_that_is_known(connect, sshd, tmp_path):
    """It has others, too, which it would rather show."""
    key = tmp_path / "ecdsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", key], check=True)
    server = sshd(f"HostKey {tmp_path}/ecdsa\n")
    server.know(tmp_path / "ecdsa.pub")
    say_hello(connect(ECHO, server))


# ---- being let in


def test_no_key_is_accepted(connect, sshd):
    server = sshd()
    make_key(server.folder / "user_key")
    words = ("authentication", "user_key", "ssh-copy-id")
    refused(AuthRefused, lambda: connect(ECHO, server), *words)


def test_a_host_that_wants_a_password(connect, sshd):
    server = sshd("PubkeyAuthentication no\nPasswordAuthentication yes\n")
    refused(AuthRefused, lambda: connect(ECHO, server), "the host wants password", "keys only")


def test_a_key_with_a_passphrase_needs_the_agent(connect, sshd, ssh_agent):
    server = sshd()
    key = server.folder / "user_key"
    make_key(key, "a secret")
    (server.folder / "authorized_keys").write_text((server.folder / "user_key.pub").read_text())
    refused(AuthRefused, lambda: connect(ECHO, server), "it has a passphrase", "ssh-add")
    server.config.write_text(server.config.read_text().replace("IdentityAgent none", ""))
    ask = server.folder / "ask"
    ask.write_text("#!/bin/sh\necho a secret\n")
    ask.chmod(0o700)
    environment = {**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-q", key], env=environment, check=True)
    say_hello(connect(ECHO, server))


ASK = """
import sys
from whimbrel import Role, TransportContext
from whimbrel_ssh.transport import SshTransport
transport = SshTransport()
context = TransportContext(
    role=Role.SOURCE, settings={"ssh-config": sys.argv[1], "ssh-host-key": "strict"}
)
with transport.connect(transport.parse(sys.argv[2]), context) as channel:
    channel.send([b"hello"])
    channel.finish()
print("went through")
"""


@pytest.mark.parametrize("answer", ["a secret", "a guess"])
def test_a_passphrase_is_asked_for_on_a_terminal(sshd, answer):
    server = sshd()
    make_key(server.folder / "user_key", "a secret")
    (server.folder / "authorized_keys").write_text((server.folder / "user_key.pub").read_text())
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            "setsid",
            "-c",
            "-w",
            sys.executable,
            "-c",
            ASK,
            server.config,
            f"//{server.name}/exec:cat > /dev/null",
        ],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while b"Passphrase for" not in said:
            said += os.read(ours, 1000)
        os.write(ours, answer.encode() + b"\n")
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(ours, 1000):
                said += data
    finally:
        os.close(ours)
        process.wait(PATIENCE)
    assert answer.encode() not in said
    assert (b"went through" in said) is (answer == "a secret"), said
    if answer != "a secret":
        assert b"wrong passphrase" in said


def test_the_key_that_is_named_comes_before_the_others_of_an_agent(connect, sshd, ssh_agent):
    """A server takes only so many."""
    server = sshd("MaxAuthTries 2\n")
    server.config.write_text(server.config.read_text().replace("IdentityAgent none", ""))
    for i in range(4):
        make_key(server.folder / f"other{i}")
        subprocess.run(["ssh-add", "-q", server.folder / f"other{i}"], check=True)
    subprocess.run(["ssh-add", "-q", server.folder / "user_key"], check=True)
    say_hello(connect(ECHO, server))
    (server.folder / "authorized_keys").write_text("")
    refused(AuthRefused, lambda: connect(ECHO, server), "hung up", "IdentitiesOnly")


# ---- the configuration


def test_jumps_lead_through_other_hosts(connect, sshd, tmp_path):
    first, second, third = sshd(), sshd(), sshd()
    config = tmp_path / "config"
    parts = [s.config.read_text() for s in (first, second, third)]
    config.write_text("".join(parts) + f"  ProxyJump {first.name},{second.name}\n")
    third.config = config
    say_hello(connect(ECHO, third))
    assert "Accepted publickey" in first.said
    assert "Accepted publickey" in second.said
    second.kill()
    refused(Unreachable, lambda: connect(ECHO, third), "from the host before it")


def test_a_circle_of_jumps(connect, host, tmp_path):
    seen = with_config(host, tmp_path, "Host *\n  ProxyJump a\n")
    refused(Unreachable, lambda: connect(ECHO, seen), "circle")


def test_proxy_command(connect, host, tmp_path):
    command = f"ssh -F {host.config} -W 127.0.0.1:{host.port} {host.name}"
    seen = with_config(host, tmp_path, f"Host *\n  ProxyCommand {command}\n")
    say_hello(connect(ECHO, seen))


def test_a_proxy_command_that_fails_is_quoted(connect, host, tmp_path):
    seen = with_config(host, tmp_path, "Host *\n  ProxyCommand echo no way to %h >&2; exit 1\n")
    refused(Unreachable, lambda: connect(ECHO, seen), "no way to 127.0.0.1")


def test_what_the_uri_says_comes_first(monkeypatch, tmp_path):
    folder = tmp_path / ".ssh"
    (folder / "more").mkdir(parents=True)
    (folder / "config").write_text(
        "Host far\n HostName 192.0.2.1\n Include more/*\n User u\n"
        " Port 2200\n IdentityFile ~/.ssh/%h_%r\nHost *\n User nobody\n"
    )
    (folder / "more" / "a").write_text("ProxyCommand nc %h %p\nHost other\n Port 1\n")
    config = Config()
    far = config.host("far")
    assert (far.hostname, far.user, far.port) == ("192.0.2.1", "u", 2200)
    assert far.identities == (folder / "192.0.2.1_u",)
    assert far.host_key_name == "[192.0.2.1]:2200"
    assert far.known_hosts[0] == folder / "known_hosts"
    assert config.host("other").port == 1
    there = config.host("far", "me", 22)
    assert (there.user, there.port, there.proxy_command) == ("me", 22, "nc 192.0.2.1 22")
    assert there.host_key_name == "192.0.2.1"


def test_a_configuration_that_is_wrong(tmp_path):
    (tmp_path / "config").write_text("Host far\n  Port many\n")
    with pytest.raises(LocalError, match="configuration for far is wrong"):
        Config(str(tmp_path / "config")).host("far")
    with pytest.raises(LocalError, match="there is no"):
        Config(str(tmp_path / "absent"))


def test_a_password_in_a_uri_is_not_repeated():
    with pytest.raises(UriError) as caught:
        parse("//me:s3cret@host/unix:/x")
    assert "s3cret" not in str(caught.value)


# ---- what the far host does


def test_nobody_listens_on_the_far_host(connect, tmp_path):
    refused(FarEndRefused, lambda: connect(f"unix:{tmp_path}/none"), "Start the destination there")
    refused(FarEndRefused, lambda: connect("tcp:localhost:1"), "Start the destination there")


def test_a_host_that_forbids_forwarding(connect, sshd):
    server = sshd("AllowTcpForwarding no\nAllowStreamLocalForwarding no\n")
    refused(FarEndRefused, lambda: connect("unix:/x", server), "AllowStreamLocalForwarding")
    refused(FarEndRefused, lambda: connect("tcp:localhost:1", server), "AllowTcpForwarding")
    transport = SshTransport()
    address = transport.parse(f"//{server.name}/tcp:localhost:0")
    at = context(server, Role.DESTINATION)
    refused(FarEndRefused, lambda: transport.listen(address, at), "does not listen", "PermitListen")


def test_the_status_of_a_command_is_the_result(connect):
    with connect("exec:cat > /dev/null; echo no room >&2; exit 3") as channel:
        channel.send([b"x"])
        with pytest.raises(FarEndRefused, match="exit status 3: no room") as caught:
            channel.finish(soon())
        assert caught.value.status == 3


def test_a_command_that_ends_early(connect):
    with connect("exec:head -c 100 > /dev/null; echo enough >&2; exit 9") as channel:

        def go_on():
            while True:
                channel.send([bytes(1 << 16)])

        refused_text = Task(go_on).error(PATIENCE)
        assert isinstance(refused_text, FarEndRefused)
        assert "exit status 9: enough" in str(refused_text)


def test_a_full_disk_on_the_far_host(connect):
    with connect("exec:cat > /dev/full") as channel:
        with pytest.raises(FarEndRefused, match="No space left on device"):
            for _ in range(64):
                channel.send([bytes(1 << 20)])
            channel.finish(soon())


def test_a_command_that_says_much_on_the_wrong_side(connect):
    """More than the window holds, unless somebody reads it."""
    with connect("exec:head -c 9000000 /dev/zero | tr '\\0' x >&2; cat > /dev/null") as channel:
        channel.send([pattern(1 << 20)])
        channel.finish(soon())


def test_a_command_that_only_swallows_says_so_when_it_is_asked(connect):
    with connect("exec:cat > /dev/null") as channel:
        with pytest.raises(DeadlineExceeded, match="answers=off"):
            channel.peek(1, time.monotonic() + 0.1)


def test_a_command_is_killed_before_its_input_ends(connect, host, tmp_path):
    """Half a stream is not taken for a whole one. A host that gives no signals to root's sessions is left out."""
    made = tmp_path / "made"
    channel = connect(f"exec:cat > /dev/null && touch {made}")
    channel.send([b"half"])
    channel.close()
    if "requires privilege separation" not in host.said:
        assert not made.exists()


# ---- losing the link


def test_a_host_that_dies(connect, sshd):
    server = sshd()
    with connect(ECHO, server) as channel:
        reading = Task(lambda: channel.recv_into(memoryview(bytearray(8))))
        reading.until_blocked(PATIENCE)
        server.kill()
        error = reading.error(PATIENCE)
        assert isinstance(error, LinkLost)
        assert "link lost" in str(error)


def test_a_host_that_freezes(connect, sshd, tmp_path):
    server = sshd()
    seen = with_config(server, tmp_path, "ServerAliveInterval 1\nServerAliveCountMax 1\n")
    with connect(ECHO, seen) as channel:
        reading = Task(lambda: channel.recv_into(memoryview(bytearray(8))))
        server.signal_sessions(signal.SIGSTOP)
        error = reading.error(PATIENCE)
        assert isinstance(error, LinkLost)
        assert "no answer for" in str(error)


# ---- cancelling, in every phase


@contextlib.contextmanager
def cancelled(call):
    """Inside, the call is under way; behind it, it was cancelled."""
    cancel = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        task = Task(lambda: call(cancel))
        yield
        task.until_blocked(PATIENCE)
        os.eventfd_write(cancel, 1)
        assert isinstance(task.error(PATIENCE), Cancelled)
    finally:
        os.close(cancel)


def test_cancel_while_keys_are_exchanged(connect, host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        name = f"127.0.0.1:{server.getsockname()[1]}"
        with cancelled(lambda fd: connect(ECHO, name=name, cancel_fd=fd)):
            client, _ = server.accept()
            client.sendall(b"SSH-2.0-silent\r\n")
            client.recv(1)
        client.close()


def test_cancel_while_an_agent_thinks(connect, sshd, tmp_path, monkeypatch):
    path = tmp_path / "agent.sock"
    server = sshd()
    server.config.write_text(server.config.read_text().replace("IdentityAgent none", ""))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(path))
        agent.listen()
        with cancelled(lambda fd: connect(ECHO, server, cancel_fd=fd)):
            client, _ = agent.accept()
            client.recv(1)
        client.close()


# ---- new keys


def test_rekeying_in_both_directions(connect, sshd, caplog):
    """Every megabyte, while both sides send."""
    caplog.set_level("DEBUG", "whimbrel.ssh.protocol")
    server = sshd("RekeyLimit 1M\n")
    data = pattern(12 << 20)
    with connect(ECHO, server) as channel:
        sending = Task(lambda: channel.send([data]))
        assert read_exactly(channel, len(data)) == data
        sending.result(PATIENCE)
    assert caplog.text.count("Switch to new keys") > 8


def test_a_channel_that_ends_while_keys_are_exchanged_does_not_hold_up_the_others(
    connect, tmp_path
):
    """The moment is made with paramiko's own flag: no real server closes a channel just then on request."""
    one, two = tmp_path / "one", tmp_path / "two"
    os.mkfifo(one)
    os.mkfifo(two)
    with connect(f"exec:cat {one}") as channel:
        transport = channel._link.transport
        other = transport.open_session()
        other.exec_command(f"cat {two}")
        transport.clear_to_send.clear()
        two.write_bytes(b"")
        wait_until(lambda: other.closed, "end of the other channel")
        one.write_bytes(b"goes on")
        assert channel.peek(7, soon())
        assert transport._deferred
        transport.clear_to_send.set()
        wait_until(lambda: not transport._deferred, "answer to the end of the other channel")


# ---- listening


def test_listening_for_a_unix_socket_is_not_possible(host):
    transport = SshTransport()
    address = transport.parse(f"//{host.name}/unix:/x")
    at = context(host, Role.DESTINATION)
    refused(ChannelError, lambda: transport.listen(address, at), "TCP ports only")


def test_a_listener_whose_host_dies(sshd):
    server = sshd()
    transport = SshTransport()
    address = transport.parse(f"//{server.name}/tcp:localhost:0")
    with transport.listen(address, context(server, Role.DESTINATION)) as listener:
        accepting = Task(lambda: listener.accept(soon()))
        accepting.until_blocked(PATIENCE)
        server.kill()
        assert isinstance(accepting.error(PATIENCE), LinkLost)


def test_the_fast_cipher_is_chosen(connect):
    with connect(ECHO) as channel:
        assert channel._link.transport.local_cipher == "aes128-gcm@openssh.com"
