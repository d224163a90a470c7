"""What this distribution declares. Light: zstandard is imported when a URI names the filter."""

from __future__ import annotations

from whimbrel import FilterSpec, hookimpl
from whimbrel.settings import Parameter, Setting, Type

whimbrel_api = (1, 0)

AUTO = "auto"
#: What may be chosen; 0 means zstd's default and would be 3 once more.
LEVELS = tuple(level for level in range(-7, 13) if level)


@hookimpl
def filters() -> list[FilterSpec]:
    return [
        FilterSpec(
            name="zstd",
            factory="whimbrel_zstd.channel:ZstdFilter",
            summary="compresses with zstd, as hard as the link leaves time for; both sides write it",
        )
    ]


@hookimpl
def settings() -> list[Setting]:
    return [
        Parameter(
            name="zstd-level",
            type=Type.CHOICE,
            choices=(AUTO, *map(str, LEVELS)),
            default=AUTO,
            help="How hard zstd:: compresses, from -7 (fast) to 12 (small); auto follows what the link leaves time for",
        )
    ]
