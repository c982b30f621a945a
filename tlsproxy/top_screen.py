"""What `tlsproxy top` shows: lines of text made of the live documents so far. No terminal is touched here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Document = dict[str, Any]
"""As tlsproxy.serve.live_document makes it."""

_BARS = " ▁▂▃▄▅▆▇█"
_MAX_HISTORY = 300


class Line(NamedTuple):
    """A line of the screen."""

    text: str
    heading: bool = False
    bad: bool = False
    """It tells of trouble."""


class Screen:
    """The last document, and the course of two figures over those before."""

    def __init__(self) -> None:
        self._document: Document | None = None
        self._rates: deque[float] = deque(maxlen=_MAX_HISTORY)
        self._p99s: deque[float] = deque(maxlen=_MAX_HISTORY)

    def update(self, document: Document) -> None:
        """Take the newest document."""
        self._document = document
        handshakes = document["handshakes"]
        self._rates.append(handshakes["full"] + handshakes["resumed"])
        self._p99s.append(handshakes["duration"][2] if handshakes["duration"] else 0.0)

    def lines(self, width: int, height: int) -> list[Line]:
        """Return at most `height` lines of at most `width` characters."""
        document = self._document
        if document is None:
            return [Line("Connecting")]
        lines = [
            _state(document),
            *_handshakes(document),
            Line(""),
            self._course("handshakes/s", self._rates, _rate, width),
            self._course("p99", self._p99s, _duration, width),
            Line(""),
            *_phases(document),
            *_tokens(document),
            *_upstreams(document),
            *_certificates(document),
            *_slowest(document),
        ]
        return [line._replace(text=_printable(line.text)[:width]) for line in lines[:height]]

    @staticmethod
    def _course(name: str, values: deque[float], show: Callable[[float], str], width: int) -> Line:
        room = max(10, width - 30)
        shown = list(values)[-room:]
        top = max(shown) or 1.0
        bars = "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in shown)
        return Line(f"{name:<13}{show(shown[-1]):>9}  {bars}")


def _state(document: Document) -> Line:
    state = "ready" if document["ready"] else "NOT READY: new clients cannot be served"
    workers = document["workers"]
    ready = sum(worker["ready"] for worker in workers)
    text = f"tlsproxy {document['version']}   {state}   {ready} of {len(workers)} proxy workers"
    servers = [server for upstream in document["upstreams"] for server in upstream["servers"]]
    down = sum(not server["up"] for server in servers)
    if down:
        text += f"   {down} of {len(servers)} upstream servers DOWN"
    return Line(text, heading=True, bad=not document["ready"] or down > 0)


def _handshakes(document: Document) -> list[Line]:
    handshakes = document["handshakes"]
    failures = ", ".join(f"{name} {_rate(value)}" for name, value in handshakes["failures"].items() if value)
    return [
        Line(
            f"full {_rate(handshakes['full'])}/s   resumed {_rate(handshakes['resumed'])}/s   "
            f"in flight {handshakes['in_flight']:.0f}   connections {document['connections']:.0f}   "
            f"requests {_rate(document['requests'])}/s"
        ),
        Line(f"failed {_rate(handshakes['failed'])}/s   {failures}", bad=handshakes["failed"] > 0),
    ]


def _table(heading: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]], widths: Sequence[int]) -> list[Line]:
    """Return the rows (cells, and whether they tell of trouble) below their heading; a width < 0 aligns to the left."""

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
        )

    return [Line(line(heading), heading=True), *(Line(line(cells), bad=bad) for cells, bad in rows), Line("")]


def _phases(document: Document) -> list[Line]:
    rows: list[tuple[Sequence[str], bool]] = [
        ([phase, *_durations(values)], False) for phase, values in document["phases"].items()
    ]
    rows.append((["whole handshake", *_durations(document["handshakes"]["duration"])], False))
    return _table(["FULL HANDSHAKES", "p50", "p95", "p99"], rows, [-20, 9, 9, 9])


def _tokens(document: Document) -> list[Line]:
    rows = []
    for token in document["tokens"]:
        circuit = "open" if "open" in token["circuit"] else ",".join(token["circuit"])
        state = "up" if token["up"] else "DOWN"
        cells = [
            token["name"],
            state,
            circuit,
            _rate(token["signatures"]),
            _rate(token["errors"]),
            f"{token['pending']:.0f}",
            _durations(token["queue"])[2],
            _durations(token["sign"])[0],
            _durations(token["sign"])[2],
        ]
        rows.append((cells, not token["up"] or circuit == "open"))
    heading = ["TOKEN", "state", "circuit", "signs/s", "errors/s", "pending", "queue p99", "sign p50", "sign p99"]
    return _table(heading, rows, [-20, -5, -9, 8, 8, 8, 9, 9, 9])


def _upstreams(document: Document) -> list[Line]:
    """Servers have a line of their own while they are not up, or have been ejected lately."""
    rows: list[tuple[Sequence[str], bool]] = []
    troubled: list[tuple[Sequence[str], bool]] = []
    for item in document["upstreams"]:
        servers = item["servers"]
        up = sum(server["up"] for server in servers)
        cells = [
            item["name"],
            f"{up} of {len(servers)} up",
            *map(_rate, (item["requests"], item["errors"], item["retries"])),
            *(f"{item[name]:.0f}" for name in ("waiting", "active", "idle")),
        ]
        rows.append((cells, item["errors"] > 0 or up < len(servers)))
        troubled += [
            ([server["address"], item["name"], server["state"].replace("down", "DOWN"), str(server["ejections"])], True)
            for server in servers
            if not server["up"] or server["ejections"]
        ]
    heading = ["UPSTREAM", "servers", "requests/s", "errors/s", "retries/s", "waiting", "active", "idle"]
    lines = _table(heading, rows, [-20, -13, 10, 8, 9, 8, 8, 8])
    if troubled:
        lines += _table(["SERVER", "upstream", "state", "ejections, last minute"], troubled, [-30, -20, -26, 22])
    return lines


def _certificates(document: Document) -> list[Line]:
    rows = [
        (
            [item["name"], str(item["days_left"]), item["key_type"], ",".join(item["tokens"]), ",".join(item["names"])],
            item["days_left"] < 14,
        )
        for item in document["certificates"]
    ]
    return _table(["CERTIFICATE", "days", "key", "tokens", "for"], rows, [-20, 5, -11, -20, -40])


def _slowest(document: Document) -> list[Line]:
    phases = list(document["phases"])
    rows = [
        (
            [
                _duration(item["duration_s"]),
                *(_duration(item["phases"][f"{phase}_s"]) for phase in phases),
                item["token"],
                item["scheme"],
            ],
            False,
        )
        for item in document["slowest"]
    ]
    return _table(["SLOWEST", *phases, "token", "scheme"], rows, [-9, *[12] * len(phases), -12, -30])


def _durations(values: Sequence[float] | None) -> list[str]:
    return ["-"] * 3 if values is None else [_duration(value) for value in values]


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.001 else f"{seconds * 1e6:.0f} us"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _printable(text: str) -> str:
    """What comes over the network must not steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
