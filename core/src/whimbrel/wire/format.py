"""The numbers of the QEMU migration stream, version 3. All integers on the wire are big-endian."""

from __future__ import annotations

import enum

import attrs

MAGIC = 0x5145564D  # "QEVM"
VERSION = 3
#: What begins a zstd frame (RFC 8878), read as ours: a source behind a filter that compresses, and nobody who unpacks.
MAGIC_ZSTD = 0x28B52FFD

#: Bounds that we put on lengths before anything is allocated. The format itself allows 4 GiB.
MAX_MACHINE_NAME = 256
MAX_VMDESCRIPTION = 64 << 20
MAX_CAPABILITIES = 1024
MAX_RP_DATA = 512


class ItemType(enum.IntEnum):
    """The byte that begins an item of the stream."""

    EOF = 0x00
    SECTION_START = 0x01
    SECTION_PART = 0x02
    SECTION_END = 0x03
    SECTION_FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Command(enum.IntEnum):
    """Commands of the source to the destination."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


#: Length of the data of each command that has a fixed one.
COMMAND_LENGTH = {
    Command.OPEN_RETURN_PATH: 0,
    Command.PING: 4,
    Command.POSTCOPY_LISTEN: 0,
    Command.POSTCOPY_RUN: 0,
    Command.PACKAGED: 4,
    Command.ENABLE_COLO: 0,
    Command.POSTCOPY_RESUME: 0,
    Command.SWITCHOVER_START: 0,
}


class Answer(enum.IntEnum):
    """Messages on the return path, destination to source."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


#: Value of the PING that opens the return path, as QEMU sends it.
PING_OPEN = 1
#: Our PING before the end of the stream has this bit set; the rest is the machine's generation, 31 bits.
PING_COMMIT = 0x8000_0000
#: A PONG that nobody asked for, with this value ("rely"): a relay stands between the two machines, so that the end of
#: the channel says nothing about the process at the far end. QEMU ignores it.
PONG_RELAY = 0x7265_6C79


class GlobalStateForm(enum.Enum):
    """When and how the section globalstate is sent."""

    NEVER = "never"
    ODD = "odd"  # only of a machine that was neither running nor paused
    ALWAYS = "always"
    SPLIT = "split"  # always; 32 bytes of run state, then two flags, where older ones have 100 bytes of run state


@attrs.frozen(kw_only=True)
class Dialect:
    """What both sides must know of the stream's form beforehand: nothing in the stream announces it. See
    whimbrel.wire.dialects for who speaks which.
    """

    configuration: bool = True
    footers: bool = True
    vmdescription: bool = True
    #: The vmdescription tells of the configuration section, too.
    described_configuration: bool = False
    globalstate: GlobalStateForm = GlobalStateForm.ALWAYS
    #: A command SWITCHOVER_START goes before the first SECTION_END.
    switchover_start: bool = False
    #: With multifd, a record of its own (0x200) and not each end of a section says that the channels are to be flushed.
    multifd_flush: bool = False
