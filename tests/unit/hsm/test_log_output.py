"""A log's reader that is slow, stuck or gone never stops a process."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from hsm import log_output
from hsm.log_output import LineOutput

LINE = b"x" * 999 + b"\n"


@pytest.fixture(params=["pipe", "pipe of another user", "socket"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """The reader's and the writer's end; the writer's blocks."""
    if request.param == "socket":
        reader, writer = (end.detach() for end in socket.socketpair())
    else:
        reader, writer = os.pipe()
    if request.param == "pipe of another user":

        def refuse(path: str, flags: int) -> int:
            raise PermissionError

        monkeypatch.setattr(log_output.os, "open", refuse)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_lines_that_do_not_fit_are_dropped_and_counted_and_the_others_are_whole(ends: tuple[int, int]) -> None:
    reader, writer = ends
    output = LineOutput(writer)
    taken = 0
    while output.write(LINE):
        taken += 1
    assert not output.write(LINE)
    assert output.dropped == 2
    received = os.read(reader, 1 << 20)
    assert output.write(b"later\n")
    while not received.endswith(b"later\n"):
        received += os.read(reader, 1 << 20)
    assert received == LINE * taken + b"later\n"
    output.close()
    assert fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK == 0


def test_a_reader_that_is_gone_costs_the_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = LineOutput(writer)
    assert not output.write(LINE)
    output.close()
    os.close(writer)


def test_a_file_takes_everything(tmp_path: os.PathLike[str]) -> None:
    with open(os.path.join(tmp_path, "log"), "w+b", buffering=0) as file:
        assert LineOutput(file.fileno()).write(LINE)
        file.seek(0)
        assert file.read() == LINE
