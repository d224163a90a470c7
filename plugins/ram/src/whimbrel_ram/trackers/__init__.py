"""Dirty trackers: who says which pages the machine has written since the last look.

A tracker is found by the collecting hook dirty_trackers() (see whimbrel_ram.hookspecs) and chosen by the parameter
`dirty-tracker`: by name, or `auto`, the ready one of highest priority among those that are safe for every app.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.errors import PluginError, SettingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from whimbrel_ram.block import RAMBlock

AUTO = "auto"


class DirtyTracker(abc.ABC):
    """Watches the blocks of one migration. All methods are called by the migration's thread, start() first.

    A page that is written at any time after start() must be in what the next sync() returns, or in a later one when the
    write happens during sync(). A page too many costs its sending; a page too few is lost memory.
    """

    @abc.abstractmethod
    def start(self, blocks: Sequence[RAMBlock]) -> None:
        """Watch from now on. May raise LocalError or OSError: the migration then fails, and stop() is called."""

    @abc.abstractmethod
    def sync(self, block: RAMBlock) -> NDArray[Any] | None:
        """Which pages of the block (in units of its page_size) were written since start or the last sync.

        One of: None for none; a bool array with one element a page; an array of page numbers (any integer type but
        uint8); a uint8 array that is a bitmap, the lowest bit first. What the app marked by mark_dirty() is added by the
        caller.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Stop watching and release everything. Idempotent; also called after a start() that failed."""

    def source(self, block: RAMBlock) -> NDArray[np.uint8]:
        """What is sent: the block's own memory, as (pages, page_size), unless the tracker compares with a copy."""
        return block.rows

    def untouched(self, block: RAMBlock) -> NDArray[np.bool_] | None:
        """Pages that had never been written when start() ended (they are zero, and reading them would take memory of
        the host); None where that is not known.
        """
        from whimbrel_ram.memory import untouched

        return untouched(block)


@attrs.frozen(kw_only=True)
class TrackerSpec:
    """What a plugin declares of a tracker; cheap to make."""

    name: str
    #: `auto` takes the ready one with the highest.
    priority: int
    #: 'package.module:Class' or a callable; makes the DirtyTracker.
    factory: str | Callable[[], DirtyTracker]
    #: 'package.module:function' or a callable. Given the blocks, says what is missing and how to get it, or None.
    probe: str | Callable[[Sequence[RAMBlock]], str | None]
    summary: str = ""
    #: Whether `auto` may choose it: not for a tracker that relies on the app.
    automatic: bool = True

    def create(self) -> DirtyTracker:
        tracker: DirtyTracker = _load(self.factory)()
        return tracker

    def reason(self, blocks: Sequence[RAMBlock]) -> str | None:
        """probe(), a failing one being a reason as well."""
        try:
            reason: str | None = _load(self.probe)(blocks)
        except Exception as error:
            return f"its probe failed: {error}"
        return reason


def _load(target: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(target):
        return target
    module, _, attribute = target.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{target} cannot be loaded: {error}") from error
    return found


#: Those of this plugin.
BUILT_IN = (
    TrackerSpec(
        name="uffd-wp",
        priority=100,
        factory="whimbrel_ram.trackers.uffd:UffdTracker",
        probe="whimbrel_ram.trackers.uffd:probe",
        summary="the kernel notes each first write to a page (userfaultfd write-protection, PAGEMAP_SCAN; Linux 6.7)",
    ),
    TrackerSpec(
        name="shadow",
        priority=10,
        factory="whimbrel_ram.trackers.shadow:ShadowTracker",
        probe="whimbrel_ram.trackers.shadow:probe",
        summary="compares with a copy: works everywhere, takes the memory twice and reads all of it in every pass",
    ),
    TrackerSpec(
        name="explicit",
        priority=0,
        factory="whimbrel_ram.trackers.explicit:ExplicitTracker",
        probe="whimbrel_ram.trackers.explicit:probe",
        summary="only what the app marks by RAMBlock.mark_dirty()",
        automatic=False,
    ),
)


def choose(wanted: str, specs: Iterable[TrackerSpec], blocks: Sequence[RAMBlock]) -> TrackerSpec:
    """The spec for the value of `dirty-tracker`. Raises SettingError that says of each what is missing."""
    ordered = sorted(specs, key=lambda s: (-s.priority, s.name))
    names = [s.name for s in ordered]
    double = sorted({n for n in names if names.count(n) > 1 or n == AUTO})
    if double:
        raise SettingError(
            f"dirty tracker '{double[0]}' is provided twice",
            hint="Disable one of the plugins that provide it",
        )
    if wanted == AUTO:
        reasons = []
        for spec in ordered:
            reason = (
                spec.reason(blocks)
                if spec.automatic
                else "never chosen by itself, because it relies on the app"
            )
            if reason is None:
                return spec
            reasons.append(f"{spec.name}: {reason}")
        raise SettingError(
            f"no dirty tracker can watch this memory. {'. '.join(reasons)}",
            hint="Set dirty-tracker to one of these once its condition is met",
        )
    for spec in ordered:
        if spec.name == wanted:
            reason = spec.reason(blocks)
            if reason is None:
                return spec
            others = [
                f"{s.name}: {s.reason(blocks) or 'ready'}" for s in ordered if s.name != wanted
            ]
            raise SettingError(
                f"dirty tracker '{wanted}' cannot be used: {reason}",
                hint=f"The others: {'. '.join(others)}" if others else None,
            )
    raise SettingError(
        f"Parameter 'dirty-tracker' does not accept value '{wanted}'",
        expected=f"one of {', '.join([AUTO, *names])}",
    )
