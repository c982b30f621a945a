"""Request targets and Host (RFC 9112 section 3, RFC 9110 section 7.2), read one way only.

The path that routes are matched against is percent-decoded, without dot segments and with single slashes, as the server
behind will most likely read it; the target itself is forwarded untouched.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from tlsproxy.http.syntax import MessageError

_HOST = re.compile(rb"(?:([0-9A-Za-z._-]{1,255})|(\[[0-9A-Fa-f:.]{2,45}\]))(?::[0-9]{1,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?]*)([/?].*)?", re.IGNORECASE)
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})|%00")


def host_name(host: bytes) -> str:
    """Return the name in a Host value for routing: lower case, no port, no final dot. Raises MessageError."""
    match = _HOST.fullmatch(host)
    if match is None:
        raise MessageError("bad_host")
    return match[match.lastindex or 1].decode("ascii").lower().rstrip(".")


def origin_form(method: bytes, target: bytes, host: bytes) -> bytes:
    """Return the target as it is sent on: `/path?query`, or `*` for OPTIONS.

    An absolute-form target must name the same authority as Host. Raises MessageError.
    """
    if target[:1] == b"/":
        if b"#" in target:
            raise MessageError("bad_target")
        return target
    if target == b"*" and method == b"OPTIONS":
        return target
    match = _ABSOLUTE.fullmatch(target)
    if match is None or b"#" in target:
        raise MessageError("bad_target")
    if match[1].lower() != host.lower():
        raise MessageError("host_mismatch")
    rest = match[2] or b"/"
    return rest if rest[:1] == b"/" else b"/" + rest


def routing_path(target: bytes) -> bytes:
    """Return the normalised path of a target (`*` counts as `/`). Raises MessageError if it climbs above the root."""
    if target == b"*":
        return b"/"
    path = target.partition(b"?")[0]
    if b"\\" in path:
        # No URI has one (RFC 3986), and some servers take it for a slash.
        raise MessageError("bad_target")
    if b"%" in path:
        if _BAD_ESCAPE.search(path) is not None:
            raise MessageError("bad_target")
        path = unquote_to_bytes(path)
    if b"/." not in path and b"//" not in path:
        return path
    segments: list[bytes] = []
    parts = path.split(b"/")[1:]
    for part in parts:
        if part == b"..":
            if not segments:
                raise MessageError("bad_target")
            segments.pop()
        elif part not in (b"", b"."):
            segments.append(part)
    ends_in_directory = parts[-1] in (b"", b".", b"..") and segments
    return b"/" + b"/".join(segments) + (b"/" if ends_in_directory else b"")
