from __future__ import annotations

import json
import logging
import sys

import pytest

from hsm.logs import EventLog, JsonFormatter, LineFormatter, StderrHandler, TextFormatter

FORGED = 'x\n2026-01-01T00:00:00Z error "\x1b[31m\u2028\udc80 done'


def test_json_has_the_event_and_its_fields() -> None:
    fields = {"reason": "timeout", "duration_s": 0.25, "status": 200, "host": None, "names": ("a", "b")}
    line = JsonFormatter("proxy-0").line(1.5, "info", "handshake failed", fields)
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "info",
        "process": "proxy-0",
        "event": "handshake failed",
        "reason": "timeout",
        "duration_s": 0.25,
        "status": 200,
        "names": ["a", "b"],
    }


def test_text_has_the_event_and_its_fields() -> None:
    fields = {"token": "a", "error": 'no "slot" 3', "took_s": 0.25, "host": None}
    line = TextFormatter("supervisor").line(1.5, "info", "token failed", fields)
    assert line == '1970-01-01T00:00:01.500Z info supervisor token failed token=a error="no \\"slot\\" 3" took_s=0.25'


@pytest.mark.parametrize("formatter", [JsonFormatter("p"), TextFormatter("p")])
def test_no_peer_can_forge_a_line(formatter: LineFormatter) -> None:
    line = formatter.line(1.5, "info", FORGED, {"path": FORGED, "tags": [FORGED], FORGED: 1})
    assert line.isascii()
    assert line.isprintable()


@pytest.mark.parametrize("formatter", [JsonFormatter("p"), TextFormatter("p")])
def test_a_long_field_is_cut(formatter: LineFormatter) -> None:
    assert len(formatter.line(1.5, "info", "x", {"path": "y" * 10_000})) < 2200


def test_an_exception_stays_on_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    handler = StderrHandler(JsonFormatter("p"))
    try:
        raise ValueError(FORGED)
    except ValueError:
        fields = {"exc_info": sys.exc_info(), "worker": 3, "msg": "unexpected", "levelname": "ERROR"}
        handler.emit(logging.makeLogRecord(fields))
    finally:
        handler.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line)["worker"] == 3
    assert "ValueError" in json.loads(line)["traceback"]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What EventLogs write, with at most 10 events a second written in full."""
    lines: list[dict[str, object]] = []

    class Handler:
        def write(self, created_s: float, level: str, event: str, fields: dict[str, object]) -> None:
            lines.append({"event": event, **fields})

    monkeypatch.setattr(EventLog, "handler", Handler())
    monkeypatch.setattr(EventLog, "sample_above", 10)
    monkeypatch.setattr(logging.getLogger("test.events"), "level", logging.INFO)
    return lines


def test_frequent_events_are_sampled_and_each_line_says_for_how_many_it_stands(
    written: list[dict[str, object]],
) -> None:
    events = EventLog("test.events", "request")

    def happen(second: float, count: int) -> int:
        before = len(written)
        for number in range(count):
            if events.takes(second):
                events.write({"number": number})
        return len(written) - before

    assert happen(7.0, 100) == 100
    assert happen(8.0, 100) == 10
    assert {line["sample"] for line in written[100:]} == {10}
    assert happen(9.0, 5) == 0
    assert happen(10.0, 5) == 5
    assert "sample" not in written[-1]
    assert happen(11.0, 30) == 30
    assert happen(20.0, 30) == 30


def test_events_of_a_logger_that_is_not_enabled_cost_nothing(written: list[dict[str, object]]) -> None:
    logging.getLogger("test.events").setLevel(logging.WARNING)
    assert not EventLog("test.events", "request").takes(1.0)
