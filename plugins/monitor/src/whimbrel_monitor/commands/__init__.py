"""The commands that this plugin contributes, by subject."""

from __future__ import annotations

from whimbrel_monitor.command import Command


def own() -> list[Command]:
    from whimbrel_monitor.commands import (
        about,
        descriptors,
        machine,
        migration,
        settings,
        settings_2013,
    )

    modules = (about, descriptors, machine, migration, settings, settings_2013)
    return [
        each for module in modules for each in vars(module).values() if isinstance(each, Command)
    ]
