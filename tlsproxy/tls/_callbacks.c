/* libssl's callbacks. They run on a job's own stack, where Python must not: they write down what happened, and the
 * engine decides between its calls. Each finds its tls_connection as the SSL's app data. */
#include "_connection.h"
#include "_internal.h"

#include <string.h>

#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/rand.h>

/* Handshake messages after the handshake (KeyUpdate, TLS 1.2 renegotiation) cost key derivations, or an answer, for
 * 27 bytes of the client's. A few are free; more must be earned by data. */
#define POST_HANDSHAKE_FREE 32U
#define POST_HANDSHAKE_BYTES_EACH 65536U

static EVP_CIPHER *ticket_cipher;

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
    if (SSL_has_pending(ssl)) {
        /* Of TLS 1.2 libssl would take more out of the same record: in the job that makes the signature, where nothing
         * else of the client's is read (_connection.c). Nobody sends that. */
        ERR_raise(ERR_LIB_SSL, SSL_R_UNEXPECTED_MESSAGE);
        *alert = SSL_AD_UNEXPECTED_MESSAGE;
        return SSL_CLIENT_HELLO_ERROR;
    }
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
    struct tls_connection *connection = SSL_get_app_data(ssl);
    const unsigned char *bytes = data;

    (void)version;
    (void)arg;
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

int tls_callbacks_init(void) {
    if (ticket_cipher == NULL)
        ticket_cipher = EVP_CIPHER_fetch(hsm_library_context(), "AES-256-CBC", NULL);
    return ticket_cipher != NULL;
}

void tls_callbacks_install(SSL_CTX *ctx, const struct tls_settings *settings) {
    SSL_CTX_set_client_hello_cb(ctx, on_client_hello, NULL);
    SSL_CTX_set_tlsext_ticket_key_evp_cb(ctx, on_ticket);
    SSL_CTX_set_msg_callback(ctx, on_message);
    if (settings->alpn != NULL)
        SSL_CTX_set_alpn_select_cb(ctx, on_alpn, NULL);
}
