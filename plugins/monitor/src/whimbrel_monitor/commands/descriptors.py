"""Descriptors that a client sends over a UNIX socket, for fd:NAME.

They are the kernel's, under their names. A set (add-fd) is one descriptor here, under the name /dev/fdset/N.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from whimbrel import Kernel, LocalError
from whimbrel_monitor import Context, command

#: Of descriptors that have names. They outlive the client, and cost the app some of those that it may have.
MAX_NAMED = 64
_SET = re.compile(r"/dev/fdset/(\d+)")


def _take(ctx: Context, name: str) -> int:
    """The descriptor that was sent, under a name from now on. Raises LocalError."""
    fd = ctx.take_fd()
    if name not in ctx.kernel.named_fds and len(ctx.kernel.named_fds) >= MAX_NAMED:
        os.close(fd)
        raise LocalError(
            f"there are {MAX_NAMED} named descriptors already", hint="Close some with closefd"
        )
    if name in ctx.kernel.named_fds:
        ctx.kernel.close_fd(name)
    ctx.kernel.register_fd(name, fd)
    return fd


@command("getfd")
def getfd(ctx: Context, fdname: str) -> None:
    """Name the descriptor that came with this command, or before it, by SCM_RIGHTS; fd:NAME finds it."""
    if fdname[:1].isdigit():
        os.close(ctx.take_fd())
        raise LocalError("Parameter 'fdname' expects a name not starting with a digit")
    if _SET.fullmatch(fdname):
        os.close(ctx.take_fd())
        raise LocalError(f"Parameter 'fdname' expects another name: '{fdname}' is for add-fd")
    _take(ctx, fdname)


@command("closefd")
def closefd(ctx: Context, fdname: str) -> None:
    """Close a descriptor that no migration has taken over."""
    ctx.kernel.close_fd(fdname)


@command("add-fd")
def add_fd(ctx: Context, fdset_id: int | None = None, opaque: str | None = None) -> dict[str, Any]:
    """Keep the descriptor that came with this command as set N: its name is /dev/fdset/N. `opaque` is not kept."""
    used = {number for number, _ in _sets(ctx.kernel)}
    if fdset_id is not None and fdset_id < 0:
        os.close(ctx.take_fd())
        raise LocalError("Parameter 'fdset-id' expects a non-negative value")
    if fdset_id in used:
        os.close(ctx.take_fd())
        raise LocalError(f"set {fdset_id} has its descriptor", hint="Remove it first: remove-fd")
    number = fdset_id
    if number is None:
        number = next(n for n in range(len(used) + 1) if n not in used)
    return {"fdset-id": number, "fd": _take(ctx, f"/dev/fdset/{number}")}


@command("remove-fd")
def remove_fd(ctx: Context, fdset_id: int, fd: int | None = None) -> None:
    """Close the descriptor of a set."""
    for number, found in _sets(ctx.kernel):
        if number == fdset_id and fd in (None, found):
            ctx.kernel.close_fd(f"/dev/fdset/{number}")
            return
    which = f"fdset-id:{fdset_id}" + ("" if fd is None else f", fd:{fd}")
    raise LocalError(f"File descriptor named '{which}' not found")


@command("query-fdsets")
def query_fdsets(ctx: Context) -> list[dict[str, Any]]:
    """The sets, and their descriptors as numbers of the app's."""
    return [{"fdset-id": number, "fds": [{"fd": fd}]} for number, fd in _sets(ctx.kernel)]


def _sets(kernel: Kernel) -> Iterator[tuple[int, int]]:
    for name, fd in tuple(kernel.named_fds.items()):
        if match := _SET.fullmatch(name):
            yield int(match[1]), fd
