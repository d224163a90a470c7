"""migctl --plugins: every plugin is listed, whatever became of it, and none spoils it for the others."""

import json
import os
import pty
import re
import select
import subprocess
import sys

import pytest

TRANSPORT = """
    from whimbrel import TransportSpec, hookimpl

    whimbrel_api = (1, 0)

    @hookimpl
    def transports():
        return [TransportSpec(schemes={schemes}, factory="acme.nowhere:Transport", syntax="acme:X")]
"""


def listing(site, *args, **changes):
    done = site.migctl("--plugins", "--json", *args, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    return {(r["distribution"], r["name"]): r for r in json.loads(done.stdout)}


def acme(site, **kwargs):
    site.add(
        "acme-pigeon",
        group="whimbrel.transports",
        name="pigeon",
        source=TRANSPORT.format(schemes='("pigeon", "dove")'),
        **kwargs,
    )


def test_a_distribution_installed_from_a_folder_is_listed(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("acme-carrier")
    (folder / "pyproject.toml").write_text(
        """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "acme-carrier"
version = "2.5"
dependencies = ["whimbrel-core>=0.1,<0.2"]

[project.entry-points."whimbrel.plugins"]
carrier = "acme_carrier.plugin"

[tool.hatch.build.targets.wheel]
packages = ["acme_carrier"]
"""
    )
    package = folder / "acme_carrier"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(
        """
from whimbrel import Parameter, TransportSpec, Type, hookimpl

whimbrel_api = (1, 0)


@hookimpl
def transports():
    return [TransportSpec(schemes=("carrier",), factory="x:Y", syntax="carrier:HOST")]


@hookimpl
def settings():
    return [Parameter(name="wingspan", type=Type.INT, default=40, unit="cm", help="Of the bird")]
"""
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *offline, "--target", site.path, folder], check=True, timeout=100)

    assert listing(site)["acme-carrier", "carrier"] == {
        "kind": "plugin",
        "name": "carrier",
        "provides": ["carrier"],
        "distribution": "acme-carrier",
        "version": "2.5",
        "settings": ["wingspan"],
        "state": "ready",
        "detail": "",
    }


def test_first_party_plugins_are_ready(site):
    found = listing(site)
    for name in ("tcp", "unix", "exec", "fd"):
        record = found[f"whimbrel-{name}", name]
        assert (record["kind"], record["state"]) == ("transport", "ready")
        assert name in record["provides"]
    assert found["whimbrel-ram", "ram"]["provides"] == ["ram"]


FAULTS = {
    "fails to import": (
        {"source": "import a_module_that_nobody_has"},
        ("broken", "a_module_that_nobody_has"),
    ),
    "exits while imported": ({"source": "raise SystemExit(3)"}, ("broken", "SystemExit")),
    "has a syntax error": ({"source": "def ("}, ("broken", "SyntaxError")),
    "says no API": ({"source": "x = 1"}, ("broken", "whimbrel_api")),
    "for a newer API": ({"source": "whimbrel_api = (2, 0)"}, ("incompatible", "2.0")),
    "for a newer core": (
        {"source": "raise RuntimeError('imported')", "requires": "whimbrel-core>=7"},
        ("incompatible", "whimbrel-core>=7"),
    ),
    "misspells a hook": (
        {
            "source": """
                from whimbrel import hookimpl
                whimbrel_api = (1, 0)
                @hookimpl
                def transport(): return []
            """
        },
        ("broken", "'transport'"),
    ),
    "fails in a hook": (
        {
            "source": """
                from whimbrel import hookimpl
                whimbrel_api = (1, 0)
                @hookimpl
                def transports(): return 1 // 0
            """
        },
        ("broken", "ZeroDivisionError"),
    ),
    "misses something": (
        {
            "source": """
                from whimbrel import TransportSpec, hookimpl
                whimbrel_api = (1, 0)
                def needs(): return "install libcoop"
                @hookimpl
                def transports():
                    return [TransportSpec(
                        schemes=("coop",), factory="x:Y", syntax="coop:X", needs=needs)]
            """
        },
        ("needs", "install libcoop"),
    ),
}


@pytest.mark.parametrize(("dist", "state"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_plugin_is_listed_with_its_reason(site, dist, state):
    acme(site)
    site.add("bad-plugin", group="whimbrel.plugins", name="bad", **dist)
    found = listing(site)
    bad = found["bad-plugin", "bad"]
    assert bad["state"] == state[0]
    assert state[1] in bad["detail"]
    assert found["acme-pigeon", "pigeon"]["state"] == "ready"
    assert found["whimbrel-tcp", "tcp"]["state"] == "ready"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_disabled_plugin_is_not_imported(site, how):
    acme(site)
    site.add(
        "loud-plugin",
        group="whimbrel.plugins",
        name="loud",
        source="import pathlib; pathlib.Path(__file__).with_name('imported').touch()",
    )
    if how == "option":
        found = listing(site, "-p", "no:loud", "-p", "no:pigeon")
    else:
        found = listing(site, WHIMBREL_DISABLE="loud,pigeon")
    assert found["loud-plugin", "loud"]["state"] == "disabled"
    assert found["acme-pigeon", "pigeon"]["state"] == "disabled"
    assert found["whimbrel-tcp", "tcp"]["state"] == "ready"
    assert not (site.path / "imported").exists()


def claim_tcp(site):
    site.add(
        "acme-tcp",
        group="whimbrel.transports",
        name="fasttcp",
        source=TRANSPORT.format(schemes='("tcp",)'),
    )


def test_two_that_claim_one_scheme_are_both_refused_and_named(site):
    claim_tcp(site)
    found = listing(site)
    for who in (("acme-tcp", "fasttcp"), ("whimbrel-tcp", "tcp")):
        assert found[who]["state"] == "conflict"
        assert "acme-tcp" in found[who]["detail"]
        assert "whimbrel-tcp" in found[who]["detail"]
    assert found["whimbrel-unix", "unix"]["state"] == "ready"


def test_the_operator_settles_a_conflict(site):
    claim_tcp(site)
    found = listing(site, "-p", "tcp=whimbrel-tcp")
    assert found["whimbrel-tcp", "tcp"]["state"] == "ready"
    found = listing(site, "-p", "no:fasttcp")
    assert found["whimbrel-tcp", "tcp"]["state"] == "ready"
    assert found["acme-tcp", "fasttcp"]["state"] == "disabled"


def crowd(site):
    acme(site)
    claim_tcp(site)
    site.add("bad-plugin", group="whimbrel.savevm", name="bad", source="import nothing_at_all")


def test_the_table_fits_80_columns_and_a_pipe_gets_no_colours(site):
    crowd(site)
    done = site.migctl("--plugins")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    table = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith(("broken ", "conf", "needs "))
    ]
    assert max(map(len, table)) <= 80
    for heading in ("kind", "name", "provides", "distribution", "settings", "state"):
        assert heading in done.stdout
    assert re.search(r"transport +pigeon +pigeon +acme-pigeon 1\.0 +ready *\n +dove", done.stdout)
    assert "broken bad (bad-plugin 1.0): import failed: ModuleNotFoundError" in done.stdout


def on_a_terminal(site, *args, **changes):
    """What migctl prints on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            site.command(*args),
            env=site.environment(**changes),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as child:
            os.close(theirs)
            theirs = -1
            output = b""
            while select.select([ours], [], [], 60)[0]:
                try:
                    some = os.read(ours, 65536)
                except OSError:  # EIO: the other end is closed
                    break
                if not some:
                    break
                output += some
        assert child.returncode == 0
        return output.decode()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_a_terminal_gets_colours_within_80_columns(site):
    crowd(site)
    output = on_a_terminal(site, "--plugins")
    assert "\x1b[32mready" in output
    assert "\x1b[31mbroken" in output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert max(len(line.rstrip("\r")) for line in plain.split("\n")) <= 80


def test_no_color_is_obeyed(site):
    assert "\x1b[3" not in on_a_terminal(site, "--plugins", NO_COLOR="1")
