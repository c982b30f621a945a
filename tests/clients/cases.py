"""How a client program tells what it saw: for each case one JSON line with the outcome, or `error` if it raised."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

BODY = bytes(range(251)) * 41_780  # a little more than 10 MB
PIECES = 40
BIG_HEADER = "x" * 70_000


def pieces() -> Iterator[bytes]:
    """Give BODY piece by piece, for a client that does not know its length."""
    size = len(BODY) // PIECES + 1
    for start in range(0, len(BODY), size):
        yield BODY[start : start + size]


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
