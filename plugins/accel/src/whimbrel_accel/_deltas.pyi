from typing import Any

# Why a delta cannot be decoded, by the number that patch() gives.
REASONS: tuple[str, ...]

# Deltas of pages, one behind the other.
#
# old, new: buffers of as many whole pages. out: a writable buffer at least as long. lengths: a writable buffer of an int64 a
# page, the bytes of its delta: 0 where nothing changed, page_size where the delta would be no shorter than the page, and
# then it is left out. Returns the bytes in out. Raises ValueError for buffers that do not fit each other.
def encode(old: Any, new: Any, page_size: int, out: Any, lengths: Any) -> int: ...

# Apply deltas to the pages of a memory.
#
# starts, lengths, where: buffers of int64: delta i is lengths[i] bytes of data from starts[i] on, for the page at byte
# where[i] of memory, which is writable. All are looked at before anything is written. Returns None, or the index of one that
# cannot be decoded and the number of the reason. Raises ValueError for what lies outside of data or memory.
def patch(
    data: Any, starts: Any, lengths: Any, where: Any, page_size: int, memory: Any
) -> tuple[int, int] | None: ...
