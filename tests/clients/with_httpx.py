"""httpx: PORT CA_FILE VERSION_OF_HTTP."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import cases
import httpx

client = httpx.Client(
    base_url=f"https://localhost:{sys.argv[1]}",
    verify=ssl.create_default_context(cafile=sys.argv[2]),
    timeout=30,
    http2=sys.argv[3] == "2",
)


def ask(
    method: str, path: str, *, body: bytes | Iterator[bytes] | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    response = client.request(method, path, content=body, headers=headers)
    return cases.outcome(response.status_code, response.content)


cases.run(cases.http_cases(ask))
