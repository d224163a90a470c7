from typing import Any

# Page records with CONTINUE, one behind the other.
#
# out: a writable buffer of 8 + page_size bytes a page at least. memory: the block. pages: a buffer of int64, page numbers.
# Returns the bytes in out. Raises ValueError for a page that is not in memory, and for buffers that do not fit each other.
def gather(out: Any, memory: Any, pages: Any, page_size: int) -> int: ...

# Send the same records from where the pages are, without the GIL.
#
# fd: a socket. Returns the bytes of the records. Raises OSError, and ValueError for a page that is not in memory.
def send(fd: int, memory: Any, pages: Any, page_size: int) -> int: ...

# Which pages are zero, without the GIL.
#
# out: a writable buffer of a byte a page, 1 for those that are. Raises ValueError for a page that is not in memory, and for
# buffers that do not fit each other.
def zero(memory: Any, pages: Any, page_size: int, out: Any) -> None: ...

# Take the records at the front of data: whole ones, with CONTINUE, of pages within memory, that are PAGE, or ZERO with a fill
# of 0. What comes behind them is the caller's.
#
# memory: the block, writable. fresh: a writable buffer of a byte a page, 1 for those that are known to be zero and are not
# looked at; a page that was put in place is no longer. Returns the bytes taken, and how many pages of either kind that was.
# Raises ValueError for buffers that do not fit each other.
def take(data: Any, memory: Any, fresh: Any, page_size: int) -> tuple[int, int, int]: ...

# Take such records from a buffer, and receive more into it, without the GIL, for some 20 ms or until another kind of record
# comes, or the end.
#
# fd: a socket. buffer: writable, with room for two records at least; what was received and not taken lies in it from start to
# end. memory, fresh: see take(). Returns where start and end are then, the bytes taken, and how many pages of either kind that
# was. Raises OSError, and ValueError for buffers that do not fit each other.
def receive(
    fd: int, buffer: Any, start: int, end: int, memory: Any, fresh: Any, page_size: int
) -> tuple[int, int, int, int, int]: ...
