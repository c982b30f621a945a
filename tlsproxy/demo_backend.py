"""The demo's sample back end: `python -m tlsproxy.demo_backend` answers any request with what it got of it.

It listens on a free port of 127.0.0.1, writes that port's number to standard output, and ends when standard input does.
"""

from __future__ import annotations

import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_MAX_BODY_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 16


class EchoHandler(BaseHTTPRequestHandler):
    """Answers with the request line and the header fields as they arrived."""

    protocol_version = "HTTP/1.1"
    timeout = 75
    server_version = "tlsproxy-demo-backend"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer any method alike."""
        if not self._discard_body():
            self.close_connection = True
            return
        text = f"Hello from the back end.\n\n{self.requestline}\n{self.headers}"
        body = text.encode("utf-8", "replace")
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: the proxy logs."""

    def _discard_body(self) -> bool:
        """Read the request's body; False if it can't be."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._discard_chunks()
        return self._discard(int(self.headers.get("Content-Length", 0)))

    def _discard(self, length: int) -> bool:
        while length > 0:
            data = self.rfile.read(min(length, _CHUNK_BYTES))
            if not data:
                return False
            length -= len(data)
        return True

    def _discard_chunks(self) -> bool:
        while True:
            size = int(self.rfile.readline(_CHUNK_BYTES).partition(b";")[0], 16)
            if size > _MAX_BODY_BYTES or not self._discard(size):
                return False
            line = self.rfile.readline(_CHUNK_BYTES)
            while size == 0 and line not in (b"\r\n", b"\n", b""):
                line = self.rfile.readline(_CHUNK_BYTES)
            if size == 0:
                return True


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = ThreadingHTTPServer(("127.0.0.1", 0), EchoHandler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
