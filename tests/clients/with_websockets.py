"""websockets: PORT CA_FILE."""

from __future__ import annotations

import ssl
import sys
from typing import Any

import cases
from websockets.sync.client import connect


def upgrade() -> dict[str, Any]:
    context = ssl.create_default_context(cafile=sys.argv[2])
    with connect(f"wss://localhost:{sys.argv[1]}/ws", ssl=context, proxy=None) as socket:
        socket.send(cases.BODY[:300_000])
        body = socket.recv()
        assert isinstance(body, bytes)
        return cases.outcome(101, body)


cases.run({"upgrade": upgrade})
