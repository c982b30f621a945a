from __future__ import annotations

import pytest

from tlsproxy.http.chunks import chunk, last_chunk
from tlsproxy.http.syntax import Field


def field(line: bytes) -> Field:
    name, _, value = line.partition(b": ")
    return name.lower(), name, value


def test_a_chunk() -> None:
    assert b"".join(chunk(b"x" * 26)) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_the_end_of_a_body() -> None:
    assert last_chunk((), ()) == b"0\r\n\r\n"
    trailers = [field(b"Digest: x"), field(b"Server-Timing: y")]
    assert last_chunk(trailers, ()) == b"0\r\nDigest: x\r\nServer-Timing: y\r\n\r\n"


@pytest.mark.parametrize(
    "line", [b"Authorization: x", b"Set-Cookie: x", b"Content_Type: x", b"X-Forwarded-For: x", b"X_Forwarded-For: x"]
)
def test_what_would_be_wrong_in_a_header_that_it_is_merged_into(line: bytes) -> None:
    assert last_chunk([field(line), field(b"Digest: x")], {b"x-forwarded-for"}) == b"0\r\nDigest: x\r\n\r\n"
