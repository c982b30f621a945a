from __future__ import annotations

import pytest

from tlsproxy.serve.control import Drain, NewTicketKeys, State, Status, decode_commands, encode_command
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
        assert Status.from_line(line) == status


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
        b"[" * 4000,
        b"\xff",
    ],
)
def test_what_no_worker_says_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it says
        Status.from_line(line)
