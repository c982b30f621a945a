from __future__ import annotations

import pytest

from perf.request_load import ResponseReader

RESPONSE = b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 5\r\n\r\nhello"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_response_is_complete_at_its_last_byte_however_it_arrives(size):
    reader = ResponseReader()
    for _ in range(2):
        pieces = [RESPONSE[at : at + size] for at in range(0, len(RESPONSE), size)]
        assert [reader.feed(memoryview(piece)) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert reader.body_bytes == 5


def test_an_empty_body_is_complete_with_its_head():
    assert ResponseReader().feed(memoryview(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))


@pytest.mark.parametrize(
    ("received", "message"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "502"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "without Content-Length"),
        (RESPONSE + b"H", "more than one response"),
        (b"x" * 70000, "no end"),
    ],
)
def test_anything_else_is_an_error(received, message):
    with pytest.raises(ConnectionError, match=message):
        ResponseReader().feed(memoryview(received))
