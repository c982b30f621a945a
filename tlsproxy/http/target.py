"""Request targets and Host (RFC 9112 section 3, RFC 9110 section 7.2).

The path that routes are matched against is percent-decoded, without dot segments and with single slashes, as the server
behind will most likely read it. The target itself is forwarded untouched, so what servers may read instead is told too.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from tlsproxy.http.syntax import MessageError

_HOST = re.compile(rb"(?:([0-9A-Za-z._-]{1,255})|(\[[0-9A-Fa-f:.]{2,45}\]))(?::[0-9]{1,5})?")
_ABSOLUTE = re.compile(rb"https?://([^/?]*)([/?].*)?", re.IGNORECASE)
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})|%00")
_SLASHES = re.compile(rb"//+")
_PARAMETERS = re.compile(rb";[^/]*")


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
    return _without_dot_segments(path)


def other_readings(target: bytes) -> tuple[bytes, ...]:
    """Return the paths that servers may read in a target for which there is a routing_path; mostly there are no others.

    Some servers keep dot segments, some remove them before they decode, some take a backslash for a slash, and servlet
    containers remove parameters (`;v=1`) first. Raises MessageError if one of these climbs above the root.
    """
    path = target.partition(b"?")[0]
    decoded = unquote_to_bytes(path) if b"%" in path else path
    if b"/." not in decoded and b"\\" not in decoded and b";" not in path:
        return ()
    return (
        _SLASHES.sub(b"/", decoded),
        unquote_to_bytes(_without_dot_segments(path)),
        _without_dot_segments(decoded.replace(b"\\", b"/")),
        _without_dot_segments(unquote_to_bytes(_PARAMETERS.sub(b"", path))),
    )


def _without_dot_segments(path: bytes) -> bytes:
    """Return a path without `.` and `..`, and with single slashes. Raises MessageError if it climbs above the root."""
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
