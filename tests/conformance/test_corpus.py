"""The corpora of requests and responses, each through the whole product to a back end that records what it gets."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.proxy import Proxy, make_site, running_proxy, site_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

FENCE = b"GET /fence HTTP/1.1\r\nHost: fence\r\nConnection: close\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
FIELD_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [^\0-\x08\x0a-\x1f\x7f]*")


def octets(text: str | list[Any]) -> bytes:
    """Return the bytes that a `send` stands for."""
    parts = text if isinstance(text, list) else [text]
    return b"".join(
        part.encode("latin-1") if isinstance(part, str) else part[0].encode("latin-1") * part[1] for part in parts
    )


def corpus(name: str) -> list[Any]:
    """Return the cases of a file as parameters that are named by the rule."""
    cases = yaml.safe_load((Path(__file__).parent / name).read_text("utf-8"))
    return [pytest.param(case, id=case.get("breaks") or case["keeps"]) for case in cases]


@dataclass
class Message:
    """A request as the back end gets it, or a response as the client does."""

    start: bytes
    fields: list[bytes]
    body: bytes = b""
    trailers: bytes = b""

    def values(self, name: str) -> list[bytes]:
        """Return the values of a field."""
        prefix = name.lower().encode() + b":"
        return [line[len(prefix) :].strip() for line in self.fields if line.lower().startswith(prefix)]

    def has(self, line: str) -> bool:
        """Tell whether a field line is there."""
        return line.encode("latin-1") in self.fields


async def read_message(reader: asyncio.StreamReader, *, with_body: bool = True) -> Message | None:
    """Read a message by the letter of the rules; None at the end. Raises IncompleteReadError for one cut short."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    start, *lines = head[:-4].split(b"\r\n")
    message = Message(start, lines)
    # Whatever was sent: what the proxy writes is beyond doubt.
    assert all(FIELD_LINE.fullmatch(line) for line in lines), head
    lengths, codings = message.values("Content-Length"), message.values("Transfer-Encoding")
    assert len(lengths) + len(codings) <= 1, head
    if codings:
        assert codings == [b"chunked"]
    with_body = with_body and not re.match(rb"HTTP/1.1 (?:1..|204|304)", start)
    if with_body and lengths:
        message.body = await reader.readexactly(int(lengths[0]))
    elif with_body and codings:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            message.body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            message.trailers += line
    return message


@dataclass
class Recorder:
    """The back end: it keeps every request that was whole, and answers as told."""

    requests: list[Message] = field(default_factory=list)
    answer: bytes = ok()
    close: bool = False

    async def __call__(self, connection: BackendConnection) -> None:
        """Serve a connection of the proxy."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while request := await read_message(connection.reader):
                assert len(request.values("Host")) == 1
                assert len(request.values("X-Forwarded-For")) == 1
                self.requests.append(request)
                fence = b"/fence" in request.start
                await connection.send(ok(b"fence") if fence else self.answer)
                if self.close and not fence:
                    return


@dataclass
class Site:
    proxy: Proxy
    recorder: Recorder

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Give a client's connection."""
        self.recorder.requests.clear()
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.proxy.port, ssl=self.proxy.client_context(), server_hostname="localhost", limit=1 << 20
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def fence(self) -> None:
        """Let a request through, so that whatever was sent before it has arrived."""
        async with self.connection() as (reader, writer):
            writer.write(FENCE)
            message = await read_message(reader)
            assert message is not None
            assert message.body == b"fence"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    directory = tmp_path_factory.mktemp("conformance")
    keys = {"www": KeyType.ECDSA_P256}
    make_site(directory, keys)
    recorder = Recorder()
    async with backend(recorder) as upstream:
        config = site_config(directory, keys, f"127.0.0.1:{upstream.port}")
        config["listeners"][0]["limits"] = {"header_bytes": "8KiB", "body_bytes": 100_000}
        async with running_proxy(directory, config) as proxy:
            yield Site(proxy, recorder)


def check_fields(case: dict[str, Any], message: Message) -> None:
    for line in case.get("has", ()):
        assert message.has(line), f"{line!r} expected; got {message.fields}"
    for name in case.get("hasnt", ()):
        assert not message.values(name)
    if "body" in case:
        assert message.body == octets(case["body"])
    if "trailers" in case:
        assert message.trailers == octets(case["trailers"])


@pytest.mark.parametrize("case", corpus("requests.yaml"))
async def test_request(site: Site, case: dict[str, Any]) -> None:
    refused = "breaks" in case
    requests = site.recorder.requests
    site.recorder.answer, site.recorder.close = ok(), False
    async with site.connection() as (reader, writer):
        writer.write(octets(case["send"]) + (SMUGGLED if refused else FENCE))
        response = await asyncio.wait_for(read_message(reader), 20)
        assert response is not None
        assert int(response.start.split()[1]) == case["see"]
        if refused:
            assert response.has("Connection: close")
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert requests == []
        else:
            after = await asyncio.wait_for(read_message(reader), 20)
            assert (after is None) == case.get("closes", False)
            assert [b"/fence" in request.start for request in requests] == ([False] if after is None else [False, True])
            assert requests[0].start == octets(case["line"]) if "line" in case else True
            check_fields(case, requests[0])
    if refused:
        await site.fence()
        assert [request.start for request in requests] == [b"GET /fence HTTP/1.1"]


@pytest.mark.parametrize("case", corpus("responses.yaml"))
async def test_response(site: Site, case: dict[str, Any]) -> None:
    site.recorder.answer, site.recorder.close = octets(case["send"]), case.get("close", False)
    method, _, version = case.get("ask", "GET").partition(" ")
    ask = f"{method} /case HTTP/{version or '1.1'}\r\nHost: h\r\nConnection: keep-alive\r\n\r\n"
    async with site.connection() as (reader, writer):
        writer.write(ask.encode())
        interim = []
        while True:
            try:
                response = await asyncio.wait_for(read_message(reader, with_body=method != "HEAD"), 20)
            except asyncio.IncompleteReadError:
                assert case["see"] == "cut"
                break
            assert response is not None
            status = int(response.start.split()[1])
            if status < 200:
                interim.append(status)
                continue
            assert status == case["see"]
            if version == "1.0" and not response.values("Content-Length"):
                response.body = await reader.read()
            check_fields(case, response)
            break
        assert interim == case.get("interim", [])
        if case["see"] != "cut" and not reader.at_eof():
            # Nothing of the response is left to be taken for the answer to another request.
            writer.write(FENCE)
            after = await asyncio.wait_for(read_message(reader), 20)
            assert after is not None
            assert after.body == b"fence"
    await site.fence()


async def test_the_corpora_are_what_they_promise() -> None:
    requests, responses = corpus("requests.yaml"), corpus("responses.yaml")
    assert len(requests) >= 150
    assert len(responses) >= 60
    for cases in (requests, responses):
        assert len({case.id for case in cases}) == len(cases)
