"""Log lines on stderr, JSON or text, one event a line whatever is in it.

A call names its event and passes its data as `extra`: `logger.info("handshake failed", extra={"reason": ...})`. What
happens thousands of times a second has an EventLog instead, which costs a third and writes a sample when it is busy.
Control characters, wherever they come from, are escaped, so no peer can forge a line. Nothing ever waits for whoever
reads the log: lines that do not fit are counted and dropped.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from time import monotonic, time
from typing import Any, Final, Literal, Protocol

from hsm.log_output import LineOutput

_STANDARD_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_PLAIN_TEXT: Final = re.compile(r"[!#-<>-\[\]-~]+")
"""Printable ASCII without space, quote, backslash and `=`: shown as it is in the text format."""
MAX_FIELD_CHARACTERS: Final = 2048


LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]


def configure(level: LogLevel, line_format: LogFormat, process: str, *, sample_above: int = 0) -> None:
    """Send every logger of this process to stderr; `process` names it in each line.

    Above `sample_above` events a second an EventLog writes a sample; 0: it writes all.
    """
    handler = StderrHandler(JsonFormatter(process) if line_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    for previous in root.handlers:
        previous.close()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.raiseExceptions = False
    EventLog.handler = handler
    EventLog.sample_above = sample_above


class LineFormatter(Protocol):
    """What makes a line of an event and its fields. None is no value: the field is left out."""

    def line(self, created_s: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
        """Return the line without its newline, ASCII only; `created_s` is in seconds since the epoch."""


class StderrHandler(logging.Handler):
    """Writes each line with one system call, so that lines of several processes don't mix."""

    def __init__(self, formatter: LineFormatter) -> None:
        super().__init__()
        self._formatter = formatter
        self._output = LineOutput(sys.stderr.fileno())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            event = record.getMessage()[:MAX_FIELD_CHARACTERS]
            self.write(record.created, record.levelname.lower(), event, _fields(record))
        except ValueError:
            self.handleError(record)

    def close(self) -> None:
        """Write no more."""
        self._output.close()
        super().close()

    def write(self, created_s: float, level: str, event: str, fields: Mapping[str, Any]) -> None:
        """Write one line, and before it how many were lost, if any."""
        output = self._output
        if output.dropped:
            lost, output.dropped = output.dropped, 0
            if not self._put(self._formatter.line(created_s, "warning", "log lines dropped", {"count": lost})):
                output.dropped += lost
        self._put(self._formatter.line(created_s, level, event, fields))

    def _put(self, line: str) -> bool:
        return self._output.write(line.encode("ascii", "backslashreplace") + b"\n")


class JsonFormatter:
    """`{"time": ..., "level": ..., "process": ..., "event": ..., ...}`."""

    def __init__(self, process: str) -> None:
        self._process = encode_basestring_ascii(process)
        self._clock = _Clock()
        self._encode_other = json.JSONEncoder(default=str).encode

    def line(self, created_s: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
        """Return the line without its newline."""
        quote = encode_basestring_ascii
        head = f'{{"time": "{self._clock.text(created_s)}", "level": "{level}", "process": {self._process}'
        parts = [head, f'"event": {quote(event)}']
        for key, value in fields.items():
            kind = type(value)
            if kind is str:
                parts.append(f"{quote(key)}: {quote(value[:MAX_FIELD_CHARACTERS])}")
            elif kind is int:
                parts.append(f"{quote(key)}: {value}")
            elif value is not None:
                parts.append(f"{quote(key)}: {self._encode_other(value)}")
        return ", ".join(parts) + "}"


class TextFormatter:
    """`TIME LEVEL PROCESS event key=value key="a value"`."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._clock = _Clock()

    def line(self, created_s: float, level: str, event: str, fields: Mapping[str, Any]) -> str:
        """Return the line without its newline."""
        words = [self._clock.text(created_s), level, self._process, encode_basestring_ascii(event)[1:-1]]
        words += [f"{_text(key)}={_text(value)}" for key, value in fields.items() if value is not None]
        return " ".join(words)


class EventLog:
    """One kind of event, at level info, that may happen thousands of times a second.

    Where there were more than `sample_above` of them in the last second, every n-th is written, and its `sample` is n:
    so many events the line stands for.
    """

    handler: StderrHandler | None = None
    sample_above = 0

    def __init__(self, logger: str, event: str) -> None:
        """`logger` is the name of a logger, whose level counts."""
        self._logger = logging.getLogger(logger)
        self._event = event
        self._second = 0
        self._seen = 0
        self._every = 1

    def takes(self, now_s: float | None = None) -> bool:
        """Count an event; tell whether a line is to be written of it. `now_s` is monotonic."""
        if not self._logger.isEnabledFor(logging.INFO):
            return False
        limit = self.sample_above
        if not limit:
            return True
        second = int(monotonic() if now_s is None else now_s)
        if second != self._second:
            self._every = max(1, -(-self._seen // limit)) if second == self._second + 1 else 1
            self._second = second
            self._seen = 0
        self._seen += 1
        return self._seen % self._every == 0

    def write(self, fields: dict[str, Any]) -> None:
        """Write the line of an event that it `takes`."""
        if self._every > 1:
            fields["sample"] = self._every
        if self.handler is not None:
            self.handler.write(time(), "info", self._event, fields)
        else:
            self._logger.info(self._event, extra=fields)


class _Clock:
    """Times in ISO 8601, UTC, to the millisecond: all but that is the same for a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, moment_s: float) -> str:
        second, milliseconds = divmod(int(moment_s * 1000), 1000)
        if second != self._second:
            self._second = second
            self._text = datetime.datetime.fromtimestamp(second, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._text}.{milliseconds:03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
    if record.exc_info and record.exc_info[0] is not None:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


def _text(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)[:MAX_FIELD_CHARACTERS]
    return text if _PLAIN_TEXT.fullmatch(text) else encode_basestring_ascii(text)
