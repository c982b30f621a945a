# cython: language_level=3, embedsignature=False
"""The system's OpenSSL as the engine needs it: three thin classes over the C files beside it.

Nothing here decides anything: engine.py holds the rules, _connection.c the calls. Every method runs libssl in the
calling thread, with the GIL; an object belongs to one thread.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset


cdef extern from "Python.h":
    PyObject *PyBytes_New "PyBytes_FromStringAndSize"(const char *data, Py_ssize_t size) except NULL
    int _PyBytes_Resize(PyObject **data, Py_ssize_t size) except -1
    void Py_DECREF(PyObject *object)


cdef extern from "openssl/async.h":
    int ASYNC_is_capable()


cdef extern from "openssl/crypto.h":
    const char *OpenSSL_version(int kind)
    void OPENSSL_cleanse(void *data, size_t len)
    void OPENSSL_free(void *data)
    const int OPENSSL_VERSION


cdef extern from "openssl/err.h":
    unsigned long ERR_get_error()
    void ERR_clear_error()
    const char *ERR_reason_error_string(unsigned long error)


cdef extern from "openssl/ssl.h":
    ctypedef struct SSL_CTX
    ctypedef struct SSL
    void SSL_CTX_free(SSL_CTX *ctx)
    int SSL_session_reused(const SSL *ssl)
    const char *SSL_get_version(const SSL *ssl)
    const char *SSL_get_cipher_name(const SSL *ssl)
    int SSL_get_negotiated_group(SSL *ssl)
    const char *SSL_group_to_name(SSL *ssl, int group)
    void SSL_get0_alpn_selected(const SSL *ssl, const unsigned char **data, unsigned int *len)
    X509 *SSL_get0_peer_certificate(const SSL *ssl)
    const int TLS1_2_VERSION
    const int TLS1_3_VERSION


cdef extern from "openssl/x509.h":
    ctypedef struct X509
    int i2d_X509(const X509 *certificate, unsigned char **der)


cdef extern from "_provider.h":
    enum hsm_sign_state:
        HSM_SIGN_WANTED
        HSM_SIGN_READY
        HSM_SIGN_CANCELLED
    struct hsm_sign:
        hsm_sign_state state
        unsigned int scheme
        unsigned int handle
        const unsigned char *tbs
        size_t tbs_len
        const unsigned char *signature
        size_t signature_len
        size_t signature_max
    long hsm_live_jobs()


cdef extern from "_connection.h":
    const int TLS_TICKET_KEYS_MAX
    const int TLS_TICKET_NAME_BYTES
    const int TLS_TICKET_SECRET_BYTES
    const int TLS_HELLO_FIELDS
    const int TLS_CLIENT_VERIFIER_ID_BYTES
    enum tls_status:
        TLS_OK
        TLS_WANT_DATA
        TLS_WANT_CERTIFICATE
        TLS_WANT_SIGNATURE
        TLS_BUFFER_FULL
        TLS_CLOSE_NOTIFY
        TLS_FAILED
    enum tls_client_fault:
        TLS_CLIENT_NOT_AT_FAULT
        TLS_CLIENT_WITHOUT_CERTIFICATE
        TLS_CLIENT_REFUSED
    struct tls_client_verifier:
        pass
    struct tls_ticket_key:
        unsigned char *name
        unsigned char *aes
        unsigned char *hmac
    struct tls_settings:
        unsigned char *alpn
        unsigned int alpn_len
        tls_ticket_key *ticket_keys
        int ticket_key_count
    struct tls_connection:
        SSL *ssl
        hsm_sign sign
        const unsigned char *input
        size_t input_len
        unsigned char *output
        size_t output_len
        unsigned char *hello
        size_t *hello_len
        unsigned int hello_present
        unsigned int hello_version
        int alert_sent
        int alert_received
        bint flooded
    int tls_library_init()
    tls_client_verifier *tls_client_verifier_new(int required, int depth, int64_t crls_expire, const unsigned char *id)
    int tls_client_verifier_add_ca(tls_client_verifier *verifier, const unsigned char *der, size_t len)
    int tls_client_verifier_add_crl(tls_client_verifier *verifier, const unsigned char *der, size_t len)
    void tls_client_verifier_free(tls_client_verifier *verifier)
    SSL_CTX *tls_context_new(const unsigned char *const *chain, const size_t *chain_len, size_t count,
                             unsigned int handle, int min_version, int max_version, const char *schemes,
                             const tls_settings *settings, tls_client_verifier *verifier)
    int tls_connection_init(tls_connection *connection, SSL_CTX *ctx, const tls_settings *settings)
    void tls_connection_free(tls_connection *connection)
    tls_status tls_handshake(tls_connection *connection)
    int tls_use_context(tls_connection *connection, SSL_CTX *ctx)
    tls_status tls_read(tls_connection *connection, unsigned char *plaintext, size_t size, size_t *len)
    tls_status tls_write(tls_connection *connection, const unsigned char *plaintext, size_t len)
    tls_status tls_close(tls_connection *connection)
    tls_client_fault tls_client_fault_of(const tls_connection *connection, const char **reason)
    char *tls_subject(const X509 *certificate)
    int tls_common_name(const X509 *certificate, unsigned char **utf8)
    void tls_output_taken(tls_connection *connection)


OK = TLS_OK
WANT_DATA = TLS_WANT_DATA
WANT_CERTIFICATE = TLS_WANT_CERTIFICATE
WANT_SIGNATURE = TLS_WANT_SIGNATURE
BUFFER_FULL = TLS_BUFFER_FULL
CLOSE_NOTIFY = TLS_CLOSE_NOTIFY
FAILED = TLS_FAILED

CLIENT_NOT_AT_FAULT = TLS_CLIENT_NOT_AT_FAULT
CLIENT_WITHOUT_CERTIFICATE = TLS_CLIENT_WITHOUT_CERTIFICATE
CLIENT_REFUSED = TLS_CLIENT_REFUSED

TLS1_2 = TLS1_2_VERSION
TLS1_3 = TLS1_3_VERSION

cdef enum:
    CHAIN_MAX = 16
    PLAINTEXT_RECORD_MAX = 16384  # RFC 8446 section 5.1

MAX_CHAIN = CHAIN_MAX


class OpenSSLError(Exception):
    """OpenSSL refused; the message is its reason."""


cdef str take_reason():
    """The first error's reason: the one nearest to the cause."""
    cdef const char *reason = ERR_reason_error_string(ERR_get_error())
    ERR_clear_error()
    return "unknown reason" if reason == NULL else reason.decode("ascii", "replace")


if not ASYNC_is_capable():
    raise ImportError("an OpenSSL with ASYNC jobs expected; this one cannot suspend a handshake (musl's cannot)")
if not tls_library_init():
    raise ImportError(f"OpenSSL cannot be set up: {take_reason()}")

LIBRARY_VERSION = OpenSSL_version(OPENSSL_VERSION).decode("ascii", "replace")


def live_jobs():
    return hsm_live_jobs()


cdef class Settings:
    cdef tls_settings _settings
    cdef bytes _alpn

    def __cinit__(self):
        memset(&self._settings, 0, sizeof(self._settings))

    def __init__(self, bytes alpn):
        self._alpn = alpn
        if alpn:
            self._settings.alpn = <unsigned char *>PyBytes_AS_STRING(alpn)
            self._settings.alpn_len = <unsigned int>PyBytes_GET_SIZE(alpn)

    def set_ticket_keys(self, list keys):
        cdef tls_ticket_key *key
        cdef bytes name, aes, hmac
        if not 1 <= len(keys) <= TLS_TICKET_KEYS_MAX:
            raise ValueError(f"1 to {TLS_TICKET_KEYS_MAX} ticket keys expected; got {len(keys)}")
        for name, aes, hmac in keys:
            if (len(name), len(aes), len(hmac)) != (
                TLS_TICKET_NAME_BYTES, TLS_TICKET_SECRET_BYTES, TLS_TICKET_SECRET_BYTES
            ):
                raise ValueError("ticket keys of 16, 32 and 32 bytes expected")
        self._forget_ticket_keys()
        for name, aes, hmac in keys:
            key = &self._settings.ticket_keys[self._settings.ticket_key_count]
            memcpy(key.name, PyBytes_AS_STRING(name), TLS_TICKET_NAME_BYTES)
            memcpy(key.aes, PyBytes_AS_STRING(aes), TLS_TICKET_SECRET_BYTES)
            memcpy(key.hmac, PyBytes_AS_STRING(hmac), TLS_TICKET_SECRET_BYTES)
            self._settings.ticket_key_count += 1

    cdef void _forget_ticket_keys(self):
        self._settings.ticket_key_count = 0
        OPENSSL_cleanse(self._settings.ticket_keys, TLS_TICKET_KEYS_MAX * sizeof(tls_ticket_key))

    def __dealloc__(self):
        self._forget_ticket_keys()


cdef class ClientVerifier:
    cdef tls_client_verifier *_verifier

    def __init__(self, bint required, int depth, int64_t crls_expire, bytes verifier_id not None, tuple cas, tuple crls):
        cdef bytes der
        if len(verifier_id) != TLS_CLIENT_VERIFIER_ID_BYTES:
            raise ValueError(f"an id of {TLS_CLIENT_VERIFIER_ID_BYTES} bytes expected; got {len(verifier_id)}")
        self._verifier = tls_client_verifier_new(
            required, depth, crls_expire, <const unsigned char *>PyBytes_AS_STRING(verifier_id)
        )
        if self._verifier == NULL:
            raise MemoryError("no memory for a verifier of clients")
        for der in cas:
            if not tls_client_verifier_add_ca(
                self._verifier, <const unsigned char *>PyBytes_AS_STRING(der), <size_t>PyBytes_GET_SIZE(der)
            ):
                raise OpenSSLError(take_reason())
        for der in crls:
            if not tls_client_verifier_add_crl(
                self._verifier, <const unsigned char *>PyBytes_AS_STRING(der), <size_t>PyBytes_GET_SIZE(der)
            ):
                raise OpenSSLError(take_reason())

    def __dealloc__(self):
        tls_client_verifier_free(self._verifier)


# no_gc: what these two hold cannot form cycles, and must outlive the C structures that point into it.
@cython.no_gc
cdef class Context:
    cdef SSL_CTX *_ctx
    cdef Settings _settings
    cdef ClientVerifier _verifier

    def __init__(
        self,
        tuple chain,
        unsigned int handle,
        int min_version,
        int max_version,
        bytes schemes not None,
        Settings settings not None,
        ClientVerifier verifier,
    ):
        cdef const unsigned char *pointers[CHAIN_MAX]
        cdef size_t lengths[CHAIN_MAX]
        cdef bytes certificate
        cdef int count = 0
        if not 1 <= len(chain) <= CHAIN_MAX:
            raise ValueError(f"a chain of 1 to {CHAIN_MAX} certificates expected; got {len(chain)}")
        for certificate in chain:
            pointers[count] = <const unsigned char *>PyBytes_AS_STRING(certificate)
            lengths[count] = <size_t>PyBytes_GET_SIZE(certificate)
            count += 1
        self._settings = settings
        self._verifier = verifier
        self._ctx = tls_context_new(
            pointers,
            lengths,
            count,
            handle,
            min_version,
            max_version,
            PyBytes_AS_STRING(schemes),
            &settings._settings,
            NULL if verifier is None else verifier._verifier,
        )
        if self._ctx == NULL:
            raise OpenSSLError(take_reason())

    def __dealloc__(self):
        SSL_CTX_free(self._ctx)


@cython.no_gc
cdef class Connection:
    cdef tls_connection _connection
    cdef Settings _settings
    cdef ClientVerifier _verifier
    cdef bytes _input
    cdef readonly str reason
    cdef readonly int client_fault

    def __cinit__(self, Context context not None):
        self._settings = context._settings
        self._verifier = context._verifier
        if not tls_connection_init(&self._connection, context._ctx, &context._settings._settings):
            raise MemoryError("no memory for a TLS connection")

    def __dealloc__(self):
        tls_connection_free(&self._connection)
        tls_output_taken(&self._connection)

    @property
    def input_bytes(self):
        return self._connection.input_len

    @property
    def output_bytes(self):
        return self._connection.output_len

    @property
    def alert_sent(self):
        return None if self._connection.alert_sent < 0 else self._connection.alert_sent

    @property
    def alert_received(self):
        return None if self._connection.alert_received < 0 else self._connection.alert_received

    def feed(self, bytes data not None):
        if self._connection.input_len:
            data = (<const char *>self._connection.input)[: self._connection.input_len] + data
        self._input = data
        self._connection.input = <const unsigned char *>PyBytes_AS_STRING(data)
        self._connection.input_len = <size_t>PyBytes_GET_SIZE(data)

    cdef int _ended(self, tls_status status):
        cdef const char *reason
        if status == TLS_FAILED:
            self.client_fault = tls_client_fault_of(&self._connection, &reason)
            if self.client_fault != TLS_CLIENT_NOT_AT_FAULT:
                self.reason = reason.decode("ascii", "replace")
            else:
                self.reason = "too many handshake messages" if self._connection.flooded else take_reason()
        if self._connection.input_len == 0:
            self._input = None
        return status

    def handshake(self):
        self._live()
        return self._ended(tls_handshake(&self._connection))

    def client_hello(self):
        cdef list fields = [self._connection.hello_version]
        cdef const unsigned char *at = self._connection.hello
        cdef size_t length, total = 0
        for i in range(TLS_HELLO_FIELDS):
            length = self._connection.hello_len[i]
            fields.append((<const char *>at)[:length] if self._connection.hello_present >> i & 1 else None)
            at += length
            total += length
        return tuple(fields), total

    def use_context(self, Context context not None):
        self._live()
        if not tls_use_context(&self._connection, context._ctx):
            raise MemoryError("no memory for a TLS connection")

    def signature_request(self):
        cdef hsm_sign *sign = &self._connection.sign
        if sign.state != HSM_SIGN_WANTED:
            raise ValueError("no signature is wanted")
        return sign.scheme, sign.handle, (<const char *>sign.tbs)[: sign.tbs_len], sign.signature_max

    def sign(self, bytes signature):
        cdef hsm_sign *sign = &self._connection.sign
        cdef tls_status status
        if sign.state != HSM_SIGN_WANTED:
            raise ValueError("no signature is wanted")
        if signature is None:
            sign.state = HSM_SIGN_CANCELLED
        else:
            sign.state = HSM_SIGN_READY
            sign.signature = <const unsigned char *>PyBytes_AS_STRING(signature)
            sign.signature_len = <size_t>PyBytes_GET_SIZE(signature)
        status = tls_handshake(&self._connection)
        sign.signature = NULL
        return self._ended(status)

    def session(self):
        cdef SSL *ssl = self._live()
        cdef const unsigned char *alpn
        cdef unsigned int alpn_len
        cdef const char *group = SSL_group_to_name(ssl, SSL_get_negotiated_group(ssl))
        SSL_get0_alpn_selected(ssl, &alpn, &alpn_len)
        return (
            SSL_get_version(ssl).decode("ascii"),
            SSL_get_cipher_name(ssl).decode("ascii"),
            None if group == NULL else group.decode("ascii"),
            (<const char *>alpn)[:alpn_len] if alpn_len else None,
            SSL_session_reused(ssl) == 1,
        )

    def client_certificate(self):
        cdef X509 *certificate = SSL_get0_peer_certificate(self._live())
        cdef unsigned char *der = NULL
        cdef unsigned char *common_name = NULL
        cdef char *subject = NULL
        cdef int der_len, common_name_len
        if certificate == NULL:
            return None
        try:
            der_len = i2d_X509(certificate, &der)
            subject = tls_subject(certificate)
            if der_len < 0 or subject == NULL:
                raise MemoryError("no memory for a client's certificate")
            common_name_len = tls_common_name(certificate, &common_name)
            return (
                (<const char *>der)[:der_len],
                subject.decode("ascii"),
                None if common_name_len < 0 else (<const char *>common_name)[:common_name_len].decode("utf-8", "replace"),
            )
        finally:
            OPENSSL_free(der)
            OPENSSL_free(subject)
            OPENSSL_free(common_name)

    def read(self):
        cdef size_t size, length
        cdef PyObject *plaintext
        cdef tls_status status
        self._live()
        # One allocation, decrypted into in place: plaintext is never longer than its ciphertext, and libssl holds at
        # most one unfinished record from before.
        size = self._connection.input_len + PLAINTEXT_RECORD_MAX
        plaintext = PyBytes_New(NULL, <Py_ssize_t>size)
        status = tls_read(&self._connection, <unsigned char *>PyBytes_AS_STRING(<object>plaintext), size, &length)
        _PyBytes_Resize(&plaintext, <Py_ssize_t>length)
        result = <bytes>plaintext
        Py_DECREF(plaintext)
        return self._ended(status), result

    def write(self, bytes plaintext not None):
        self._live()
        return self._ended(
            tls_write(
                &self._connection,
                <const unsigned char *>PyBytes_AS_STRING(plaintext),
                <size_t>PyBytes_GET_SIZE(plaintext),
            )
        )

    def close(self):
        self._live()
        return self._ended(tls_close(&self._connection))

    def take_output(self):
        cdef bytes output
        if self._connection.output_len == 0:
            return b""
        output = PyBytes_FromStringAndSize(<const char *>self._connection.output, self._connection.output_len)
        tls_output_taken(&self._connection)
        return output

    def free(self):
        tls_connection_free(&self._connection)
        self._connection.input_len = 0
        self._input = None

    cdef SSL *_live(self) except NULL:
        if self._connection.ssl == NULL:
            raise ValueError("the connection was freed")
        return self._connection.ssl
