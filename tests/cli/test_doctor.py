"""migctl doctor: what it finds on this host, and what it says of plugins that are not as they should be."""

import json
import platform
import re

import pytest

HEALTH = """
    from whimbrel import Check, Health, hookimpl

    whimbrel_api = (1, 0)

    @hookimpl
    def health():
        return [Check({name!r}, Health.{health}, "found \\x1b[2J it", {remedy!r})]
"""
RAISES = """
    from whimbrel import hookimpl

    whimbrel_api = (1, 0)

    @hookimpl
    def health():
        {body}
"""


#: The kernel answers a system call with an error, as it does in a container: seccomp(2), by classic BPF.
REFUSE = """
import ctypes, struct
number, error = {number}, {error}
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *c) for c in code))
filter = struct.pack("@HP", len(code), ctypes.addressof(program))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
"""
USERFAULTFD, MEMFD_CREATE, EPERM, ENOSYS = 323, 319, 1, 38
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls")


def add(site, name, source, **kwargs):
    site.add(f"acme-{name}", group="whimbrel.plugins", name=name, source=source, **kwargs)


def checks(done):
    return {c["name"]: c for c in json.loads(done.stdout)}


def test_it_looks_at_versions_limits_kernel_features_and_plugins(site):
    done = site.migctl("doctor", "--json")
    found = checks(done)
    assert {c["health"] for c in found.values()} <= {"ok", "warning", "failed"}
    assert done.returncode == any(c["health"] == "failed" for c in found.values())
    assert {"migctl", "Python", "kernel", "qemu.qmp", "open files", "locked memory"} <= set(found)
    assert {"plugin tcp", "plugin ram", "TCP buffers", "UNIX socket buffer"} <= set(found)
    assert {"userfaultfd", "memfd", "dirty tracker", "overcommit"} <= set(found)
    for check in found.values():
        assert check["found"]
        assert (check["health"] == "ok") == (check["remedy"] is None), check


def test_the_kernel_is_what_the_ram_plugin_finds_it_to_be(site):
    from whimbrel_ram.block import RAMBlock
    from whimbrel_ram.trackers import AUTO, BUILT_IN, choose

    chosen = choose(AUTO, BUILT_IN, [RAMBlock("r", 1 << 16)]).name
    found = checks(site.migctl("doctor", "--json"))
    assert found["dirty tracker"]["found"] == f"auto takes {chosen}"
    features = ("userfaultfd", "write-protection", "PAGEMAP_SCAN")
    assert (chosen == "uffd-wp") == all(
        name in found and found[name]["health"] == "ok" for name in features
    )


def test_a_table_for_people(site):
    done = site.migctl("doctor")
    assert re.fullmatch(r"\d+ failed, \d+ warnings?, \d+ ok", done.stdout.splitlines()[-1])
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(("health", "status"), [("OK", 0), ("WARNING", 0), ("FAILED", 1)])
def test_a_failed_check_is_1_and_a_warning_is_0(site, health, status):
    add(site, "mine", HEALTH.format(name="the thing", health=health, remedy="mend --it"))
    done = site.migctl("doctor", "--json")
    assert done.returncode == status
    assert checks(done)["the thing"] == {
        "source": "mine",
        "name": "the thing",
        "health": health.lower(),
        "found": "found \x1b[2J it",
        "remedy": "mend --it",
    }
    shown = site.migctl("doctor").stdout
    assert "-> mend --it" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('raise OSError("no such thing")', "OSError: no such thing"),
        ("return 7", "no list of checks"),
    ],
)
def test_a_plugin_that_cannot_tell_is_a_failed_check_and_the_others_stay(site, body, why):
    add(site, "odd", RAISES.format(body=body))
    done = site.migctl("doctor", "--json")
    assert done.returncode == 1
    found = checks(done)
    assert why in found["health"]["found"]
    assert "-p no:odd" in found["health"]["remedy"]
    assert "userfaultfd" in found
    assert done.stderr == ""


def test_a_plugin_may_have_nothing_to_say(site):
    add(site, "still", RAISES.format(body="return None"))
    assert site.migctl("doctor").returncode == 0


def test_broken_and_incompatible_plugins_and_missing_packages_have_a_remedy(site):
    add(site, "broken", "import no_such_module")
    add(site, "newer", "whimbrel_api = (9, 0)")
    add(site, "lacking", "whimbrel_api = (1, 0)", requires="no-such-package>=2")
    done = site.migctl("doctor", "--json")
    assert done.returncode == 1
    found = checks(done)
    assert found["plugin broken"]["health"] == "failed"
    assert "no_such_module" in found["plugin broken"]["found"]
    assert found["plugin broken"]["remedy"] == "pip install --force-reinstall acme-broken"
    assert "is incompatible: written for plugin API 9.0" in found["plugin newer"]["found"]
    assert "--upgrade acme-newer" in found["plugin newer"]["remedy"]
    assert found["plugin lacking"]["remedy"] == "pip install 'no-such-package>=2'"
    assert done.stderr == ""
    assert (
        checks(site.migctl("-p", "no:broken", "doctor", "--json"))["plugin broken"]["health"]
        == "ok"
    )


@on_x86
@pytest.mark.parametrize(
    ("error", "why", "remedy"),
    [
        (EPERM, "userfaultfd is not allowed here", "--security-opt seccomp="),
        (ENOSYS, "there is no userfaultfd here", "run Linux 6.7 or newer"),
    ],
)
def test_without_userfaultfd_it_works_with_more_memory(site, error, why, remedy):
    refuse = REFUSE.format(number=USERFAULTFD, error=error)
    done = site.migctl("doctor", "--json", prelude=refuse)
    assert done.returncode == 0, done.stderr
    found = checks(done)
    assert found["userfaultfd"]["health"] == "warning"
    assert why in found["userfaultfd"]["found"]
    assert "takes the memory twice" in found["userfaultfd"]["found"]
    assert remedy in found["userfaultfd"]["remedy"]
    assert found["dirty tracker"]["found"] == "auto takes shadow"


@on_x86
def test_without_memfd_there_is_no_memory_to_share(site):
    refuse = REFUSE.format(number=MEMFD_CREATE, error=EPERM)
    done = site.migctl("doctor", "--json", prelude=refuse)
    assert done.returncode == 1
    assert checks(done)["memfd"]["health"] == "failed"


def test_few_descriptors_are_a_warning(site):
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))"
    found = checks(site.migctl("doctor", "--json", prelude=script))["open files"]
    assert (found["health"], found["found"]) == ("warning", "256 (at most 4096)")
    assert found["remedy"] == "ulimit -n 1024"


def test_a_monitor_that_does_not_answer_is_a_failed_check(site, tmp_path):
    done = site.migctl("-m", f"unix:{tmp_path}/none", "doctor", "--json")
    assert done.returncode == 1
    assert "No such file" in checks(done)[f"monitor unix:{tmp_path}/none"]["found"]


@pytest.mark.interop
def test_a_monitor_that_answers_says_its_version(site, qemu, tmp_path):
    qemu("-M", "none", "-qmp", f"unix:{tmp_path}/vm.qmp,server=on,wait=off", version="10.0")
    address = f"unix:{tmp_path}/vm.qmp"
    found = checks(site.migctl("-m", address, "doctor", "--json"))[f"monitor {address}"]
    assert found["health"] == "ok"
    assert found["found"].startswith("QEMU 10.0, ")
