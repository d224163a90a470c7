"""The QMP server of a machine: `kernel.monitor("unix:/run/app.qmp")`."""

from whimbrel_monitor.command import Command as Command, Context as Context, command as command
