"""The plain commands on a monitor, against real QEMUs: what they do there, what they say, how they end."""

import json
import socket

import pytest

from whimbrel_testing.qemu_guest import counting_guest, wait_counting

pytestmark = pytest.mark.interop


@pytest.fixture(params=["7.2", "10.0"])
def version(request):
    return request.param


@pytest.fixture
def machine(qemu, version, tmp_path):
    """A counting guest; .monitor is the address of a second monitor, for migctl."""

    def start(**kwargs):
        name = f"vm{len(list(tmp_path.glob('*.log')))}"
        log = tmp_path / f"{name}.log"
        log.touch()
        guest = counting_guest(tmp_path)
        address = tmp_path / f"{name}.qmp"
        peer = qemu(
            *guest.args(log),
            *("-qmp", f"unix:{address},server=on,wait=off"),
            version=version,
            **kwargs,
        )
        peer.monitor, peer.log = f"unix:{address}", log
        return peer

    return start


@pytest.fixture
def migctl(site):
    def run(machine, *args, status=0):
        done = site.migctl("-m", machine.monitor, *args)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


def answer(done):
    return json.loads(done.stdout)


def test_settings_are_shown_and_set_with_units(machine, migctl):
    vm = machine()
    assert "max-bandwidth is 500.0 MiB/s" in migctl(vm, "set", "bandwidth", "500MiB/s").stdout
    migctl(vm, "set", "downtime", "0.2s")
    migctl(vm, "set", "multifd-channels", "4")
    migctl(vm, "set", "cpu-throttle-tailslow", "on")
    there = vm.qmp("query-migrate-parameters")
    assert there["max-bandwidth"] == 500 << 20
    assert there["downtime-limit"] == 200
    assert there["multifd-channels"] == 4
    assert there["cpu-throttle-tailslow"] is True
    assert answer(migctl(vm, "params", "--json")) == there
    shown = dict(line.split(None, 1) for line in migctl(vm, "params").stdout.splitlines())
    assert shown["downtime-limit"] == "200 ms"
    assert shown["xbzrle-cache-size"] == "64.0 MiB"
    assert answer(migctl(vm, "set", "bandwidth", "unlimited", "--json"))["value"] == 0


def test_what_cannot_be_set_changes_nothing(machine, migctl):
    vm = machine()
    before = vm.qmp("query-migrate-parameters")
    assert "has no parameter 'speed'" in migctl(vm, "set", "speed", "1", status=1).stderr
    assert "is not a size" in migctl(vm, "set", "bandwidth", "fast", status=2).stderr
    assert "refuses" in migctl(vm, "set", "multifd-channels", "0", status=1).stderr
    assert vm.qmp("query-migrate-parameters") == before


def test_capabilities_are_switched_together_or_not_at_all(machine, migctl):
    vm = machine()
    now = answer(migctl(vm, "caps", "xbzrle=on", "auto-converge=on", "--json"))
    there = {c["capability"]: c["state"] for c in vm.qmp("query-migrate-capabilities")}
    assert now == there
    assert there["xbzrle"]
    assert there["auto-converge"]
    migctl(vm, "caps", "xbzrle=off", "no-such=on", status=1)
    shown = dict(line.split() for line in migctl(vm, "caps").stdout.splitlines())
    assert shown["xbzrle"] == "on"
    assert shown["multifd"] == "off"
    assert "NAME=on" in migctl(vm, "caps", "xbzrle", status=2).stderr


def test_a_machine_is_paused_and_runs_on(machine, migctl):
    vm = machine()
    wait_counting(vm.log)
    assert answer(migctl(vm, "stop", "--json"))["run-state"] == "paused"
    assert vm.status() == "paused"
    assert "machine            paused" in migctl(vm, "status").stdout
    migctl(vm, "cont")
    assert vm.status() == "running"


def test_a_migration_is_watched_and_cancelled(machine, migctl, tmp_path):
    source, destination = machine(), machine(incoming=f"unix:{tmp_path}/m.sock")
    wait_counting(source.log)
    assert "nothing to cancel" in migctl(source, "cancel", status=1).stderr
    migctl(source, "set", "bandwidth", "1MiB/s")
    source.migrate(f"unix:{tmp_path}/m.sock")
    source.wait_migration("active")
    shown = migctl(source, "status").stdout
    assert "migration          active" in shown
    assert "memory left" in shown
    assert "cancelled; the machine is running" in migctl(source, "cancel").stdout
    assert source.migration()["status"] == "cancelled"
    assert answer(migctl(source, "status", "--json"))["migration"]["status"] == "cancelled"
    assert destination.process.poll() is not None or destination.status() == "inmigrate"


def test_a_waiting_machine_is_told_where_to_listen(qemu, version, machine, migctl, tmp_path):
    source = machine()
    log = tmp_path / "late.log"
    guest = counting_guest(tmp_path)
    late = qemu(
        *guest.args(log),
        *("-qmp", f"unix:{tmp_path}/late.qmp,server=on,wait=off", "-incoming", "defer"),
        version=version,
    )
    late.monitor = f"unix:{tmp_path}/late.qmp"
    said = answer(migctl(late, "incoming", "tcp:127.0.0.1:0", "--json"))
    assert len(said["addresses"]) == 1
    assert not said["addresses"][0].endswith(":0")
    wait_counting(source.log)
    source.migrate(said["addresses"][0])
    source.wait_migration("completed")
    assert "waits for no migration" in migctl(source, "incoming", "tcp::0", status=1).stderr


def test_a_machine_that_has_gone_runs_here_only_after_resolve(machine, migctl, tmp_path):
    source, _ = machine(), machine(incoming=f"unix:{tmp_path}/m.sock")
    assert "nothing to settle" in migctl(source, "resolve", "--gone", status=1).stderr
    source.migrate(f"unix:{tmp_path}/m.sock")
    source.wait_migration("completed")
    assert "would make two of it" in migctl(source, "cont", status=1).stderr
    assert source.status() == "postmigrate"
    assert migctl(source, "resolve", "--run-here", status=130).returncode == 130  # nobody said yes
    assert source.status() == "postmigrate"
    migctl(source, "resolve", "--run-here", "--yes")
    assert source.status() == "running"


def test_reasons_against_it_are_listed_and_3(qemu, version, migctl, tmp_path):
    vm = qemu(
        *("-machine", "pc-i440fx-7.2", "-m", "16", "-S"),
        *("-qmp", f"unix:{tmp_path}/b.qmp,server=on,wait=off"),
        *("-device", "ivshmem-plain,memdev=hostmem,master=off"),
        *("-object", f"memory-backend-file,size=1M,share=on,mem-path={tmp_path}/shm,id=hostmem"),
        version=version,
    )
    vm.monitor = f"unix:{tmp_path}/b.qmp"
    there = vm.migration()["blocked-reasons"]
    assert there
    done = migctl(vm, "blockers", status=3)
    assert done.stdout.splitlines() == there
    assert answer(migctl(vm, "blockers", "--json", status=3))["blocked-reasons"] == there
    said = answer(migctl(vm, "migrate", "--json", f"unix:{tmp_path}/m.sock", status=3))
    assert set(there) <= set(said["reasons"])
    assert said["exit-status"] == 3


def test_without_a_machine_the_command_line_is_wrong(site):
    done = site.migctl("status")
    assert done.returncode == 2
    assert "migctl -m unix:/run/vm.qmp status" in done.stderr
    done = site.migctl("-m", "unix:/a", "-m", "unix:/b", "status")
    assert done.returncode == 2
    assert "one machine" in done.stderr


def test_the_machine_may_be_named_by_the_environment(machine, site):
    vm = machine()
    done = site.migctl("status", "--json", MIGCTL_MONITOR=vm.monitor)
    assert answer(done)["run-state"] == "running"


def test_a_monitor_that_does_not_answer_is_one_line(site, tmp_path):
    done = site.migctl("-m", f"unix:{tmp_path}/none.qmp", "status")
    assert done.returncode == 1
    assert "nobody answers at the monitor" in done.stderr
    assert "No such file" in done.stderr
    assert done.stderr.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = site.migctl("-m", f"127.0.0.1:{port}", "status")
    assert "Connection refused" in done.stderr or "Connect call failed" in done.stderr
    assert done.stderr.count("\n") == 1
