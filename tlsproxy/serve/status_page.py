"""The status page: one HTML document without scripts, every value escaped."""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterable, Sequence

from tlsproxy.serve.snapshot import Snapshot

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem; }
caption { text-align: left; font-weight: 600; font-size: 1.15rem; padding: .5rem 0; }
th, td { text-align: left; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid #8886; }
.bad { color: #b00020; font-weight: 600; }
:root { color-scheme: light dark; }
"""


class Bad(str):
    """Text that tells of trouble, shown so."""

    __slots__ = ()


def render(snapshot: Snapshot) -> str:
    """Return the page."""
    now = datetime.datetime.now(datetime.timezone.utc)
    state: str = "Ready" if snapshot.ready else Bad("Not ready: new clients cannot be served")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tlsproxy</title>'
        f"<style>{_STYLE}</style></head><body><h1>tlsproxy {html.escape(snapshot.version)}</h1><p>{_shown(state)}. "
        '<a href="/metrics">/metrics</a> <a href="/healthz">/healthz</a> <a href="/readyz">/readyz</a></p>'
        + _table(
            "Listeners",
            ("Address", "Open connections", "Handshakes", "Failed handshakes"),
            (
                (listener.address, str(listener.connections), str(listener.handshakes), str(listener.handshakes_failed))
                for listener in snapshot.listeners
            ),
        )
        + _table(
            "Tokens",
            ("Name", "State"),
            ((name, "up" if up else Bad("down")) for name, up in snapshot.tokens.items()),
        )
        + _table(
            "Certificates",
            ("Name", "For", "Key", "Tokens", "Expires"),
            (
                (
                    certificate.name,
                    ", ".join(certificate.names),
                    certificate.key_type,
                    ", ".join(certificate.tokens),
                    _expiry(certificate.not_after, now),
                )
                for certificate in snapshot.certificates
            ),
        )
        + _table(
            "Proxy workers",
            ("Number", "Process", "State"),
            (
                (
                    str(worker.index),
                    "none" if worker.pid is None else str(worker.pid),
                    "ready" if worker.ready else Bad("not ready"),
                )
                for worker in snapshot.workers
            ),
        )
        + "</body></html>\n"
    )


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{caption}</caption><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _shown(text: str) -> str:
    escaped = html.escape(text)
    return f'<span class="bad">{escaped}</span>' if isinstance(text, Bad) else escaped


def _expiry(not_after: datetime.datetime, now: datetime.datetime) -> str:
    date = f"{not_after:%Y-%m-%d %H:%M} UTC"
    days = (not_after - now).days
    return Bad(f"{date} (expired)") if days < 0 else f"{date} ({days} days)"
