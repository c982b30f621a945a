from __future__ import annotations

import copy
from typing import Any

from tests.unit.serve.test_anatomy import HANDSHAKE
from tlsproxy.top_screen import Screen

DOCUMENT: dict[str, Any] = {
    "version": "9",
    "ready": True,
    "handshakes": {
        "full": 120.0,
        "resumed": 3.5,
        "failed": 0.0,
        "failures": {"timeout": 0.0},
        "in_flight": 2.0,
        "duration": [0.002, 0.02, 1.5],
    },
    "phases": {
        "client_hello": [0.000031, 0.002, 0.3],
        **dict.fromkeys(("certificate", "queue", "sign", "client", "finish")),
    },
    "requests": 7.0,
    "connections": 11.0,
    "tokens": [
        {
            "name": "hsm-a",
            "up": True,
            "circuit": ["closed"],
            "pending": 1.0,
            "signatures": 119.0,
            "errors": 0.0,
            "sign": None,
            "queue": None,
        }
    ],
    "upstreams": [
        {
            "name": "app",
            "servers": [
                {"address": "10.0.0.1:80", "up": True, "state": "up", "ejections": 0},
                {"address": "10.0.0.2:80", "up": True, "state": "up", "ejections": 0},
            ],
            "requests": 7.0,
            "errors": 0.0,
            "retries": 0.2,
            "waiting": 3.0,
            "active": 1.0,
            "idle": 4.0,
        }
    ],
    "certificates": [
        {"name": "www", "names": ["example.com"], "key_type": "rsa-2048", "tokens": ["hsm-a"], "days_left": 60}
    ],
    "listeners": [],
    "workers": [{"index": 0, "pid": 1, "ready": True}, {"index": 1, "pid": None, "ready": False}],
    "slowest": [HANDSHAKE.to_document()],
}


def shown(width: int = 200, height: int = 100, **changes: Any) -> list[tuple[str, bool]]:
    screen = Screen()
    screen.update(copy.deepcopy(DOCUMENT) | changes)
    return [(line.text, line.bad) for line in screen.lines(width, height)]


def line_with(words: str, lines: list[tuple[str, bool]]) -> tuple[str, bool]:
    (found,) = (line for line in lines if line[0].startswith(words))
    return found


def test_everything_is_there() -> None:
    lines = shown()
    assert "1 of 2 proxy workers" in line_with("tlsproxy 9", lines)[0]
    assert line_with("full 120/s", lines)[0].split("   ")[1:3] == ["resumed 3.5/s", "in flight 2"]
    assert line_with("client_hello ", lines)[0].split()[1:] == ["31", "us", "2.0", "ms", "300.0", "ms"]
    assert line_with("whole handshake", lines)[0].endswith("1.50 s")
    assert line_with("hsm-a ", lines)[0].split()[:4] == ["hsm-a", "up", "closed", "119"]
    assert line_with("app ", lines)[0].split() == ["app", "2", "of", "2", "up", "7.0", "0", "0.2", "3", "1", "4"]
    assert "rsa_pss_rsae_sha256" in lines[-2][0]
    assert not any(bad for _, bad in lines)


def test_trouble_stands_out() -> None:
    down = DOCUMENT["tokens"][0] | {"up": False}
    opened = DOCUMENT["tokens"][0] | {"name": "hsm-b", "circuit": ["closed", "open"]}
    lines = shown(
        ready=False,
        handshakes=DOCUMENT["handshakes"] | {"failed": 2.0, "failures": {"timeout": 2.0}},
        tokens=[down, opened],
        certificates=[DOCUMENT["certificates"][0] | {"days_left": -1}],
        upstreams=[DOCUMENT["upstreams"][0] | {"errors": 0.5}],
    )
    bad = [text for text, bad in lines if bad]
    for words in ("NOT READY", "timeout 2.0", "DOWN", "open", "-1", "0.5"):
        assert any(words in text for text in bad), words
    assert len(bad) == 6


def test_servers_in_trouble_are_named() -> None:
    up, down = DOCUMENT["upstreams"][0]["servers"]
    ejected = {"address": "10.0.0.3:80", "up": True, "state": "up", "ejections": 2}
    partly = {"address": "10.0.0.4:80", "up": False, "state": "down in 1 of 2 workers", "ejections": 1}
    down = down | {"up": False, "state": "down"}
    lines = shown(upstreams=[DOCUMENT["upstreams"][0] | {"servers": [up, down, ejected, partly]}])
    text, bad = line_with("app ", lines)
    assert bad
    assert "2 of 4 up" in text
    assert [text.split(maxsplit=2)[2].rsplit(maxsplit=1) for text, bad in lines if text.startswith("10.") and bad] == [
        ["DOWN", "0"],
        ["up", "2"],
        ["DOWN in 1 of 2 workers", "1"],
    ]
    text, bad = line_with("tlsproxy 9", lines)
    assert bad
    assert text.endswith("2 of 4 upstream servers DOWN")


def test_it_fits() -> None:
    lines = shown(30, 5)
    assert len(lines) == 5
    assert max(len(text) for text, _ in lines) == 30


def test_names_cannot_steer_the_terminal() -> None:
    lines = shown(upstreams=[DOCUMENT["upstreams"][0] | {"name": "\x1b[2Japp"}])
    assert "?[2Japp" in line_with("?[2J", lines)[0]


def test_a_course_is_drawn_over_time() -> None:
    screen = Screen()
    for rate in (0.0, 50.0, 100.0):
        screen.update(DOCUMENT | {"handshakes": DOCUMENT["handshakes"] | {"full": rate, "resumed": 0.0}})
    assert screen.lines(100, 100)[4].text.split() == ["handshakes/s", "100", "▄█"]


def test_before_the_first_document() -> None:
    assert [line.text for line in Screen().lines(80, 24)] == ["Connecting"]
