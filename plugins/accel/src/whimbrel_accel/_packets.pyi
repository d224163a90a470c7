from typing import Any

# Send packets of pages as they are, as many as it takes, numbered from `number` on, without the GIL.
#
# fd: a socket that blocks. idstr: as on the wire, at most 255 bytes. memory: the block. pages: a buffer of int64, page numbers.
# Returns the bytes of the packets. Raises OSError, and ValueError for a page that is not in memory.
def send(fd: int, idstr: Any, memory: Any, pages: Any, page_size: int, number: int) -> int: ...

# Put packets in place, from the one on whose header is in head, without the GIL, for some 20 ms or until one comes that is
# anything but pages as they are of this block. Each is received together with the next header, since pages without a sync
# are not the end.
#
# fd: a socket. head: a writable buffer as long as a header. memory: the block, writable. fresh: a writable buffer of a byte a
# page, 0 for those that were put in place. Returns how many pages were, the bytes received, and how many were still missing
# when the connection ended: 0, and head is that of the next packet; as many as it has, and it ended behind a packet; more, and
# a packet was cut. Raises OSError, and ValueError for buffers that do not fit each other.
def receive(
    fd: int, head: Any, idstr: Any, memory: Any, fresh: Any, page_size: int
) -> tuple[int, int, int]: ...
