"""One pass over an object: where it writes to or reads from, and the path of the field that it is at, for messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from whimbrel.errors import EndOfStream, LocalError, MigrationError, StreamError
from whimbrel.stream import InStream

#: Bounds on counts that come from the stream, unless a field says otherwise.
MAX_ELEMENTS = 1 << 16
MAX_BYTES = 16 << 20
#: Structs within structs. A layout can refer to itself (a tree of lists), so the stream decides how deep it gets.
MAX_NESTING = 64


class _Run:
    _error: type[MigrationError]
    _done: str
    #: Where the field begins that is being read; unknown while writing.
    offset: int | None = None

    def __init__(self, section: str) -> None:
        self.section = section
        self._path: list[str] = []

    @property
    def path(self) -> str:
        return "".join(self._path).lstrip(".")

    def _subject(self) -> str:
        return f"field {self.path}" if self._path else "the section"

    @contextlib.contextmanager
    def at(self, step: str) -> Iterator[None]:
        """Within a step of the path: '.field', '[3]', or '/subsection'. The path of an error stays."""
        if len(self._path) > 2 * MAX_NESTING:
            raise self.fail("nested too deep", expected=f"at most {MAX_NESTING} levels")
        self._path.append(step)
        yield
        self._path.pop()  # only after success: the path tells where a failure was

    def fail(
        self,
        message: str,
        *,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> MigrationError:
        """The error to raise for the field that this pass is at."""
        return self._error(
            f"{self._subject()} cannot be {self._done}: {message}",
            section=self.section,
            offset=self.offset,
            expected=expected,
            found=found,
            hint=hint,
        )

    def number(self, source: int | str, owner: object, limit: int) -> int:
        """A count or size: fixed, or the value of an earlier field."""
        if isinstance(source, int):
            return source
        value = getattr(owner, source)
        if not isinstance(value, int) or not 0 <= value <= limit:
            raise self.fail(
                f"{source} is not a possible count", expected=f"0 to {limit}", found=repr(value)
            )
        return value

    def call(self, what: str, function: Callable[..., Any], *args: object) -> Any:
        """Call what the embedder gave: its failure is a failure of this field."""
        try:
            return function(*args)
        except MigrationError as error:
            error.at(section=self.section)
            raise
        except Exception as error:
            raise self.fail(f"{what}: {error or type(error).__name__}") from error


class SaveRun(_Run):
    """Writing: `out` collects the payload."""

    _error = LocalError
    _done = "saved"

    def __init__(self, section: str) -> None:
        super().__init__(section)
        self.out = bytearray()
        self._ended_at = 0
        self._ended: list[str] = []

    def ended(self, name: str) -> None:
        """A struct or subsection of that vmsd_name ends here."""
        if self._ended_at != len(self.out):
            self._ended.clear()
            self._ended_at = len(self.out)
        self._ended.append(name)

    def check_subsection(self, name: str) -> None:
        """What ended just here would take a subsection whose name begins with its own for one that it does not know."""
        if self._ended_at != len(self.out):
            return
        for taker in self._ended:
            if name.startswith(taker) and name != taker:
                raise self.fail(
                    f"subsection '{name}' right behind '{taker}' would be taken for one of the latter",
                    hint="Put a field between them, or give one of the two another name",
                )


class LoadRun(_Run):
    """Reading: nothing is assigned before the payload was read whole."""

    _error = StreamError
    _done = "loaded"

    def __init__(self, section: str, inp: InStream) -> None:
        super().__init__(section)
        self.inp = inp
        self.offset = inp.position
        self.begun: list[Any] = []
        self.finished: list[Any] = []
        self.undo: list[Callable[[], object]] = []

    def read(self, n: int) -> bytes:
        """The next n bytes. Raises EndOfStream, naming the field."""
        self.offset = self.inp.position
        with self._end_named():
            return self.inp.read(n)

    def peek(self, n: int) -> bytes:
        """The next n bytes, which stay there. Raises EndOfStream, naming the field."""
        with self._end_named():
            return bytes(self.inp.buffered(n)[:n])

    @contextlib.contextmanager
    def _end_named(self) -> Iterator[None]:
        try:
            yield
        except EndOfStream as error:
            raise EndOfStream(
                f"the stream ended in {self._subject()}",
                section=self.section,
                offset=error.offset,
                expected=error.expected,
            ) from error
