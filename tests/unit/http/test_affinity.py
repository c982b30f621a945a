from __future__ import annotations

import pytest

from tlsproxy.config import HashConfig, HashSource
from tlsproxy.http.affinity import hash_key
from tlsproxy.http.codec import RequestReader


@pytest.mark.parametrize(
    ("source", "name", "fields", "key"),
    [
        (HashSource.CLIENT_ADDRESS, "", b"X-User: a\r\n", b"192.0.2.1"),
        (HashSource.HEADER, "X-User", b"x-user: ann\r\nX-User: bob\r\n", b"ann"),
        (HashSource.HEADER, "X-User", b"", b"192.0.2.1"),
        (HashSource.HEADER, "X-User", b"X-User:\r\n", b"192.0.2.1"),
        (HashSource.COOKIE, "sid", b"Cookie: asid=1; sid=a=b; sid=2\r\n", b"a=b"),
        (HashSource.COOKIE, "sid", b"Cookie: x=1\r\nCookie: sid=2\r\n", b"2"),
        (HashSource.COOKIE, "sid", b"Cookie: SID=2; sid\r\n", b"192.0.2.1"),
    ],
)
def test_what_is_hashed(source: HashSource, name: str, fields: bytes, key: bytes) -> None:
    reader = RequestReader(65536)
    reader.receive(b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
    request = reader.read_head()
    assert request is not None
    assert hash_key(request, HashConfig(source, name), "192.0.2.1") == key
