"""Types of the compiled module; see _openssl.pyx."""

from tlsproxy.tls.client_hello import ClientHelloFields

OK: int
"""The handshake is complete; or all plaintext was taken; or all was written."""
WANT_DATA: int
"""The client must send more."""
WANT_CERTIFICATE: int
"""See Connection.client_hello; answer with Connection.use_context, then call handshake again."""
WANT_SIGNATURE: int
"""See Connection.signature_request; answer with Connection.sign."""
BUFFER_FULL: int
"""More plaintext may follow: call read again."""
CLOSE_NOTIFY: int
"""The client has sent close_notify."""
FAILED: int
"""The connection is of no further use: reason, alert_sent and alert_received say why."""

CLIENT_NOT_AT_FAULT: int
CLIENT_WITHOUT_CERTIFICATE: int
CLIENT_REFUSED: int

TLS1_2: int
TLS1_3: int
MAX_CHAIN: int
LIBRARY_VERSION: str

class OpenSSLError(Exception): ...

def live_jobs() -> int: ...

class Settings:
    """What the connections of one listener share: `alpn` in wire format (empty: ignore the extension), ticket keys."""

    def __init__(self, alpn: bytes) -> None: ...
    def set_ticket_keys(self, keys: list[tuple[bytes, bytes, bytes]]) -> None:
        """Names, AES keys and HMAC keys (16, 32, 32 bytes); the first encrypts. Raises ValueError."""

class ClientVerifier:
    """How clients' certificates are verified: by `cas` and, if there are any, by `crls` of all of them (DER).

    `depth` is how many CAs may stand between the client's certificate and a root; `crls_expire` is in seconds since the
    epoch; `verifier_id` are 32 bytes that differ between all that decides. Raises OpenSSLError, ValueError."""

    def __init__(
        self,
        required: bool,
        depth: int,
        crls_expire: int,
        verifier_id: bytes,
        cas: tuple[bytes, ...],
        crls: tuple[bytes, ...],
    ) -> None: ...

class Context:
    """A certificate chain (DER, leaf first) whose key the signer knows by `handle`; `schemes` as IANA names, with
    colons between them, in order of preference. Raises OpenSSLError, ValueError."""

    def __init__(
        self,
        chain: tuple[bytes, ...],
        handle: int,
        min_version: int,
        max_version: int,
        schemes: bytes,
        settings: Settings,
        verifier: ClientVerifier | None,
    ) -> None: ...

class Connection:
    """One server-side connection. Statuses are the module's constants. ValueError on any use after free()."""

    reason: str | None
    client_fault: int
    """After FAILED: CLIENT_NOT_AT_FAULT, or the handshake failed for what its certificate was, as `reason` says."""
    def __init__(self, context: Context) -> None: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def output_bytes(self) -> int: ...
    @property
    def alert_sent(self) -> int | None: ...
    @property
    def alert_received(self) -> int | None: ...
    def feed(self, data: bytes) -> None:
        """Add ciphertext to what was not consumed yet."""
    def handshake(self) -> int:
        """OK, WANT_DATA, WANT_CERTIFICATE, WANT_SIGNATURE, CLOSE_NOTIFY or FAILED."""
    def client_hello(self) -> tuple[ClientHelloFields, int]:
        """(the fields, their bytes in all)."""
    def use_context(self, context: Context) -> None: ...
    def signature_request(self) -> tuple[int, int, bytes, int]:
        """(scheme, handle, tbs, longest signature in bytes). ValueError while none is wanted."""
    def sign(self, signature: bytes | None) -> int:
        """Resume the handshake with the signature, or without one: then it fails. Statuses as of handshake."""
    def session(self) -> tuple[str, str, str | None, bytes | None, bool]:
        """(TLS version, cipher, group, ALPN protocol, resumed) of the completed handshake."""
    def client_certificate(self) -> tuple[bytes, str, str | None] | None:
        """(DER, subject, its first common name) of the client's certificate; resumed handshakes have the first's."""
    def read(self) -> tuple[int, bytes]:
        """(OK, BUFFER_FULL, CLOSE_NOTIFY or FAILED; the plaintext)."""
    def write(self, plaintext: bytes) -> int:
        """OK or FAILED."""
    def close(self) -> int:
        """Send close_notify: OK or FAILED."""
    def take_output(self) -> bytes:
        """The ciphertext for the client. Still works after free()."""
    def free(self) -> None:
        """End a paused job and free what OpenSSL holds. May be called again."""
