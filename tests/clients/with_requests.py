"""Python requests: PORT CA_FILE."""

from __future__ import annotations

import sys
from typing import Any

import cases
import requests

BASE = f"https://localhost:{sys.argv[1]}"
session = requests.Session()
session.verify = sys.argv[2]
session.trust_env = False  # REQUESTS_CA_BUNDLE would override it


def ask(method: str, path: str, **options: Any) -> dict[str, Any]:
    response = session.request(method, BASE + path, timeout=30, **options)
    return cases.outcome(response.status_code, response.content)


cases.run(
    {
        "get": lambda: ask("GET", "/hello"),
        "reuse": lambda: ask("GET", "/hello"),
        "post": lambda: ask("POST", "/echo", data=cases.BODY),
        "chunked": lambda: ask("POST", "/echo", data=cases.pieces()),
        "head": lambda: ask("HEAD", "/hello"),
        "no_content": lambda: ask("GET", "/204"),
        "not_modified": lambda: ask("GET", "/304"),
        "early_hints": lambda: ask("GET", "/hints"),
        "big_header": lambda: ask("GET", "/hello", headers={"X-Big": cases.BIG_HEADER}),
        "slow_body": lambda: ask("GET", "/slow-body"),
        "early_response": lambda: ask("POST", "/early", data=cases.BODY),
        "dead": lambda: ask("GET", "/dead"),
        "slow": lambda: ask("GET", "/never"),
        "cut_length": lambda: ask("GET", "/cut-length"),
        "cut_chunked": lambda: ask("GET", "/cut-chunked"),
    }
)
