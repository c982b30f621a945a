"""`tlsproxy top`: the live status of a running proxy in a terminal, from its admin port's /live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import termios
import time
import tty
from collections.abc import AsyncIterator, Iterator

import h11

from tlsproxy.config import Address
from tlsproxy.errors import StartupError
from tlsproxy.top_screen import Document, Line, Screen

MAX_EVENT_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 5.0
_SILENCE_TIMEOUT_S = 10.0
_RECONNECT_S = 1.0

_BEGIN = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
_END = "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_BOLD, _RED, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"


class NotLiveError(Exception):
    """What answers is not tlsproxy's admin port."""


async def run(host: str, port: int, *, once: bool) -> None:
    """Show the status until `q` or Ctrl-C; with `once`, print it as it is over a second or two and return.

    Raises StartupError if there is nobody to ask.
    """
    screen = Screen()
    try:
        if once:
            async for document in _take(_documents(host, port), 2):
                screen.update(document)
            _print(screen.lines(*shutil.get_terminal_size((120, 50))))
            return
        with _terminal() as quitting:
            await _watch(host, port, screen, quitting)
    except (OSError, asyncio.TimeoutError, EOFError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no answer"
        raise StartupError(f"cannot reach the admin port at {host}:{port}: {reason}") from None
    except (LookupError, TypeError, ValueError):
        raise StartupError(
            f"expected tlsproxy's admin port at {host}:{port}; got the status of another version"
        ) from None
    except NotLiveError as error:
        raise StartupError(f"expected tlsproxy's admin port at {host}:{port}; {error}") from None


async def _watch(host: str, port: int, screen: Screen, quitting: asyncio.Event) -> None:
    """Show documents as they come, over restarts of the proxy."""
    quit_task = asyncio.create_task(quitting.wait())
    show_task = asyncio.create_task(_show_all(host, port, screen))
    await asyncio.wait({quit_task, show_task}, return_when=asyncio.FIRST_COMPLETED)
    for task in (quit_task, show_task):
        task.cancel()
    if not quitting.is_set():
        await show_task


async def _show_all(host: str, port: int, screen: Screen) -> None:
    shown = False
    while True:
        try:
            async for document in _documents(host, port):
                screen.update(document)
                _draw(screen, "")
                shown = True
        except (OSError, asyncio.TimeoutError, EOFError):
            if not shown:
                raise
        _draw(screen, "Reconnecting")
        await asyncio.sleep(_RECONNECT_S)


async def _take(documents: AsyncIterator[Document], count: int) -> AsyncIterator[Document]:
    async with contextlib.aclosing(documents) as items:  # type: ignore[type-var]
        async for document in items:
            yield document
            count -= 1
            if not count:
                return


async def _documents(host: str, port: int) -> AsyncIterator[Document]:
    """Yield what /live sends. Raises OSError, TimeoutError, EOFError at its end, NotLiveError."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_TIMEOUT_S)
    connection = h11.Connection(h11.CLIENT)
    streaming = False
    try:
        request = h11.Request(method="GET", target="/live", headers=[("Host", str(Address(host, port)))])
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        buffer = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await asyncio.wait_for(reader.read(65536), _SILENCE_TIMEOUT_S))
            elif isinstance(event, h11.Response):
                if event.status_code != 200:
                    raise NotLiveError(f"got status {event.status_code} for /live")
                streaming = True
            elif isinstance(event, h11.Data):
                buffer += event.data
                for document in _parse(buffer):
                    yield document
            else:
                raise EOFError
    except h11.RemoteProtocolError:
        if streaming:
            raise EOFError from None
        raise NotLiveError("got no HTTP response") from None
    finally:
        writer.close()


def _parse(buffer: bytearray) -> Iterator[Document]:
    """Take whole events (HTML Living Standard, section 9.2) from the start of `buffer`."""
    while (end := buffer.find(b"\n\n")) >= 0:
        event = bytes(buffer[:end])
        del buffer[: end + 2]
        if event.startswith(b"data: "):
            try:
                yield json.loads(event.removeprefix(b"data: "))
            except ValueError:
                raise NotLiveError("got an event that is not JSON") from None
    if len(buffer) > MAX_EVENT_BYTES:
        raise NotLiveError(f"got an event of more than {MAX_EVENT_BYTES} bytes")


def _draw(screen: Screen, notice: str) -> None:
    """Fill the terminal, over what is there."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    lines = screen.lines(width, height - 2)
    lines.insert(0, Line(f"{time.strftime('%H:%M:%S')}  {notice or 'q quits'}"[:width], bad=bool(notice)))
    text = "".join(f"{_styled(line)}{_CLEAR_LINE}\r\n" for line in lines)
    sys.stdout.write(_HOME + text + _CLEAR_BELOW)
    sys.stdout.flush()


def _styled(line: Line) -> str:
    style = _RED if line.bad else _BOLD if line.heading else ""
    return f"{style}{line.text}{_PLAIN}" if style else line.text


def _print(lines: list[Line]) -> None:
    sys.stdout.write("".join(f"{line.text.rstrip()}\n" for line in lines))


@contextlib.contextmanager
def _terminal() -> Iterator[asyncio.Event]:
    """Take the terminal over, and give it back as it was. The event is set when `q` is pressed."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise StartupError("top: expected a terminal; with --once it prints anywhere")
    quitting = asyncio.Event()
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()
    saved = termios.tcgetattr(stdin)

    def pressed() -> None:
        if os.read(stdin, 64) in (b"q", b"Q", b"\x04", b""):
            quitting.set()

    tty.setcbreak(stdin)
    loop.add_reader(stdin, pressed)
    sys.stdout.write(_BEGIN)
    try:
        yield quitting
    finally:
        loop.remove_reader(stdin)
        termios.tcsetattr(stdin, termios.TCSADRAIN, saved)
        sys.stdout.write(_END)
        sys.stdout.flush()
