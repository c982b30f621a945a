/* One server-side TLS connection over memory: libssl's callbacks, and the few calls the engine makes.
 *
 * libssl is driven by bytes in memory, and stops where the engine has to decide or to wait: at the ClientHello, for
 * the choice of a certificate, and at the signature (_provider.c). Its callbacks run on a job's own stack: they write
 * down what happened and never call Python. */
#include "_connection.h"

#include <string.h>

#include <openssl/async.h>
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/rand.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

/* Mozilla's server-side TLS guidelines 5.7. Without DHE: its groups and its cost are not worth it beside ECDHE. */
#define CIPHERS_TLS13 "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
#define CIPHERS_TLS12                                                                                                  \
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"                         \
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
#define GROUPS "X25519:P-256:P-384"
#define OUTPUT_MIN_BYTES 4096U
#define SECURITY_LEVEL 2 /* 112 bits: what Mozilla's guidelines and Debian ask for */

/* Handshake messages after the handshake (KeyUpdate, TLS 1.2 renegotiation) cost key derivations, or an answer, for
 * 27 bytes of the client's. A few are free; more must be earned by data. */
#define POST_HANDSHAKE_FREE 32U
#define POST_HANDSHAKE_BYTES_EACH 65536U

static BIO_METHOD *memory_bio;
static EVP_CIPHER *ticket_cipher;

/* ---- Memory BIO: reads the caller's bytes in place, writes to one growing buffer ---- */

static int bio_read(BIO *bio, char *data, size_t size, size_t *len) {
    struct tls_connection *connection = BIO_get_data(bio);

    BIO_clear_retry_flags(bio);
    if (connection->flooded)
        return 0;
    if (connection->input_len == 0) {
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

static int bio_init(void) {
    memory_bio = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "tlsproxy memory");
    return memory_bio != NULL && BIO_meth_set_read_ex(memory_bio, bio_read) &&
           BIO_meth_set_write_ex(memory_bio, bio_write) && BIO_meth_set_ctrl(memory_bio, bio_ctrl) &&
           BIO_meth_set_create(memory_bio, bio_create);
}

/* ---- Callbacks ---- */

/* SSL_CTX_set_client_hello_cb(3): stops the handshake once, with the ClientHello copied. After a HelloRetryRequest a
 * second one comes; the choice then stands. */
static int on_client_hello(SSL *ssl, int *alert, void *arg) {
    static const unsigned int extensions[TLS_HELLO_FIELDS] = {
        [TLS_HELLO_SERVER_NAME] = TLSEXT_TYPE_server_name,
        [TLS_HELLO_SIGNATURE_ALGORITHMS] = TLSEXT_TYPE_signature_algorithms,
        [TLS_HELLO_SUPPORTED_GROUPS] = TLSEXT_TYPE_supported_groups,
        [TLS_HELLO_SUPPORTED_VERSIONS] = TLSEXT_TYPE_supported_versions,
        [TLS_HELLO_ALPN] = TLSEXT_TYPE_application_layer_protocol_negotiation,
    };
    struct tls_connection *connection = SSL_get_app_data(ssl);
    const unsigned char *field[TLS_HELLO_FIELDS];
    size_t total = 0;
    unsigned char *to;
    int i;

    (void)arg;
    if (connection->hello_state == TLS_HELLO_ANSWERED)
        return SSL_CLIENT_HELLO_SUCCESS;
    if (connection->hello_state == TLS_HELLO_TO_ANSWER)
        return SSL_CLIENT_HELLO_RETRY;
    for (i = 0; i < TLS_HELLO_FIELDS; i++) {
        size_t *len = &connection->hello_len[i];
        *len = 0;
        if (i == TLS_HELLO_CIPHER_SUITES)
            *len = SSL_client_hello_get0_ciphers(ssl, &field[i]);
        else if (!SSL_client_hello_get0_ext(ssl, extensions[i], &field[i], len))
            continue;
        connection->hello_present |= 1U << i;
        total += *len;
    }
    connection->hello_version = SSL_client_hello_get0_legacy_version(ssl);
    to = connection->hello = OPENSSL_malloc(total + 1);
    if (to == NULL) {
        *alert = SSL_AD_INTERNAL_ERROR;
        return SSL_CLIENT_HELLO_ERROR;
    }
    for (i = 0; i < TLS_HELLO_FIELDS; i++) {
        if (connection->hello_len[i] > 0)
            memcpy(to, field[i], connection->hello_len[i]);
        to += connection->hello_len[i];
    }
    connection->hello_state = TLS_HELLO_TO_ANSWER;
    return SSL_CLIENT_HELLO_RETRY;
}

/* SSL_CTX_set_alpn_select_cb(3): our order decides; no protocol in common is an error (RFC 7301 section 3.2). */
static int on_alpn(SSL *ssl, const unsigned char **chosen, unsigned char *chosen_len, const unsigned char *offered,
                   unsigned int offered_len, void *arg) {
    const struct tls_settings *settings = ((const struct tls_connection *)SSL_get_app_data(ssl))->settings;

    (void)arg;
    if (SSL_select_next_proto((unsigned char **)chosen, chosen_len, settings->alpn, settings->alpn_len, offered,
                              offered_len) == OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_OK;
    return SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* SSL_CTX_set_tlsext_ticket_key_evp_cb(3): returns -1 on failure, 0 for an unknown key, 1, or 2 to have the ticket
 * replaced by one under the first key. */
static int on_ticket(SSL *ssl, unsigned char *name, unsigned char *iv, EVP_CIPHER_CTX *cipher_ctx, EVP_MAC_CTX *mac_ctx,
                     int encrypting) {
    const struct tls_settings *settings = ((const struct tls_connection *)SSL_get_app_data(ssl))->settings;
    const struct tls_ticket_key *key = NULL;
    OSSL_PARAM mac_params[] = {OSSL_PARAM_END, OSSL_PARAM_END, OSSL_PARAM_END};
    int i;

    for (i = 0; i < settings->ticket_key_count && key == NULL; i++)
        if (encrypting || memcmp(name, settings->ticket_keys[i].name, TLS_TICKET_NAME_BYTES) == 0)
            key = &settings->ticket_keys[i];
    if (key == NULL)
        return 0;
    if (encrypting) {
        memcpy(name, key->name, TLS_TICKET_NAME_BYTES);
        if (RAND_bytes_ex(hsm_library_context(), iv, (size_t)EVP_CIPHER_get_iv_length(ticket_cipher), 0) != 1)
            return -1;
    }
    mac_params[0] = OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_KEY, (void *)key->hmac, TLS_TICKET_SECRET_BYTES);
    mac_params[1] = OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0);
    if (EVP_CipherInit_ex2(cipher_ctx, ticket_cipher, key->aes, iv, encrypting, NULL) != 1 ||
        EVP_MAC_CTX_set_params(mac_ctx, mac_params) != 1)
        return -1;
    return encrypting || key == &settings->ticket_keys[0] ? 1 : 2;
}

/* SSL_set_msg_callback(3): keeps the fatal alerts, and counts what a client could flood us with. */
static void on_message(int sending, int version, int content_type, const void *data, size_t len, SSL *ssl, void *arg) {
    struct tls_connection *connection = arg;
    const unsigned char *bytes = data;

    (void)version;
    (void)ssl;
    if (content_type == SSL3_RT_ALERT && len == 2 && bytes[0] == SSL3_AL_FATAL) {
        if (sending)
            connection->alert_sent = bytes[1];
        else
            connection->alert_received = bytes[1];
    } else if (content_type == SSL3_RT_HANDSHAKE && !sending && connection->established) {
        connection->post_handshake_messages++;
        if (connection->post_handshake_messages >
            POST_HANDSHAKE_FREE + connection->plaintext_bytes / POST_HANDSHAKE_BYTES_EACH)
            connection->flooded = 1; /* bio_read then ends it, in the midst of a received block too */
    }
}

/* ---- Process and context ---- */

int tls_library_init(void) {
    if (memory_bio != NULL)
        return 1;
#ifdef __GLIBC__
    /* By default glibc maps and unmaps a body-sized buffer each time, at twice the CPU per byte. */
    mallopt(M_MMAP_THRESHOLD, 8 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
    mallopt(M_TOP_PAD, 1 << 20);
#endif
    if (!ASYNC_is_capable()) {
        ERR_raise_data(ERR_LIB_USER, ERR_R_UNSUPPORTED, "this OpenSSL cannot suspend a handshake (no ASYNC jobs)");
        return 0;
    }
    if (hsm_library_context() == NULL)
        return 0;
    ticket_cipher = EVP_CIPHER_fetch(hsm_library_context(), "AES-256-CBC", NULL);
    return ticket_cipher != NULL && bio_init();
}

static X509 *certificate_from_der(const unsigned char *der, size_t len) {
    X509 *certificate = X509_new_ex(hsm_library_context(), TLS_PROPERTY_QUERY);
    if (certificate != NULL && d2i_X509(&certificate, &der, (long)len) == NULL)
        return NULL; /* d2i_X509 has freed it */
    return certificate;
}

static int use_chain(SSL_CTX *ctx, const unsigned char *const *chain, const size_t *chain_len, size_t count,
                     unsigned int handle) {
    X509 *leaf = certificate_from_der(chain[0], chain_len[0]);
    EVP_PKEY *key = leaf == NULL ? NULL : hsm_private_key(leaf, handle);
    int ok = key != NULL && SSL_CTX_use_certificate(ctx, leaf) == 1 && SSL_CTX_use_PrivateKey(ctx, key) == 1;
    size_t i;

    for (i = 1; ok && i < count; i++) {
        X509 *issuer = certificate_from_der(chain[i], chain_len[i]);
        ok = issuer != NULL && SSL_CTX_add0_chain_cert(ctx, issuer) == 1;
        if (!ok)
            X509_free(issuer);
    }
    EVP_PKEY_free(key);
    X509_free(leaf);
    return ok;
}

/* Tickets resume only under the certificate they were issued under: the context id is its digest. */
static int bind_tickets(SSL_CTX *ctx, const unsigned char *leaf, size_t leaf_len) {
    unsigned char digest[SSL_MAX_SID_CTX_LENGTH];
    size_t len;
    return EVP_Q_digest(hsm_library_context(), "SHA256", NULL, leaf, leaf_len, digest, &len) == 1 &&
           SSL_CTX_set_session_id_context(ctx, digest, (unsigned int)len) == 1;
}

SSL_CTX *tls_context_new(const unsigned char *const *chain, const size_t *chain_len, size_t count, unsigned int handle,
                         int min_version, int max_version, const char *schemes, const struct tls_settings *settings) {
    SSL_CTX *ctx;

    ERR_clear_error();
    ctx = SSL_CTX_new_ex(hsm_library_context(), TLS_PROPERTY_QUERY, TLS_server_method());
    if (ctx == NULL)
        return NULL;
    SSL_CTX_set_security_level(ctx, SECURITY_LEVEL);
    SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE |
                                 SSL_OP_PRIORITIZE_CHACHA);
    SSL_CTX_set_mode(ctx, SSL_MODE_ASYNC | SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_client_hello_cb(ctx, on_client_hello, NULL);
    SSL_CTX_set_tlsext_ticket_key_evp_cb(ctx, on_ticket);
    if (settings->alpn != NULL)
        SSL_CTX_set_alpn_select_cb(ctx, on_alpn, NULL);
    if (SSL_CTX_set_min_proto_version(ctx, min_version) == 1 && SSL_CTX_set_max_proto_version(ctx, max_version) == 1 &&
        SSL_CTX_set_ciphersuites(ctx, CIPHERS_TLS13) == 1 && SSL_CTX_set_cipher_list(ctx, CIPHERS_TLS12) == 1 &&
        SSL_CTX_set1_sigalgs_list(ctx, schemes) == 1 &&
        (SSL_CTX_set1_groups_list(ctx, "X25519MLKEM768:" GROUPS) == 1 || SSL_CTX_set1_groups_list(ctx, GROUPS) == 1) &&
        SSL_CTX_set_num_tickets(ctx, 1) == 1 && bind_tickets(ctx, chain[0], chain_len[0]) &&
        use_chain(ctx, chain, chain_len, count, handle)) {
        ERR_clear_error(); /* the probe for X25519MLKEM768 may have left one */
        return ctx;
    }
    SSL_CTX_free(ctx);
    return NULL;
}

/* ---- Connection ---- */

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
    SSL_set_msg_callback(connection->ssl, on_message);
    SSL_set_msg_callback_arg(connection->ssl, connection);
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
        connection->output_len = output_len;
        connection->alert_sent = alert_sent;
    }
    SSL_free(connection->ssl);
    connection->ssl = NULL;
    ERR_clear_error();
    OPENSSL_free(connection->hello);
    connection->hello = NULL;
}

enum tls_status tls_handshake(struct tls_connection *connection) {
    int result;

    ERR_clear_error();
    hsm_enter(&connection->sign);
    result = SSL_do_handshake(connection->ssl);
    if (result == 1) {
        connection->established = 1;
        SSL_clear_mode(connection->ssl, SSL_MODE_ASYNC); /* nothing pauses from here on, so nothing needs a job */
        return TLS_OK;
    }
    switch (SSL_get_error(connection->ssl, result)) {
    case SSL_ERROR_WANT_READ:
        return TLS_WANT_DATA;
    case SSL_ERROR_WANT_CLIENT_HELLO_CB:
        return TLS_WANT_CERTIFICATE;
    case SSL_ERROR_WANT_ASYNC:
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
