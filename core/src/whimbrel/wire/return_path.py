"""Messages that the destination sends back: u16 type, u16 length, data."""

from __future__ import annotations

import struct

from whimbrel.errors import StreamError
from whimbrel.wire.format import MAX_RP_DATA, Answer
from whimbrel.wire.items import Reader

_HEAD = struct.Struct(">HH")
_LENGTH = {Answer.SHUT: 4, Answer.PONG: 4, Answer.SWITCHOVER_ACK: 0, Answer.RESUME_ACK: 4}


def encode_answer(answer: Answer, data: bytes = b"") -> bytes:
    return _HEAD.pack(answer, len(data)) + data


def encode_shut(status: int) -> bytes:
    """The last message: status 0 says that the destination has taken over."""
    return encode_answer(Answer.SHUT, struct.pack(">I", status))


def encode_pong(value: int) -> bytes:
    return encode_answer(Answer.PONG, struct.pack(">I", value))


def read_answer(reader: Reader) -> tuple[Answer, bytes]:
    """The next message. Raises StreamError for a type or length that is not in the protocol, EndOfStream at the end."""
    offset = reader.position
    number, length = _HEAD.unpack(reader.read(4))
    try:
        answer = Answer(number)
    except ValueError:
        raise StreamError(
            "unknown message on the return path",
            offset=offset,
            expected="1 to 7",
            found=number,
            hint="Look what listens there: it does not speak as the destination of a migration",
        ) from None
    fixed = _LENGTH.get(answer)
    if length > MAX_RP_DATA or (fixed is not None and length != fixed):
        raise StreamError(
            f"bad length of {answer.name} on the return path",
            offset=offset,
            expected=fixed if fixed is not None else f"at most {MAX_RP_DATA}",
            found=length,
        )
    return answer, reader.read(length)
