"""One HTTP/2 connection, against the h2 library's client and frames by hand."""

from __future__ import annotations

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, PingFrame, PriorityFrame, RstStreamFrame

from tlsproxy.http.http2 import (
    CONNECTION_WINDOW_BYTES,
    STREAM_WINDOW_BYTES,
    DataReceived,
    Event,
    HeadersReceived,
    Http2Connection,
    Http2Error,
    StreamReset,
    TrailersReceived,
    WindowOpened,
)

HEAD = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a"), (b":path", b"/")]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Pair:
    """A server and its client."""

    def __init__(self, *, header_bytes: int = 4096, streams: int = 10) -> None:
        self.server = Http2Connection(header_bytes=header_bytes, streams=streams)
        self.client = H2Connection(H2Configuration(header_encoding=None))
        self.client.initiate_connection()
        self.now_s = 0.0
        self.exchange()

    def exchange(self) -> list[Event]:
        """Pass on what either side has to say; return what the server makes of it."""
        events = self.feed(self.client.data_to_send())
        self.client.receive_data(self.server.data_to_send())
        return [*events, *self.feed(self.client.data_to_send())]

    def feed(self, *data: bytes | Frame) -> list[Event]:
        """Give the server bytes or frames."""
        self.server.receive(b"".join(item.serialize() if isinstance(item, Frame) else item for item in data))
        events: list[Event] = []
        while (found := self.server.next_events(self.now_s)) is not None:
            events += found
        return events

    def refused(self, *data: bytes | Frame) -> tuple[str, ErrorCodes]:
        """Give the server what it must refuse; return the rule and the error code of its GOAWAY."""
        with pytest.raises(Http2Error) as caught:
            self.feed(*data)
        goaway = self.server.data_to_send()[-17:]
        assert goaway[:5] == b"\x00\x00\x08\x07\x00"
        return caught.value.rule, ErrorCodes(int.from_bytes(goaway[13:], "big"))


def headers(pair: Pair, stream_id: int, flags: tuple[str, ...] = ("END_HEADERS", "END_STREAM")) -> HeadersFrame:
    return HeadersFrame(stream_id, data=pair.client.encoder.encode(HEAD), flags=flags)


def test_a_request_with_body_and_trailers() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD)
    pair.client.send_data(1, b"abc", pad_length=4)
    pair.client.send_headers(1, [(b"x", b"y")], end_stream=True)
    assert pair.exchange() == [
        HeadersReceived(1, HEAD, ended=False),
        DataReceived(1, b"abc", 8, ended=False),
        TrailersReceived(1, [(b"x", b"y")]),
    ]
    pair.client.send_headers(3, HEAD, end_stream=True)
    assert pair.exchange() == [HeadersReceived(3, HEAD, ended=True)]
    pair.server.send_headers(3, [(b":status", b"200")], ended=False)
    pair.server.send_data(3, b"hello", ended=True)
    received = pair.client.receive_data(pair.server.data_to_send())
    assert [type(event).__name__ for event in received] == ["ResponseReceived", "DataReceived", "StreamEnded"]


def test_bytes_that_come_one_by_one_read_the_same() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD)
    pair.client.send_data(1, b"abc", end_stream=True)
    data = pair.client.data_to_send()
    events = [event for index in range(len(data)) for event in pair.feed(data[index : index + 1])]
    assert events == [HeadersReceived(1, HEAD, ended=False), DataReceived(1, b"abc", 3, ended=True)]


def test_one_frame_at_a_time() -> None:
    pair = Pair()
    for stream_id in (1, 3):
        pair.client.send_headers(stream_id, HEAD, end_stream=True)
    pair.server.receive(pair.client.data_to_send())
    for stream_id in (1, 3):
        assert pair.server.next_events(0) == [HeadersReceived(stream_id, HEAD, ended=True)]
    assert pair.server.next_events(0) is None


def test_what_the_client_is_told_first() -> None:
    pair = Pair(header_bytes=5000, streams=7)
    settings = pair.client.remote_settings
    assert (settings.max_concurrent_streams, settings.max_header_list_size) == (7, 5000)
    assert settings.initial_window_size == STREAM_WINDOW_BYTES
    assert pair.client.outbound_flow_control_window == CONNECTION_WINDOW_BYTES


def test_windows_open_again_as_data_is_consumed() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD)
    for _ in range(STREAM_WINDOW_BYTES // 16384):
        pair.client.send_data(1, bytes(16384))
    pair.exchange()
    assert pair.client.local_flow_control_window(1) == 0
    pair.server.consumed(1, STREAM_WINDOW_BYTES)
    pair.exchange()
    assert pair.client.local_flow_control_window(1) == STREAM_WINDOW_BYTES
    # This one opens again by halves.
    assert pair.client.outbound_flow_control_window >= CONNECTION_WINDOW_BYTES // 2


def test_data_for_a_stream_that_has_been_reset_keeps_the_connections_window_whole() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD)
    pair.exchange()
    pair.server.reset(1, ErrorCodes.CANCEL)
    for _ in range(5):
        pair.client.send_data(1, bytes(16384))
    assert not [event for event in pair.exchange() if isinstance(event, DataReceived)]
    assert pair.client.outbound_flow_control_window >= CONNECTION_WINDOW_BYTES - (1 << 17)


def test_room_and_when_there_is_more() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD, end_stream=True)
    pair.exchange()
    assert pair.server.room(1) == 16384
    pair.server.send_headers(1, [(b":status", b"200")], ended=False)
    while pair.server.room(1):
        pair.server.send_data(1, bytes(pair.server.room(1)), ended=False)
    pair.client.receive_data(pair.server.data_to_send())
    pair.client.increment_flow_control_window(10, 1)
    pair.client.increment_flow_control_window(5)
    assert pair.exchange() == [WindowOpened(1), WindowOpened(0)]
    assert pair.server.room(1) == 5


def test_settings_may_open_windows_too() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD, end_stream=True)
    pair.exchange()
    pair.client.update_settings({4: 1 << 20})
    assert WindowOpened(1) in pair.exchange()


def test_a_client_that_leaves_may_still_be_answered() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD, end_stream=True)
    pair.exchange()
    assert not pair.server.client_leaves
    assert pair.feed(b"\x00\x00\x08\x07\x00" + bytes(12)) == []
    assert pair.server.client_leaves
    pair.server.send_headers(1, [(b":status", b"200")], ended=True)
    assert pair.client.receive_data(pair.server.data_to_send())


def test_the_end_is_announced_and_then_meant() -> None:
    pair = Pair()
    pair.client.send_headers(1, HEAD, end_stream=True)
    pair.exchange()
    assert pair.server.announce_end() == b"\x00\x00\x08\x07\x00" + bytes(4) + b"\x7f\xff\xff\xff" + bytes(4)
    pair.server.close()
    assert pair.server.data_to_send() == b"\x00\x00\x08\x07\x00" + bytes(4) + b"\x00\x00\x00\x01" + bytes(4)


def test_no_preface_no_conversation() -> None:
    server = Http2Connection(header_bytes=4096, streams=1)
    server.receive(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with pytest.raises(Http2Error, match="http2_protocol_error"):
        server.next_events(0)


def test_a_frame_too_large_is_refused_by_its_length() -> None:
    pair = Pair()
    assert pair.refused(b"\x00\x40\x01\x00\x00\x00\x00\x00\x01") == (
        "http2_frame_too_large",
        ErrorCodes.FRAME_SIZE_ERROR,
    )


def test_a_stream_too_many_is_refused_alone() -> None:
    pair = Pair(streams=2)
    events = pair.feed(headers(pair, 1), headers(pair, 3), headers(pair, 5))
    assert events == [HeadersReceived(1, HEAD, ended=True), HeadersReceived(3, HEAD, ended=True)]
    assert pair.server.data_to_send() == b"\x00\x00\x04\x03\x00" + bytes((0, 0, 0, 5, 0, 0, 0, 7))
    pair.server.send_headers(3, [(b":status", b"200")], ended=True)
    assert pair.feed(headers(pair, 7)) == [HeadersReceived(7, HEAD, ended=True)]
    assert pair.refused(*(headers(pair, n) for n in range(9, 500, 2)))[0] == "http2_flood"


def test_settings_that_nobody_knows_are_not_kept() -> None:
    pair = Pair()
    known = len(pair.server._h2.remote_settings)
    unknown = b"".join(code.to_bytes(2, "big") + bytes(4) for code in range(256, 2956))
    pair.feed(len(unknown).to_bytes(3, "big") + b"\x04\x00" + bytes(4) + unknown)
    assert len(pair.server._h2.remote_settings) == known


def test_the_table_for_heads_is_no_larger_than_the_initial_one() -> None:
    pair = Pair()
    pair.client.update_settings({SettingCodes.HEADER_TABLE_SIZE: 1 << 20})
    pair.exchange()
    for stream_id in range(1, 101, 2):
        pair.client.send_headers(stream_id, HEAD, end_stream=True)
        pair.exchange()
        pair.server.send_headers(stream_id, [(b":status", b"200"), (b"x", b"%d" % stream_id * 300)], ended=True)
        pair.client.receive_data(pair.server.data_to_send())
    assert sum(len(name) + len(value) for name, value in pair.client.decoder.header_table.dynamic_entries) < 4096


def test_a_head_that_unpacks_to_too_much() -> None:
    pair = Pair(header_bytes=4096)
    block = pair.client.encoder.encode([*HEAD, (b"x", b"y" * 3000)])
    again = pair.client.encoder.encode([(b"x", b"y" * 3000)])
    assert len(again) < 10
    # Twice of what is allowed is read: it is answered then.
    frame = HeadersFrame(1, data=block + again, flags=("END_HEADERS", "END_STREAM"))
    assert isinstance(pair.feed(frame)[0], HeadersReceived)
    frame = HeadersFrame(3, data=again * 3, flags=("END_HEADERS", "END_STREAM"))
    assert pair.refused(frame) == ("header_too_large", ErrorCodes.ENHANCE_YOUR_CALM)


def test_a_head_is_not_held_before_it_is_read() -> None:
    pair = Pair(header_bytes=4096)
    frames = [ContinuationFrame(1, data=bytes(4096)) for _ in range(2)]
    assert pair.refused(HeadersFrame(1, data=bytes(4096)), *frames)[0] == "header_too_large"


def test_a_head_without_end() -> None:
    pair = Pair()
    frames = [ContinuationFrame(1, data=b"") for _ in range(100)]
    assert pair.refused(headers(pair, 1, ()), *frames)[0] == "http2_protocol_error"


@pytest.mark.parametrize(
    "frame",
    [
        PingFrame(0, opaque_data=bytes(8)),
        PriorityFrame(9, depends_on=0),
        DataFrame(1),
        DataFrame(1, pad_length=9, flags=("PADDED",)),
        b"\x00\x00\x00\xaa\x00" + bytes(4),
    ],
    ids=["ping", "priority", "empty data", "padding", "unknown"],
)
def test_floods_end_the_connection(frame: Frame | bytes) -> None:
    pair = Pair()
    pair.feed(headers(pair, 1, ("END_HEADERS",)))
    pair.feed(*[frame] * 900)
    pair.now_s = 10.0
    pair.feed(*[frame] * 400)
    assert pair.refused(*[frame] * 300) == ("http2_flood", ErrorCodes.ENHANCE_YOUR_CALM)


def test_requests_taken_back_at_once_end_the_connection() -> None:
    pair = Pair()

    def cycle(n: int) -> list[Frame]:
        return [headers(pair, 2 * n + 1), RstStreamFrame(2 * n + 1, error_code=ErrorCodes.CANCEL)]

    events = pair.feed(*(frame for n in range(190) for frame in cycle(n)))
    assert events[-1] == StreamReset(379)
    assert pair.refused(*(frame for n in range(190, 220) for frame in cycle(n)))[0] == "http2_flood"


def test_resets_that_a_client_provokes_count_as_its_own() -> None:
    pair = Pair()

    def cycle(n: int) -> list[Frame | bytes]:
        overflow = b"\x00\x00\x04\x08\x00" + (2 * n + 1).to_bytes(4, "big") + b"\x7f\xff\xff\xff"
        return [headers(pair, 2 * n + 1), overflow]

    events = pair.feed(*(frame for n in range(150) for frame in cycle(n)))
    assert StreamReset(299) in events
    assert pair.refused(*(frame for n in range(150, 250) for frame in cycle(n)))[0] == "http2_flood"


def test_many_requests_are_no_flood() -> None:
    pair = Pair()
    for n in range(5000):
        assert pair.feed(headers(pair, 2 * n + 1)) == [HeadersReceived(2 * n + 1, HEAD, ended=True)]
        pair.server.send_headers(2 * n + 1, [(b":status", b"204")], ended=True)
