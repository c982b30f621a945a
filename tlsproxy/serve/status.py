"""`tlsproxy status`: the state of the whole as one JSON document, and as tables for people."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tlsproxy.serve.rates import Lately
from tlsproxy.serve.snapshot import Snapshot


def status_document(
    snapshot: Snapshot, circuits: Mapping[str, Mapping[str, int]], lately: Lately, *, draining_workers: int
) -> dict[str, Any]:
    """Return the state as JSON has it. `circuits` is how many proxy workers see a token's circuit in which state."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "version": snapshot.version,
        "ready": snapshot.ready,
        "workers": [asdict(worker) for worker in snapshot.workers],
        "draining_workers": draining_workers,
        "listeners": [asdict(listener) for listener in snapshot.listeners],
        "tokens": [{"name": name, "up": up, "circuit": circuits.get(name, {})} for name, up in snapshot.tokens.items()],
        "upstreams": [
            {
                "name": upstream.name,
                "servers": [
                    {"address": server.address, "state": server.state, "ejections": server.ejections}
                    for server in upstream.servers
                ],
            }
            for upstream in snapshot.upstreams
        ],
        "certificates": [
            {
                **asdict(certificate),
                "not_after": certificate.not_after.isoformat(),
                "days_left": (certificate.not_after - now).days,
            }
            for certificate in snapshot.certificates
        ],
        "handshakes": asdict(lately),
    }


def render_status(document: Mapping[str, Any]) -> str:
    """Return the document as tables."""
    lately = document["handshakes"]
    state = "ready" if document["ready"] else "NOT READY: new clients cannot be served"
    draining = document["draining_workers"]
    lines = [f"tlsproxy {document['version']}: {state}"]
    lines += _table(
        ("LISTENER", "CONNECTIONS", "HANDSHAKES", "FAILED"),
        (
            (item["address"], item["connections"], item["handshakes"], item["handshakes_failed"])
            for item in document["listeners"]
        ),
    )
    lines += _table(
        ("TOKEN", "STATE", "CIRCUIT"),
        ((item["name"], "up" if item["up"] else "DOWN", _circuit(item["circuit"])) for item in document["tokens"]),
    )
    lines += _table(
        ("UPSTREAM", "SERVER", "STATE", "EJECTIONS, LAST MINUTE"),
        (
            (item["name"], server["address"], server["state"].replace("down", "DOWN"), server["ejections"])
            for item in document["upstreams"]
            for server in item["servers"]
        ),
    )
    lines += _table(
        ("CERTIFICATE", "KEY", "TOKENS", "DAYS LEFT", "NAMES"),
        (
            (item["name"], item["key_type"], ",".join(item["tokens"]), item["days_left"], ",".join(item["names"]))
            for item in document["certificates"]
        ),
    )
    lines += _table(
        ("WORKER", "PID", "STATE"),
        (
            (item["index"], item["pid"] or "-", "ready" if item["ready"] else "NOT READY")
            for item in document["workers"]
        ),
    )
    if draining:
        lines += ["", f"{draining} proxy workers of earlier configurations are draining"]
    rate = f"{lately['per_s']:.1f}/s, {lately['failed_per_s']:.1f}/s failed"
    lines += ["", f"Handshakes of the last {lately['window_s']:.0f} s: {rate}"]
    durations = ({} if lately["duration"] is None else {"total": lately["duration"]}) | lately["phases"]
    if durations:
        lines += _table(
            ("PHASE", "P50", "P99"),
            ((name, _milliseconds(item["p50_s"]), _milliseconds(item["p99_s"])) for name, item in durations.items()),
        )
    return "\n".join(lines)


def _circuit(workers: Mapping[str, int]) -> str:
    if set(workers) <= {"closed"}:
        return "closed"
    return ", ".join(f"{state} in {count}" for state, count in sorted(workers.items()))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return an empty line, the head and the rows, in columns."""
    cells = [tuple(head), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return ["", *lines]
