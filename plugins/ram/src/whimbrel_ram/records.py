"""The records of the ram section (QEMU, ram version 4): kinds, flags, and who would understand those that this plugin does not.

Each record starts with a big-endian u64, the page's byte offset in its block | flags.
    ZERO      W [u8 n, n bytes idstr] u8 fill        every byte of the page is `fill` (writers send 0)
    PAGE      W [u8 n, n bytes idstr] page           its bytes
    XBZRLE    W [u8 n, n bytes idstr] delta          what changed in them (whimbrel_ram.xbzrle)
    EOS       W                                      the payload of this section item ends
CONTINUE in the flags: the block is that of the record before (also across EOS), and there is no idstr. Exactly one kind
of record a word. A page may come any number of times; the last one wins.
"""

from __future__ import annotations

import enum
import struct

U64 = struct.Struct(">Q")


class PageFlag(enum.IntFlag):
    """The flags in the low bits of a record's first word."""

    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


# Plain numbers for the loops.
ZERO, PAGE, EOS, CONTINUE, XBZRLE = 0x02, 0x08, 0x10, 0x20, 0x40
KINDS = frozenset(flag.value for flag in PageFlag) - {CONTINUE}
EOS_RECORD = U64.pack(EOS)
MULTIFD_FLUSH_RECORD = U64.pack(PageFlag.MULTIFD_FLUSH)

#: Who would understand a record that this codec does not.
NEEDS = {
    PageFlag.COMPRESS_PAGE: "the capability compress of QEMU 2.4 to 9.0, which this receiver does not have",
    PageFlag.HOOK: "the page transport of the rdma plugin",
    PageFlag.MULTIFD_FLUSH: "the page transport of multifd (capability multifd on both sides)",
}
