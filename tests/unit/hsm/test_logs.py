from __future__ import annotations

import json
import logging
import sys

import pytest

from hsm.logs import JsonFormatter, TextFormatter

FORGED = 'x\n2026-01-01T00:00:00Z error "\x1b[31m\u2028\udc80 done'


def record(message: str, exc_info: bool = False, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "levelname": "INFO", "created": 1.5, **fields})
    if exc_info:
        made.exc_info = sys.exc_info()
    return made


def test_json_has_the_event_and_its_fields() -> None:
    line = JsonFormatter("proxy-0").format(record("handshake failed", reason="timeout", duration_s=0.25, host=None))
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "info",
        "process": "proxy-0",
        "event": "handshake failed",
        "reason": "timeout",
        "duration_s": 0.25,
    }


def test_text_has_the_event_and_its_fields() -> None:
    line = TextFormatter("supervisor").format(record("token failed", token="a", error='no "slot" 3', took_s=0.25))
    assert line == '1970-01-01T00:00:01.500Z info supervisor token failed token=a error="no \\"slot\\" 3" took_s=0.25'


@pytest.mark.parametrize("formatter", [JsonFormatter("p"), TextFormatter("p")])
def test_no_peer_can_forge_a_line(formatter: logging.Formatter) -> None:
    line = formatter.format(record(FORGED, path=FORGED, tags=[FORGED]))
    assert line.isascii()
    assert line.isprintable()


@pytest.mark.parametrize("formatter", [JsonFormatter("p"), TextFormatter("p")])
def test_an_exception_stays_on_its_line(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        line = formatter.format(record("unexpected", exc_info=True))
    assert "ValueError" in line
    assert line.isprintable()


def test_a_long_field_is_cut() -> None:
    assert len(JsonFormatter("p").format(record("x" * 10_000, path="y" * 10_000))) < 5000
