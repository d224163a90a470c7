"""The lease sees a second copy, outlives kill -9, and its log proves it afterwards; a generation is claimed once."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from whimbrel_testing.lease import Lease, LeaseViolation, read_log, violations

HOLDER = """
import sys
from whimbrel_testing.lease import Lease
lease = Lease(sys.argv[1], "child")
lease.acquire(1)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_after_the_other_is_no_violation(tmp_path):
    for generation, name in enumerate(("source", "destination", "source")):
        lease = Lease(tmp_path, name)
        lease.acquire(generation)
        assert lease.held
        lease.release()
        assert not lease.held
    assert [e.what for e in read_log(tmp_path)] == ["start", "stop"] * 3
    assert violations(tmp_path) == []


def test_two_at_once_are_a_violation_that_stays_on_record(tmp_path):
    one, two = Lease(tmp_path, "source"), Lease(tmp_path, "destination")
    one.acquire(3)
    with pytest.raises(LeaseViolation):
        two.acquire(4)
    assert not two.held
    one.release()
    two.acquire(4)  # later it is free again, but what happened is not forgotten
    two.release()
    (found,) = violations(tmp_path)
    assert found == f"{two.holder} started generation 4 while {one.holder} ran"


def test_kill_9_frees_the_lease_and_is_no_violation(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(LeaseViolation, match="while child-"):
            Lease(tmp_path, "source").acquire(2)
        child.send_signal(signal.SIGKILL)
        child.wait()
    Lease(tmp_path, "source").acquire(2)
    assert [e.what for e in read_log(tmp_path)] == ["start", "violation", "start"]


def test_the_log_is_only_appended_to(tmp_path):
    lease = Lease(tmp_path, "source")
    lease.acquire(0)
    before = (tmp_path / "runs.jsonl").read_bytes()
    lease.release()
    after = (tmp_path / "runs.jsonl").read_bytes()
    assert after.startswith(before)
    event = json.loads(after[len(before) :])
    assert (event["what"], event["pid"], event["generation"]) == ("stop", os.getpid(), 0)


def test_exactly_one_can_claim_a_generation(tmp_path):
    leases = [Lease(tmp_path, f"side{i}") for i in range(8)]
    gate = threading.Barrier(len(leases))
    answers = {}

    def claim(lease):
        gate.wait()
        answers[lease.holder] = lease.fence(5)

    threads = [threading.Thread(target=claim, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [holder for holder, won in answers.items() if won]
    assert (tmp_path / "claim.5").read_text() == winner
    assert len(answers) == len(leases)


def test_a_claim_is_told_again_to_its_holder_and_holds_for_its_generation_only(tmp_path):
    one, two = Lease(tmp_path, "source"), Lease(tmp_path, "destination")
    assert one.fence(1)
    assert one.fence(1)
    assert not two.fence(1)
    assert two.fence(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["claim.1", "claim.2"]
