"""curl: PORT CA_FILE VERSION_OF_HTTP."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import cases

BASE = f"https://localhost:{sys.argv[1]}"
CURL = ["curl", "--silent", "--show-error", "--http" + sys.argv[3], "--max-time", "30", "--cacert", sys.argv[2]]
CURL += ["--resolve", f"localhost:{sys.argv[1]}:127.0.0.1", "--write-out", "%{stderr}%{http_code} %{num_connects}\n"]

# In HTTP/2 a body of unknown length needs no word about it.
UNKNOWN_LENGTH = ["Transfer-Encoding: chunked"] if sys.argv[3] == "1.1" else ["Content-Length:"]
CHUNKED = [option for field in [*UNKNOWN_LENGTH, "Expect: 100-continue"] for option in ("-H", field)]


def ask(path: str, *options: str, data: bytes = b"") -> dict[str, Any]:
    done = subprocess.run([*CURL, *options, BASE + path], input=data, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    status, connects = done.stderr.split()[-2:]
    return cases.outcome(int(status), done.stdout, connects=int(connects))


cases.run(
    {
        "get": lambda: ask("/hello"),
        "reuse": lambda: ask("/hello", BASE + "/hello"),
        "post": lambda: ask("/echo", "--data-binary", "@-", data=cases.BODY),
        "chunked": lambda: ask("/echo", "--data-binary", "@-", *CHUNKED, data=cases.BODY),
        "head": lambda: ask("/hello", "--head", "--output", "/dev/null"),
        "no_content": lambda: ask("/204"),
        "not_modified": lambda: ask("/304"),
        "early_hints": lambda: ask("/hints"),
        "big_header": lambda: ask("/hello", "-H", "X-Big: " + cases.BIG_HEADER),
        "slow_body": lambda: ask("/slow-body"),
        "early_response": lambda: ask("/early", "--data-binary", "@-", "-H", "Expect:", data=cases.BODY),
        "dead": lambda: ask("/dead"),
        "slow": lambda: ask("/never"),
        "cut_length": lambda: ask("/cut-length"),
        "cut_chunked": lambda: ask("/cut-chunked"),
        "upgrade": lambda: ask("/upgrade", "-H", "Connection: Upgrade", "-H", "Upgrade: echo"),
    }
)
