"""The rules every HTTP/1.1 message head must keep before a parser sees it (RFC 9112 sections 2.2 and 5).

Two parsers that read one message differently are how requests are smuggled. The libraries that parse heads forgive some
of what is refused here (bare LF, folded lines, control characters), so these checks stand in front of them, for
requests and responses alike.
"""

from __future__ import annotations

import re

MAX_FIELDS = 100
"""Header fields in a message; each costs work however short it is."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_CONTROL = bytes(code for code in range(32) if code not in b"\t\r\n") + b"\x7f"
_FIELD_LINE = re.compile(TOKEN + rb":[^\r\n]*")


class MessageError(ValueError):
    """A message breaks a rule of HTTP. `rule` is a metric label: short, from the fixed set of this package."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def check_head(head: bytes) -> None:
    """Check the lines of a whole head, from its first byte to the empty line. Raises MessageError."""
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        raise MessageError("bare_cr_or_lf")
    if b"\r\n " in head or b"\r\n\t" in head:
        raise MessageError("folded_line")
    if len(head.translate(None, _CONTROL)) != len(head):
        raise MessageError("control_character")
    if lines > MAX_FIELDS + 2:
        raise MessageError("too_many_fields")


def check_partial_head(partial: bytes) -> None:
    """Check what has come of a head so far, so that one that can never end is refused at once. Raises MessageError."""
    lines = partial.count(b"\r\n")
    if partial.count(b"\n") != lines or partial.count(b"\r") - partial.endswith(b"\r") != lines:
        raise MessageError("bare_cr_or_lf")
    if lines > MAX_FIELDS + 1:
        raise MessageError("too_many_fields")


def check_trailers(section: bytes) -> None:
    """Check a trailer section, each line with its CRLF, without the empty line. Raises MessageError."""
    check_head(section)
    for line in section.split(b"\r\n")[:-1]:
        if _FIELD_LINE.fullmatch(line) is None:
            raise MessageError("bad_trailer")


def list_members(value: bytes) -> list[bytes]:
    """Split a comma-separated field value into its members, lower case, without the empty ones (RFC 9110 5.6.1)."""
    return [member for part in value.lower().split(b",") if (member := part.strip(b" \t"))]
