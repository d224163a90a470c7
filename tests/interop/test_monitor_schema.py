"""query-qmp-schema of QEMU 10.0 and ours: what a command takes and what an event tells is of the same types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whimbrel_testing.peers import QemuBinaries

from .monitors import Client, differences, qemus, whimbrels

pytestmark = pytest.mark.interop

#: Members that only ours have: gone from QEMU 9.1; older clients send them.
OURS_ONLY = {"migrate.blk?", "migrate.inc?"}
#: What nobody here could follow is refused: flags of addresses, and parameters without their plugin.
QEMUS_ONLY = {
    "numeric?",
    "to?",
    "ipv4?",
    "ipv6?",
    "keep-alive?",
    "mptcp?",
    "abstract?",
    "tight?",
}


class Schema:
    def __init__(self, client: Client) -> None:
        client.run("qmp_capabilities")
        self._entries = {e["name"]: e for e in client.run("query-qmp-schema")}

    def names(self, meta_type: str) -> set[str]:
        return {n for n, e in self._entries.items() if e["meta-type"] == meta_type}

    def argument(self, name: str) -> Any:
        """Of a command or event: members by name (with ? where they may be left out), variants behind =."""
        return self._resolve(self._entries[name]["arg-type"])

    def _resolve(self, name: str) -> Any:
        entry = self._entries[name]
        match entry["meta-type"]:
            case "builtin":
                return entry["json-type"]
            case "enum":
                return "string"
            case "array":
                return [self._resolve(entry["element-type"])]
            case "alternate":
                return {self._resolve(m["type"]) for m in entry["members"]}
        members = {
            m["name"] + "?" * ("default" in m): self._resolve(m["type"]) for m in entry["members"]
        }
        variants = {"=" + v["case"]: self._resolve(v["type"]) for v in entry.get("variants", ())}
        return members | variants


@pytest.fixture(scope="module")
def both(
    qemu_binaries: QemuBinaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Schema, Schema]]:
    folder: Path = tmp_path_factory.mktemp("monitor")
    with qemus(qemu_binaries.find("10.0")) as theirs, whimbrels(folder) as ours:
        yield Schema(theirs(False)), Schema(ours(False))


def test_arguments(both: tuple[Schema, Schema]) -> None:
    theirs, ours = both
    shared = theirs.names("command") & ours.names("command")
    assert len(shared) >= 20
    only: dict[str, set[str]] = {"ours only": set(), "QEMU's only": set()}
    for name in shared:
        for difference in differences(theirs.argument(name), ours.argument(name), name):
            where, _, what = difference.partition(": ")
            assert what in only, difference
            only[what].add(where)
    # Each side has the parameters of its features.
    here, there = (
        {w for w in places if not w.startswith("migrate-set-parameters.")}
        for places in only.values()
    )
    assert here == OURS_ONLY
    assert {where.rpartition(".")[2] for where in there} == QEMUS_ONLY


def test_events(both: tuple[Schema, Schema]) -> None:
    theirs, ours = both
    names = ours.names("event")
    assert {"MIGRATION", "MIGRATION_PASS", "STOP", "RESUME", "SHUTDOWN"} <= names
    for name in names:
        assert ours.argument(name) == theirs.argument(name), name
