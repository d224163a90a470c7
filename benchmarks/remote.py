"""Objects in processes of their own: both ends of a migration, which keep their memory warm from run to run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

#: Seconds for any one step.
PATIENCE = 300


def serve(make: Callable[..., Any], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """The process: calls methods of make(*arguments), by name, until it is told None."""
    side = make(*arguments)
    while (request := pipe.recv()) is not None:
        command, *values = request
        try:
            pipe.send((True, getattr(side, command)(*values)))
        except Exception as error:
            pipe.send((False, repr(error)))


class Remote:
    """The other end of serve(): remote("method", ...) calls it there and waits for what it returns."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(make, arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, command: str, *arguments: Any) -> Callable[[], Any]:
        """Call it, and come back; what this returns waits for the answer."""
        self._pipe.send((command, *arguments))
        return self._finish

    def _finish(self) -> Any:
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError("a side of the benchmark does not answer")
        fine, value = self._pipe.recv()
        if not fine:
            raise RuntimeError(value)
        return value

    def __call__(self, command: str, *arguments: Any) -> Any:
        return self.start(command, *arguments)()

    def stop(self) -> None:
        """End it, whatever it does."""
        try:
            self._pipe.send(None)
            self._process.join(10)
        except OSError:
            pass
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
