"""The rules that every HTTP/1.1 message head must keep (RFC 9112 sections 2.2 and 5).

Two parsers that read one message differently are how requests are smuggled. Parsers in use forgive one another much
(bare LF, folded lines, control characters, space before a colon); here nothing is forgiven, in requests and responses
alike, and what is accepted is written anew for the next hop.
"""

from __future__ import annotations

import re

MAX_FIELDS = 100
"""Header fields in a message; each costs work however short it is."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_CONTROL = bytes(code for code in range(32) if code not in b"\t\r\n") + b"\x7f"
_BAD_LINE = re.compile(rb"\n(?!" + TOKEN + rb":|\r\n|\Z)")
_FIELD_LINE = re.compile(rb"^(" + TOKEN + rb"):([^\r]*)\r$", re.MULTILINE)
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")

PLAIN_NAME = b"-0123456789abcdefghijklmnopqrstuvwxyz"
"""What the names of fields that go on are made of, in lower case.

CGI and its heirs turn other characters into the same underscore as a hyphen, and give some names with an underscore a
meaning of their own: X_Forwarded_For and X.Forwarded.For are read as X-Forwarded-For, and SCRIPT_NAME says for gunicorn
which part of the path is to be left out.
"""

Field = tuple[bytes, bytes, bytes]
"""A header or trailer field: its name in lower case, its name as received, its value."""


class MessageError(ValueError):
    """A message breaks a rule of HTTP. `rule` is a metric label: short, from the fixed set of this package."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def check_head(head: bytes) -> int:
    """Check the lines of a whole head, from its first byte to the empty line; return their number.

    Raises MessageError. What the first line says is left to who reads it.
    """
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        raise MessageError("bare_cr_or_lf")
    if lines > MAX_FIELDS + 2:
        raise MessageError("too_many_fields")
    # Before h11, whose expression for a field takes quadratic time for spaces that one of these follows.
    if len(head.translate(None, _CONTROL)) != len(head):
        raise MessageError("control_character")
    bad_line = _BAD_LINE.search(head)
    if bad_line is not None:
        raise MessageError("folded_line" if head[bad_line.end()] in b" \t" else "bad_field")
    return lines


def check_partial_head(partial: bytes) -> None:
    """Check what has come of a head so far, so that one that can never end is refused at once. Raises MessageError."""
    lines = partial.count(b"\r\n")
    if partial.count(b"\n") != lines or partial.count(b"\r") - partial.endswith(b"\r") != lines:
        raise MessageError("bare_cr_or_lf")
    if lines > MAX_FIELDS + 1:
        raise MessageError("too_many_fields")


def fields_of(checked: bytes, start: int) -> list[Field]:
    """Return the fields of a checked head, from `start`, where a line begins, to the empty line.

    Raises MessageError for a line that is no field.
    """
    found = _FIELD_LINE.findall(checked, start)
    if len(found) != checked.count(b"\r\n", start) - 1:
        raise MessageError("bad_field")
    return [(name.lower(), name, value.strip(b" \t")) for name, value in found]


def content_length_of(value: bytes, before: int | None) -> int:
    """Return what a Content-Length field says; `before` is what one before it said. Raises MessageError.

    Two of them are two readings, even if they are equal (RFC 9112 section 6.3 allows to refuse them).
    """
    if before is not None or b"," in value:
        raise MessageError("ambiguous_length")
    if _CONTENT_LENGTH.fullmatch(value) is None:
        raise MessageError("bad_content_length")
    return int(value)


def list_members(value: bytes) -> list[bytes]:
    """Split a comma-separated field value into its members, lower case, without the empty ones (RFC 9110 5.6.1)."""
    return [member for part in value.lower().split(b",") if (member := part.strip(b" \t"))]
