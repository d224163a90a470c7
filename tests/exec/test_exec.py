"""What is particular to exec: how the command ends is the result, and it never outlives the migration."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from whimbrel import ChannelError, DeadlineExceeded, Role, TransportContext
from whimbrel_exec.child import TAIL
from whimbrel_exec.transport import ExecTransport
from whimbrel_testing.transport_suite import Task, nothing_left_behind, read_exactly

PATIENCE = 20.0
EXEC = ExecTransport()
FOREVER = "sleep 1000"


def soon():
    return time.monotonic() + PATIENCE


@pytest.fixture(autouse=True)
def _clean():
    with nothing_left_behind():
        yield


def source(command):
    return EXEC.connect(EXEC.parse(command), TransportContext(role=Role.SOURCE))


def destination(command):
    listener = EXEC.listen(EXEC.parse(command), TransportContext(role=Role.DESTINATION))
    with listener:
        return listener.accept(soon())


def wait_for(condition):
    """Polls: there is no event of a file that another process writes, or of its end."""
    end = soon()
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


def gone(pid):
    """It has ended; that nobody has reaped it yet is init's business."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def written(path):
    """The numbers in a file, once they are there."""
    try:
        text = path.read_text()
    except OSError:
        return None
    return [int(word) for word in text.split()] if text.endswith("\n") else None


def test_the_stream_is_the_standard_input(tmp_path):
    with source(f"cat > {tmp_path}/f") as channel:
        channel.send([b"all ", b"of it"])
        channel.finish(soon())
        assert (tmp_path / "f").read_bytes() == b"all of it"


def test_the_stream_is_the_standard_output():
    with destination("printf 'all of it'") as channel:
        assert read_exactly(channel, 20) == b"all of it"
        channel.finish(soon())


def test_a_command_is_for_a_shell(tmp_path):
    with source(f"X='a  b'; cat >/dev/null && echo \"$X::$0\" > {tmp_path}/f") as channel:
        channel.finish(soon())
    assert (tmp_path / "f").read_text() == "a  b::/bin/sh\n"


def test_a_failing_command_fails_finish():
    with source("cat > /dev/null; echo the disk is full >&2; exit 3") as channel:
        channel.send([b"x"])
        with pytest.raises(ChannelError) as caught:
            channel.finish(soon())
        assert str(caught.value) == (
            "the command 'cat > /dev/null; echo the disk is full >&2; exit 3' ended with exit"
            " status 3: the disk is full. Run the command by hand to see why"
        )


def test_a_command_that_dies_early_says_why():
    with source("echo no such host >&2; exit 255") as channel:
        with pytest.raises(ChannelError, match="ended with exit status 255: no such host"):
            while True:
                channel.send([bytes(1 << 16)])


def test_a_command_that_is_not_there():
    with source("no-such-command-anywhere") as channel:
        with pytest.raises(ChannelError, match="status 127: .*no-such-command-anywhere: not found"):
            channel.finish(soon())


def test_a_command_that_is_killed():
    with source("kill -TERM $$") as channel:
        with pytest.raises(ChannelError, match="was killed by signal SIGTERM"):
            channel.finish(soon())


def test_a_command_that_stops_listening_but_lives_is_an_error():
    with source(f"exec <&-; {FOREVER}") as channel:
        with pytest.raises(ChannelError, match="writing failed: Broken pipe"):
            while True:
                channel.send([bytes(1 << 16)])


def test_the_end_of_a_failing_command_is_an_error_and_not_the_end():
    """What it wrote may be all or a part of it: zcat says in the end that the sum is wrong."""
    with destination("printf abc; echo crc error >&2; exit 1") as channel:
        assert read_exactly(channel, 3) == b"abc"
        for call in (
            lambda: channel.recv_into(memoryview(bytearray(1))),
            lambda: channel.peek(1, soon()),
            lambda: channel.finish(soon()),
        ):
            with pytest.raises(ChannelError, match="ended with exit status 1: crc error"):
                call()


def test_finish_reads_what_the_command_still_writes():
    with destination("printf abc; head -c 300000 /dev/zero; exit 4") as channel:
        assert read_exactly(channel, 3) == b"abc"
        with pytest.raises(ChannelError, match="exit status 4"):
            channel.finish(soon())


def test_finish_obeys_its_deadline():
    with source(f"cat > /dev/null; {FOREVER}") as channel:
        with pytest.raises(DeadlineExceeded, match="waiting for the command 'cat"):
            channel.finish(time.monotonic() + 0.05)
    with destination(f"printf a; {FOREVER}") as channel:
        with pytest.raises(DeadlineExceeded):
            channel.finish(time.monotonic() + 0.05)


def test_finish_can_be_aborted():
    with source(f"cat > /dev/null; {FOREVER}") as channel:
        finishing = Task(channel.finish)
        finishing.until_blocked(PATIENCE)
        channel.abort()
        with pytest.raises(ChannelError, match="was aborted"):
            finishing.result(PATIENCE)


def test_what_a_command_says_does_not_block_it_and_is_bounded():
    with source("head -c 3000000 /dev/zero | tr '\\0' x >&2; echo; echo the end >&2; exit 1") as c:
        with pytest.raises(ChannelError) as caught:
            c.finish(soon())
    assert str(caught.value).count("x") <= TAIL + 20
    assert "xthe end. Run" in str(caught.value)


def test_what_a_command_says_cannot_play_with_the_terminal():
    with source("printf '\\033[2Jbad \\377' >&2; exit 1") as channel:
        with pytest.raises(ChannelError) as caught:
            channel.finish(soon())
    assert "status 1: ?[2Jbad \N{REPLACEMENT CHARACTER}." in str(caught.value)


def test_what_a_command_says_is_logged(caplog):
    caplog.set_level(logging.INFO, "whimbrel.exec")
    with source("cat >/dev/null; echo one >&2; printf two >&2") as channel:
        channel.finish(soon())
        wait_for(lambda: len(caplog.messages) >= 2)
    assert [m.rpartition(": ")[2] for m in caplog.messages] == ["one", "two"]


def test_nothing_else_of_ours_is_open_in_the_command():
    r, w = os.pipe()
    os.set_inheritable(w, True)
    try:
        with destination("exec ls /proc/self/fd") as channel:
            assert read_exactly(channel, 100).split() == [b"0", b"1", b"2", b"3"]  # 3 is of ls
    finally:
        os.close(r)
        os.close(w)


def test_a_destination_does_not_take_our_input():
    with destination("readlink /proc/self/fd/0") as channel:
        assert read_exactly(channel, 100) == b"/dev/null\n"


@pytest.mark.parametrize("how", ["abort", "close", "collected"])
def test_the_whole_group_ends(tmp_path, how):
    pids = tmp_path / "pids"
    channel = source(f"{FOREVER} & {FOREVER} & echo $$ $! > {pids}; trap '' TERM HUP; {FOREVER}")
    found = wait_for(lambda: written(pids))
    assert len(found) == 2
    if how == "abort":
        channel.abort()
    elif how == "close":
        channel.close()
    else:
        del channel
    for pid in found:
        wait_for(lambda pid=pid: gone(pid))
    if how == "abort":
        channel.close()


def test_what_a_finished_command_left_behind_ends_as_well(tmp_path):
    pids = tmp_path / "pids"
    with source(f"cat > /dev/null; {FOREVER} > /dev/null 2>&1 & echo $! > {pids}") as channel:
        channel.finish(soon())
        (pid,) = wait_for(lambda: written(pids))
    wait_for(lambda: gone(pid))


def test_a_broken_off_stream_does_not_look_complete(tmp_path):
    """The command is killed before its input ends."""
    channel = source(f"cat > /dev/null && touch {tmp_path}/complete")
    channel.send([b"part"])
    channel.close()
    assert not (tmp_path / "complete").exists()


def test_the_command_ends_when_we_are_killed(tmp_path):
    """SIGKILL gives us no last word; the group ends all the same, the guard included."""
    pids = tmp_path / "pids"
    command = f"{FOREVER} & echo $$ $! $(ps -o pgid= -p $$) > {pids}; {FOREVER}"
    program = textwrap.dedent(
        f"""
        import sys, time
        from whimbrel import Role, TransportContext
        from whimbrel_exec.transport import ExecTransport
        e = ExecTransport()
        channel = e.connect(e.parse({command!r}), TransportContext(role=Role.SOURCE))
        channel.send([b"x"])
        sys.stdin.read()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        found = wait_for(lambda: written(pids))
        assert len(found) == 3
        assert not any(gone(pid) for pid in found)
        process.kill()
        for pid in found:
            wait_for(lambda pid=pid: gone(pid))


def test_the_command_outlives_the_thread_that_started_it(tmp_path):
    """PR_SET_PDEATHSIG would not let it."""
    channel = Task(lambda: source(f"cat > {tmp_path}/f")).result(PATIENCE)
    with channel:
        channel.send([b"x"])
        channel.finish(soon())
    assert (tmp_path / "f").read_bytes() == b"x"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_of_ours_leaves_the_command_alone(tmp_path):
    with source(f"cat > {tmp_path}/f") as channel:
        pid = os.fork()
        if pid == 0:
            channel.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        channel.send([b"x"])
        channel.finish(soon())
    assert (tmp_path / "f").read_bytes() == b"x"


def test_an_exit_status_that_somebody_else_took_is_not_success():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with source("cat > /dev/null; exit 7") as channel:
            with pytest.raises(ChannelError, match="was taken by somebody else in this process"):
                channel.finish(soon())
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_command_that_cannot_be_started_leaves_nothing(monkeypatch):
    with pytest.raises(ChannelError, match="cannot start the command '.*': Argument list too long"):
        source(": " + "x" * 200_000)


def test_one_command_is_one_channel():
    with EXEC.listen(EXEC.parse("cat"), TransportContext(role=Role.DESTINATION)) as listener:
        assert listener.addresses == ("exec:cat",)
        listener.accept(soon()).close()
        with pytest.raises(ChannelError, match="has one channel only, which was taken"):
            listener.accept(soon())
