/* One server-side TLS connection over memory: its BIO, and the few calls the engine makes.
 *
 * libssl is driven by bytes in memory, and stops where the engine has to decide or to wait: at the ClientHello, for
 * the choice of a certificate (_callbacks.c), and at the signature (_provider.c). */
#include "_connection.h"
#include "_internal.h"

#include <string.h>

#include <openssl/err.h>

#define OUTPUT_MIN_BYTES 4096U

static BIO_METHOD *memory_bio;

/* ---- Memory BIO: reads the caller's bytes in place, writes to one growing buffer ---- */

static int bio_read(BIO *bio, char *data, size_t size, size_t *len) {
    struct tls_connection *connection = BIO_get_data(bio);

    BIO_clear_retry_flags(bio);
    if (connection->flooded)
        return 0;
    if (connection->input_len == 0 || connection->signing) {
        BIO_set_retry_read(bio);
        return 0;
    }
    *len = size < connection->input_len ? size : connection->input_len;
    memcpy(data, connection->input, *len);
    connection->input += *len;
    connection->input_len -= *len;
    return 1;
}

static int bio_write(BIO *bio, const char *data, size_t len, size_t *written) {
    struct tls_connection *connection = BIO_get_data(bio);
    size_t needed = connection->output_len + len;

    BIO_clear_retry_flags(bio);
    if (needed > connection->output_capacity) {
        size_t capacity =
            connection->output_capacity < OUTPUT_MIN_BYTES ? OUTPUT_MIN_BYTES : connection->output_capacity;
        unsigned char *grown;
        while (capacity < needed)
            capacity *= 2;
        grown = OPENSSL_realloc(connection->output, capacity);
        if (grown == NULL)
            return 0;
        connection->output = grown;
        connection->output_capacity = capacity;
    }
    memcpy(connection->output + connection->output_len, data, len);
    connection->output_len = needed;
    *written = len;
    return 1;
}

static long bio_ctrl(BIO *bio, int command, long number, void *pointer) {
    (void)bio;
    (void)number;
    (void)pointer;
    return command == BIO_CTRL_FLUSH;
}

static int bio_create(BIO *bio) {
    BIO_set_init(bio, 1);
    return 1;
}

int tls_bio_init(void) {
    if (memory_bio != NULL)
        return 1;
    memory_bio = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "tlsproxy memory");
    return memory_bio != NULL && BIO_meth_set_read_ex(memory_bio, bio_read) &&
           BIO_meth_set_write_ex(memory_bio, bio_write) && BIO_meth_set_ctrl(memory_bio, bio_ctrl) &&
           BIO_meth_set_create(memory_bio, bio_create);
}

/* ---- The engine's calls ---- */

int tls_connection_init(struct tls_connection *connection, SSL_CTX *ctx, const struct tls_settings *settings) {
    BIO *bio = NULL;

    memset(connection, 0, sizeof *connection);
    connection->settings = settings;
    connection->alert_sent = connection->alert_received = -1;
    connection->ssl = SSL_new(ctx);
    if (connection->ssl == NULL || (bio = BIO_new(memory_bio)) == NULL) {
        SSL_free(connection->ssl);
        connection->ssl = NULL;
        return 0;
    }
    BIO_set_data(bio, connection);
    SSL_set_bio(connection->ssl, bio, bio);
    SSL_set_app_data(connection->ssl, connection);
    SSL_set_accept_state(connection->ssl);
    return 1;
}

void tls_connection_free(struct tls_connection *connection) {
    if (connection->ssl == NULL)
        return;
    if (connection->sign.state == HSM_SIGN_WANTED) {
        /* SSL_free alone would keep the job, its stack and all it holds: it must return first. The alert it ends with
         * is not for the client, who gets what was there before. */
        size_t output_len = connection->output_len;
        int alert_sent = connection->alert_sent;
        connection->sign.state = HSM_SIGN_CANCELLED;
        connection->input_len = 0;
        hsm_enter(&connection->sign);
        (void)SSL_do_handshake(connection->ssl);
        hsm_enter(NULL);
        connection->output_len = output_len;
        connection->alert_sent = alert_sent;
    }
    SSL_free(connection->ssl);
    connection->ssl = NULL;
    ERR_clear_error();
    OPENSSL_free(connection->hello);
    connection->hello = NULL;
}

/* From the signature on nothing pauses, so nothing needs a job. What the client says after it, a certificate perhaps,
 * is not read in one: a job's stack is small, and has no guard page. */
static void leave_jobs(struct tls_connection *connection) {
    connection->signing = 0;
    SSL_clear_mode(connection->ssl, SSL_MODE_ASYNC);
}

enum tls_status tls_handshake(struct tls_connection *connection) {
    int result;

    ERR_clear_error();
    hsm_enter(&connection->sign);
    result = SSL_do_handshake(connection->ssl);
    hsm_enter(NULL);
    if (result == 1) {
        connection->established = 1;
        leave_jobs(connection);
        return TLS_OK;
    }
    switch (SSL_get_error(connection->ssl, result)) {
    case SSL_ERROR_WANT_READ:
        if (connection->signing) {
            leave_jobs(connection);
            if (connection->input_len > 0)
                return tls_handshake(connection);
        }
        return TLS_WANT_DATA;
    case SSL_ERROR_WANT_CLIENT_HELLO_CB:
        return TLS_WANT_CERTIFICATE;
    case SSL_ERROR_WANT_ASYNC:
        connection->signing = 1;
        return TLS_WANT_SIGNATURE;
    case SSL_ERROR_ZERO_RETURN:
        return TLS_CLOSE_NOTIFY;
    default:
        return TLS_FAILED;
    }
}

int tls_use_context(struct tls_connection *connection, SSL_CTX *ctx) {
    connection->hello_state = TLS_HELLO_ANSWERED;
    OPENSSL_free(connection->hello);
    connection->hello = NULL;
    ERR_clear_error();
    /* SSL_set_SSL_CTX takes over the certificate, not the versions. */
    return SSL_set_SSL_CTX(connection->ssl, ctx) != NULL &&
           SSL_set_max_proto_version(connection->ssl, SSL_CTX_get_max_proto_version(ctx)) == 1;
}

void tls_output_taken(struct tls_connection *connection) {
    OPENSSL_free(connection->output);
    connection->output = NULL;
    connection->output_len = connection->output_capacity = 0;
}

enum tls_status tls_read(struct tls_connection *connection, unsigned char *plaintext, size_t size, size_t *len) {
    size_t taken;

    *len = 0;
    while (*len < size) {
        int result;
        ERR_clear_error();
        result = SSL_read_ex(connection->ssl, plaintext + *len, size - *len, &taken);
        if (result == 1) {
            *len += taken;
            connection->plaintext_bytes += taken;
            continue;
        }
        switch (SSL_get_error(connection->ssl, result)) {
        case SSL_ERROR_WANT_READ:
            return TLS_OK;
        case SSL_ERROR_ZERO_RETURN:
            return TLS_CLOSE_NOTIFY;
        default:
            return TLS_FAILED;
        }
    }
    return TLS_BUFFER_FULL;
}

enum tls_status tls_write(struct tls_connection *connection, const unsigned char *plaintext, size_t len) {
    size_t written;

    ERR_clear_error();
    return len == 0 || SSL_write_ex(connection->ssl, plaintext, len, &written) == 1 ? TLS_OK : TLS_FAILED;
}

enum tls_status tls_close(struct tls_connection *connection) {
    ERR_clear_error();
    return SSL_shutdown(connection->ssl) >= 0 ? TLS_OK : TLS_FAILED;
}
