"""Where a message's body ends (RFC 9112 sections 6 and 7): by length, by chunks, or by the end of the connection.

A body with a length is counted, not parsed: its bytes pass through without a copy. Each decoder is fed everything that
is there and gives back what belongs to the body and what follows it.
"""

from __future__ import annotations

import re

from tlsproxy.http.syntax import TOKEN, Field, MessageError, check_head, fields_of

MAX_CHUNK_LINE_BYTES = 256
"""A chunk's size and extensions. Extensions mean nothing here and are dropped."""
MAX_TRAILER_BYTES = 8192
MAX_CHUNKS_PER_CALL = 512
"""Decoding stops after so many, about a millisecond's work: chunks of one byte must not hold up other connections."""

_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*" + TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + _QUOTED + rb"))?"
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:" + _EXTENSION + rb")*")


class LengthBody:
    """A body of `Content-Length` bytes."""

    __slots__ = ("remaining",)
    has_more = False
    trailers: list[Field] = []

    def __init__(self, length: int) -> None:
        self.remaining = length

    @property
    def complete(self) -> bool:
        """All of it has been decoded."""
        return self.remaining == 0

    def decode(self, received: bytes) -> tuple[bytes, bytes]:
        """Return (bytes of the body, what follows them)."""
        if len(received) <= self.remaining:
            self.remaining -= len(received)
            return received, b""
        end = self.remaining
        self.remaining = 0
        return received[:end], received[end:]

    def end_of_input(self) -> None:
        """Say that no more will come. Raises MessageError: the body is cut short."""
        raise MessageError("truncated_body")


class ChunkedBody:
    """A chunked body (RFC 9112 section 7.1)."""

    __slots__ = ("_in_chunk", "_in_trailers", "_needs_crlf", "complete", "has_more", "trailers")

    def __init__(self) -> None:
        self._in_chunk = 0
        self._needs_crlf = False
        self._in_trailers = False
        self.complete = False
        self.has_more = False
        """The last call has stopped at its limit: there may be more to decode."""
        self.trailers: list[Field] = []

    def decode(self, received: bytes) -> tuple[bytes, bytes]:
        """Return (bytes of the body, what is not decoded yet or follows the body). Raises MessageError."""
        pieces: list[bytes] = []
        position = 0
        self.has_more = False
        while not self._in_trailers:
            if self._in_chunk:
                piece = received[position : position + self._in_chunk]
                pieces.append(piece)
                position += len(piece)
                self._in_chunk -= len(piece)
                if self._in_chunk:
                    break
                self._needs_crlf = True
            if self._needs_crlf:
                end_of_chunk = received[position : position + 2]
                if not b"\r\n".startswith(end_of_chunk):
                    raise MessageError("bad_chunk")
                if len(end_of_chunk) < 2:
                    break
                position += 2
                self._needs_crlf = False
            next_position = self._start_chunk(received, position)
            if next_position < 0:
                break
            position = next_position
            if len(pieces) == MAX_CHUNKS_PER_CALL:
                self.has_more = True
                break
        rest = received[position:]
        if self._in_trailers and not self.has_more:
            rest = self._end(rest)
        return b"".join(pieces) if len(pieces) != 1 else pieces[0], rest

    def _start_chunk(self, received: bytes, position: int) -> int:
        """Read a chunk's first line; return where its data starts, or -1 while the line is incomplete."""
        end = received.find(b"\n", position, position + MAX_CHUNK_LINE_BYTES)
        if end < 0:
            if len(received) - position >= MAX_CHUNK_LINE_BYTES:
                raise MessageError("bad_chunk")
            return -1
        match = _CHUNK_LINE.fullmatch(received, position, end - 1)
        if match is None or received[end - 1] != 0x0D:
            raise MessageError("bad_chunk")
        self._in_chunk = int(match[1], 16)
        self._in_trailers = self._in_chunk == 0
        return end + 1

    def _end(self, rest: bytes) -> bytes:
        """Read the trailer section; return what follows the body."""
        if rest.startswith(b"\r\n"):
            self.complete = True
            return rest[2:]
        end = rest.find(b"\r\n\r\n", 0, MAX_TRAILER_BYTES)
        if end < 0:
            if len(rest) >= MAX_TRAILER_BYTES:
                raise MessageError("trailers_too_large")
            if rest.startswith(b"\n"):
                raise MessageError("bare_cr_or_lf")
            return rest
        section = rest[: end + 4]
        check_head(section)
        self.trailers = fields_of(section, 0)
        self.complete = True
        return rest[end + 4 :]

    def end_of_input(self) -> None:
        """Say that no more will come. Raises MessageError: the body is cut short."""
        raise MessageError("truncated_body")


class UntilCloseBody:
    """A response body that ends with its connection (RFC 9112 section 6.3, rule 8)."""

    __slots__ = ("complete",)
    has_more = False
    trailers: list[Field] = []

    def __init__(self) -> None:
        self.complete = False

    def decode(self, received: bytes) -> tuple[bytes, bytes]:
        """Return (bytes of the body, nothing)."""
        return received, b""

    def end_of_input(self) -> None:
        """Say that no more will come: that is the body's end."""
        self.complete = True


Body = LengthBody | ChunkedBody | UntilCloseBody
