"""Python requests: PORT CA_FILE."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import cases
import requests

BASE = f"https://localhost:{sys.argv[1]}"
session = requests.Session()
session.verify = sys.argv[2]
session.trust_env = False  # REQUESTS_CA_BUNDLE would override it


def ask(
    method: str, path: str, *, body: bytes | Iterator[bytes] | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    response = session.request(method, BASE + path, timeout=30, data=body, headers=headers)
    return cases.outcome(response.status_code, response.content)


cases.run(cases.http_cases(ask))
