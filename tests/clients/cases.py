"""How a client program tells what it saw: for each case one JSON line with the outcome, or `error` if it raised."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

BODY = bytes(range(251)) * 41_780  # a little more than 10 MB
PIECES = 40
BIG_HEADER = "x" * 40_000


def pieces() -> Iterator[bytes]:
    """Give BODY piece by piece, for a client that does not know its length."""
    size = len(BODY) // PIECES + 1
    for start in range(0, len(BODY), size):
        yield BODY[start : start + size]


class Ask(Protocol):
    """How a Python client makes a request and tells what it saw; an iterator as the body has no length."""

    def __call__(
        self,
        method: str,
        path: str,
        *,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]: ...


def http_cases(ask: Ask) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the cases that need no more than requests."""
    return {
        "get": lambda: ask("GET", "/hello"),
        "reuse": lambda: ask("GET", "/hello"),
        "post": lambda: ask("POST", "/echo", body=BODY),
        "chunked": lambda: ask("POST", "/echo", body=pieces()),
        "head": lambda: ask("HEAD", "/hello"),
        "no_content": lambda: ask("GET", "/204"),
        "not_modified": lambda: ask("GET", "/304"),
        "early_hints": lambda: ask("GET", "/hints"),
        "big_header": lambda: ask("GET", "/hello", headers={"X-Big": BIG_HEADER}),
        "slow_body": lambda: ask("GET", "/slow-body"),
        "early_response": lambda: ask("POST", "/early", body=BODY),
        "dead": lambda: ask("GET", "/dead"),
        "slow": lambda: ask("GET", "/never"),
        "cut_length": lambda: ask("GET", "/cut-length"),
        "cut_chunked": lambda: ask("GET", "/cut-chunked"),
    }


def outcome(status: int, body: bytes = b"", **more: Any) -> dict[str, Any]:
    """Return what a client saw of a response."""
    return {"status": status, "length": len(body), "sha256": hashlib.sha256(body).hexdigest(), **more}


def run(cases: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Run all cases."""
    for name, case in cases.items():
        try:
            seen = case()
        except Exception as error:
            seen = {"error": f"{type(error).__name__}: {error}"[:200]}
        sys.stdout.write(json.dumps({"case": name, **seen}) + "\n")
        sys.stdout.flush()
