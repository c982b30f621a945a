/* One server-side TLS connection over memory (_connection.c), and what it shares with others (_context.c). */
#ifndef TLSPROXY_CONNECTION_H
#define TLSPROXY_CONNECTION_H

#include <stddef.h>
#include <stdint.h>

#include <openssl/ssl.h>

#include "_provider.h"

#define TLS_TICKET_KEYS_MAX 16
#define TLS_TICKET_NAME_BYTES 16
#define TLS_TICKET_SECRET_BYTES 32
#define TLS_CLIENT_VERIFIER_ID_BYTES 32
#define TLS_CLIENT_CHAIN_MAX_BYTES 32768

struct tls_ticket_key {
    unsigned char name[TLS_TICKET_NAME_BYTES];
    unsigned char aes[TLS_TICKET_SECRET_BYTES];
    unsigned char hmac[TLS_TICKET_SECRET_BYTES];
};

/* What all connections of one listener share. It must outlive them. */
struct tls_settings {
    unsigned char *alpn; /* our protocols in wire format (RFC 7301 section 3.1); NULL: the extension is ignored */
    unsigned int alpn_len;
    struct tls_ticket_key ticket_keys[TLS_TICKET_KEYS_MAX]; /* the first encrypts, all decrypt */
    int ticket_key_count;
};

/* The parts of a ClientHello that the choice of a certificate depends on. */
enum tls_hello_field {
    TLS_HELLO_CIPHER_SUITES,
    TLS_HELLO_SERVER_NAME,
    TLS_HELLO_SIGNATURE_ALGORITHMS,
    TLS_HELLO_SUPPORTED_GROUPS,
    TLS_HELLO_SUPPORTED_VERSIONS,
    TLS_HELLO_ALPN,
    TLS_HELLO_FIELDS,
};

enum tls_hello_state { TLS_HELLO_AWAITED, TLS_HELLO_TO_ANSWER, TLS_HELLO_ANSWERED };

/* How a call into the connection ended. */
enum tls_status {
    TLS_OK,               /* the handshake is complete; or all plaintext was taken; or all was written */
    TLS_WANT_DATA,        /* the client must send more */
    TLS_WANT_CERTIFICATE, /* hello[] is filled: choose with tls_use_context, then call tls_handshake again */
    TLS_WANT_SIGNATURE,   /* sign.scheme, .handle and .tbs are filled: see struct hsm_sign */
    TLS_BUFFER_FULL,      /* more plaintext may follow: call tls_read again */
    TLS_CLOSE_NOTIFY,     /* the client has sent close_notify */
    TLS_FAILED,           /* the connection is of no further use; the error queue and alerts say why */
};

enum tls_client_fault { TLS_CLIENT_NOT_AT_FAULT, TLS_CLIENT_WITHOUT_CERTIFICATE, TLS_CLIENT_REFUSED };

struct tls_connection {
    SSL *ssl;
    const struct tls_settings *settings;
    struct hsm_sign sign;

    const unsigned char *input; /* ciphertext from the client, not yet consumed; the caller's memory */
    size_t input_len;
    unsigned char *output; /* ciphertext for the client */
    size_t output_len, output_capacity;

    enum tls_hello_state hello_state;
    unsigned char *hello; /* one block; the fields stand in it one after the other */
    size_t hello_len[TLS_HELLO_FIELDS];
    unsigned int hello_present; /* a bit for each field */
    unsigned int hello_version; /* legacy_version */

    int alert_sent, alert_received; /* fatal ones; -1: none */
    int signing;                    /* a job has paused for the signature, and is not left yet */
    int established, flooded;
    uint64_t plaintext_bytes, post_handshake_messages; /* received since the handshake */
};

/* Prepares this process: allocator, library context, BIO method, ticket cipher. Returns 1, or 0 on failure (the error
 * queue says why). */
int tls_library_init(void);

/* How a listener verifies clients' certificates: by CAs and, if there are any, by CRLs of all of them. `depth` is how
 * many CAs may stand between the client's and one that issued itself; `id` is a digest of all that is decided by. */
struct tls_client_verifier *tls_client_verifier_new(int required, int depth, int64_t crls_expire,
                                                    const unsigned char *id);

/* Both take DER, and return 1, or 0 on failure (the error queue says why). */
int tls_client_verifier_add_ca(struct tls_client_verifier *verifier, const unsigned char *der, size_t len);
int tls_client_verifier_add_crl(struct tls_client_verifier *verifier, const unsigned char *der, size_t len);

void tls_client_verifier_free(struct tls_client_verifier *verifier);

/* A server context for one certificate chain (DER, leaf first) whose key the signer knows by `handle`, for protocol
 * versions TLS1_2_VERSION and TLS1_3_VERSION, or one of them. `schemes`: IANA names, with colons between, in order of
 * preference. Clients are asked for certificates if there is a `verifier`, which must outlive the context. NULL on
 * failure (the error queue says why). */
SSL_CTX *tls_context_new(const unsigned char *const *chain, const size_t *chain_len, size_t count, unsigned int handle,
                         int min_version, int max_version, const char *schemes, const struct tls_settings *settings,
                         struct tls_client_verifier *verifier);

/* Fills `connection`. Returns 1, or 0 when out of memory. */
int tls_connection_init(struct tls_connection *connection, SSL_CTX *ctx, const struct tls_settings *settings);

/* Ends a paused job, if there is one, and frees everything but the output. May be called again. */
void tls_connection_free(struct tls_connection *connection);

/* Goes on with the handshake, as far as the input and the answers given so far allow. */
enum tls_status tls_handshake(struct tls_connection *connection);

/* Answers TLS_WANT_CERTIFICATE. Returns 1, or 0 when out of memory. */
int tls_use_context(struct tls_connection *connection, SSL_CTX *ctx);

/* After TLS_FAILED: whether it is for the client's certificate, and then why. `reason` is a constant text. */
enum tls_client_fault tls_client_fault_of(const struct tls_connection *connection, const char **reason);

/* The subject as RFC 4514 has it, all but printable ASCII escaped. Freed with OPENSSL_free; NULL when out of memory. */
char *tls_subject(const X509 *certificate);

/* The subject's first common name; returns its length, or less than 0 without one. Freed with OPENSSL_free. */
int tls_common_name(const X509 *certificate, unsigned char **utf8);

/* Frees the output: it was taken. */
void tls_output_taken(struct tls_connection *connection);

/* Decrypts what is there, at most `size` bytes, into `plaintext`; the number of bytes goes to *len. */
enum tls_status tls_read(struct tls_connection *connection, unsigned char *plaintext, size_t size, size_t *len);

/* Encrypts all of `plaintext` to the output. */
enum tls_status tls_write(struct tls_connection *connection, const unsigned char *plaintext, size_t len);

/* Appends a close_notify to the output. */
enum tls_status tls_close(struct tls_connection *connection);

#endif
