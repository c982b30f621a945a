from __future__ import annotations

import pytest

from tests.unit.serve.test_anatomy import HANDSHAKE
from tlsproxy.serve.control import (
    MAX_STATUS_BYTES,
    Drain,
    NewTicketKeys,
    State,
    Status,
    decode_commands,
    encode_command,
    parse_line,
    slow_handshake_line,
)
from tlsproxy.tls.context import TicketKey


def test_commands_arrive_whole_and_in_order_however_they_are_cut() -> None:
    commands = [NewTicketKeys((TicketKey.generate(),)), Drain(2.5)]
    stream = b"".join(map(encode_command, commands))
    buffer = bytearray()
    received = []
    for index in range(len(stream)):
        buffer += stream[index : index + 1]
        received += decode_commands(buffer)
    assert received == commands
    assert not buffer


def test_a_status_survives_the_line() -> None:
    for status in (Status(State.READY), Status(State.FAILED, 'no "port"\nx')):
        line = status.to_line()
        assert line.count(b"\n") == 1
        assert parse_line(line) == status


def test_a_slow_handshake_survives_the_line() -> None:
    line = slow_handshake_line(HANDSHAKE)
    assert line.count(b"\n") == 1
    assert len(line) < MAX_STATUS_BYTES
    assert parse_line(line) == HANDSHAKE


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"ready",
        b"[]",
        b"{}",
        b'{"state": "ready"}',
        b'{"state": "king", "error": ""}',
        b'{"state": "ready", "error": 1}',
        b'{"state": ["ready"], "error": ""}',
        b'{"slow_handshake": {}}',
        b'{"slow_handshake": null}',
        b"[" * 4000,
        b"\xff",
    ],
)
def test_what_no_worker_says_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
        parse_line(line)
