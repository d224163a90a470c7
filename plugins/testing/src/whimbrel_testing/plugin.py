"""What this distribution declares: two filters for tests."""

from __future__ import annotations

from whimbrel import FilterSpec, hookimpl

whimbrel_api = (1, 0)


@hookimpl
def filters() -> list[FilterSpec]:
    return [
        FilterSpec(
            name="meter",
            factory="whimbrel_testing.meter:MeterFilter",
            summary="counts the bytes each way, and logs them",
        ),
        FilterSpec(
            name="fault",
            factory="whimbrel_testing.faults:FaultFilter",
            summary="breaks the channel as $WHIMBREL_FAULTS says, for tests",
        ),
    ]
