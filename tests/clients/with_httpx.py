"""httpx: PORT CA_FILE."""

from __future__ import annotations

import ssl
import sys
from typing import Any

import cases
import httpx

client = httpx.Client(
    base_url=f"https://localhost:{sys.argv[1]}", verify=ssl.create_default_context(cafile=sys.argv[2]), timeout=30
)


def ask(method: str, path: str, **options: Any) -> dict[str, Any]:
    response = client.request(method, path, **options)
    return cases.outcome(response.status_code, response.content)


cases.run(
    {
        "get": lambda: ask("GET", "/hello"),
        "reuse": lambda: ask("GET", "/hello"),
        "post": lambda: ask("POST", "/echo", content=cases.BODY),
        "chunked": lambda: ask("POST", "/echo", content=cases.pieces()),
        "head": lambda: ask("HEAD", "/hello"),
        "no_content": lambda: ask("GET", "/204"),
        "not_modified": lambda: ask("GET", "/304"),
        "early_hints": lambda: ask("GET", "/hints"),
        "big_header": lambda: ask("GET", "/hello", headers={"X-Big": cases.BIG_HEADER}),
        "slow_body": lambda: ask("GET", "/slow-body"),
        "early_response": lambda: ask("POST", "/early", content=cases.BODY),
        "dead": lambda: ask("GET", "/dead"),
        "slow": lambda: ask("GET", "/never"),
        "cut_length": lambda: ask("GET", "/cut-length"),
        "cut_chunked": lambda: ask("GET", "/cut-chunked"),
    }
)
