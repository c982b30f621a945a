"""Log lines on stderr, JSON or text, one event a line whatever is in it.

A call names its event and passes its data as `extra`: `logger.info("handshake failed", extra={"reason": ...})`. Control
characters, wherever they come from, are escaped, so no peer can forge a line.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys
from typing import Any, Final, Literal

_STANDARD_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_PLAIN_TEXT: Final = re.compile(r"[!#-<>-\[\]-~]+")
"""Printable ASCII without space, quote, backslash and `=`: shown as it is in the text format."""
MAX_FIELD_CHARACTERS: Final = 2048


LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]


def configure(level: LogLevel, line_format: LogFormat, process: str) -> None:
    """Send every logger of this process to stderr; `process` names it in each line."""
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter(process) if line_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.raiseExceptions = False


class StderrHandler(logging.Handler):
    """Writes each line with one system call, so that lines of several processes don't mix."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a reader that is gone costs the line, not the process."""
        try:
            os.write(sys.stderr.fileno(), (self.format(record) + "\n").encode("ascii", "backslashreplace"))
        except (OSError, ValueError):
            return


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "process": ..., "event": ..., ...}`, ASCII only."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "event": record.getMessage()[:MAX_FIELD_CHARACTERS],
        }
        return json.dumps(line | _fields(record), default=str)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL PROCESS event key=value key="a value"`, ASCII only."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its newline."""
        event = json.dumps(record.getMessage()[:MAX_FIELD_CHARACTERS])[1:-1]
        words = [_time(record), record.levelname.lower(), self._process, event]
        words += [f"{key}={_text(value)}" for key, value in _fields(record).items()]
        return " ".join(words)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {
        key: value[:MAX_FIELD_CHARACTERS] if isinstance(value, str) else value
        for key, value in vars(record).items()
        if key not in _STANDARD_ATTRIBUTES and value is not None
    }
    if record.exc_info and record.exc_info[0] is not None:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


def _text(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN_TEXT.fullmatch(text) else json.dumps(text)
