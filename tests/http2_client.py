"""An HTTP/2 client of the h2 library's, over a TlsClient: a test decides about every frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from tests.dataplane import AUTHORITY, DataPlane, TlsClient
from tests.unit.tls.peers import Client, client_context

CONTEXT = client_context(AUTHORITY, alpn=["h2", "http/1.1"])


@dataclasses.dataclass
class Http2Response:
    """What has come of one response."""

    fields: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    interim: list[list[tuple[bytes, bytes]]] = dataclasses.field(default_factory=list)
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    complete: bool = False
    reset: ErrorCodes | int | None = None

    @property
    def status(self) -> int:
        """Status, 0 before it has come."""
        return int(dict(self.fields).get(b":status", 0))

    def field(self, name: bytes) -> bytes | None:
        """Return the value of a header field."""
        return dict(self.fields).get(name)


class Http2Client:
    """One connection. With `reads` False it takes nothing of bodies: it never opens a window again."""

    def __init__(self, tls: TlsClient, *, window_bytes: int | None = None) -> None:
        self.tls = tls
        self.reads = True
        self._received = b""
        self.goaway: ErrorCodes | None = None
        """The error code of the last one."""
        self.goaways: list[int] = []
        """The last stream id of each GOAWAY."""
        self.responses: dict[int, Http2Response] = {}
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None, validate_outbound_headers=False))
        self.h2.initiate_connection()
        if window_bytes is not None:
            self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window_bytes})

    async def flush(self) -> None:
        """Send what h2 has to say."""
        data = self.h2.data_to_send()
        if data:
            await self.tls.send(data)

    async def request(
        self,
        path: str = "/",
        *,
        method: str = "GET",
        fields: Sequence[tuple[bytes, bytes]] = (),
        body: bytes | None = None,
        ended: bool = True,
    ) -> int:
        """Send a request, its body if there is one and it fits into the windows; return the id of its stream."""
        stream_id = self.h2.get_next_available_stream_id()
        pseudo = [
            (b":method", method.encode()),
            (b":scheme", b"https"),
            (b":authority", b"localhost"),
            (b":path", path.encode()),
        ]
        self.responses[stream_id] = Http2Response()
        self.h2.send_headers(stream_id, [*pseudo, *fields], end_stream=ended and body is None)
        if body is not None:
            await self.send_body(stream_id, body, ended=ended)
        await self.flush()
        return stream_id

    async def send_body(self, stream_id: int, body: bytes, *, ended: bool = True) -> None:
        """Send a body as the windows allow."""
        position = 0
        while position < len(body):
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if not room:
                await self.flush()
                assert await self.step()
                continue
            self.h2.send_data(stream_id, body[position : position + room])
            position += room
        if ended:
            self.h2.end_stream(stream_id)
        await self.flush()

    async def step(self) -> bool:
        """Read something; False at the end."""
        if not self.tls.buffer and not await self.tls.more():
            return False
        self._received += self.tls.buffer
        self.tls.buffer = b""
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3], "big")
            frame, rest = self._received[:end], self._received[end:]
            if len(frame) < end:
                break
            self._received = rest
            if frame[3] == 7:
                # h2 would drop the streams that are open.
                self.goaways.append(int.from_bytes(frame[9:13], "big"))
                self.goaway = ErrorCodes(int.from_bytes(frame[13:17], "big"))
                continue
            for event in self.h2.receive_data(frame):
                self._act_on(event)
        await self.flush()
        return True

    def _act_on(self, event: events.Event) -> None:
        found = self.responses.get(getattr(event, "stream_id", 0))
        if found is None:
            return
        if isinstance(event, events.ResponseReceived):
            found.fields = list(event.headers)
        elif isinstance(event, events.InformationalResponseReceived):
            found.interim.append(list(event.headers))
        elif isinstance(event, events.DataReceived):
            found.body += event.data
            if self.reads and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, events.TrailersReceived):
            found.trailers = list(event.headers)
        elif isinstance(event, events.StreamEnded):
            found.complete = True
        elif isinstance(event, events.StreamReset):
            found.reset = event.error_code

    async def response(self, stream_id: int) -> Http2Response:
        """Read until a response is complete or reset."""
        response = self.responses[stream_id]
        while not response.complete and response.reset is None:
            assert await self.step(), f"the connection ended with {self.tls.end}, GOAWAY {self.goaway}"
        return response

    async def get(self, path: str = "/", **options: object) -> Http2Response:
        """Send a request and read its response."""
        return await self.response(await self.request(path, **options))  # type: ignore[arg-type]

    async def until_end(self) -> str:
        """Read to the end; return how the connection ended."""
        while await self.step():
            pass
        return self.tls.end


async def connect(proxy: DataPlane, *, window_bytes: int | None = None) -> Http2Client:
    """Return a client whose handshake is complete and has chosen HTTP/2; `window_bytes` is for each response."""
    tls = await proxy.open()
    tls.tls = Client(CONTEXT, "localhost")
    await tls.shake_hands()
    assert tls.tls.tls.selected_alpn_protocol() == "h2"
    client = Http2Client(tls, window_bytes=window_bytes)
    await client.flush()
    return client
