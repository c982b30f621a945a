/* Drives the C files without Python, so that LeakSanitizer's verdict is about them alone.
 *
 * A libssl client and a tls_connection talk over memory; each scenario is one way for a connection to end. Prints one
 * line per scenario, and exits with 1 when one did not go as it should; LeakSanitizer speaks at the end. */
#include "../../tlsproxy/tls/_connection.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/err.h>
#include <openssl/x509v3.h>

#define ROUNDS 50
#define HANDLE 7U

static EVP_PKEY *private_key; /* the signer's: the connection never sees it */
static unsigned char *chain_der;
static size_t chain_der_len;
static struct tls_settings settings;
static SSL_CTX *server_ctx, *client_ctx;

static void require(int condition, const char *what) {
    if (condition)
        return;
    fprintf(stderr, "leak_check: %s\n", what);
    ERR_print_errors_fp(stderr);
    exit(1);
}

static void make_certificate(void) {
    X509 *certificate = X509_new();
    X509_NAME *name = X509_get_subject_name(certificate);

    private_key = EVP_EC_gen("P-256");
    X509_set_version(certificate, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"localhost", -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    X509_set_pubkey(certificate, private_key);
    require(X509_sign(certificate, private_key, EVP_sha256()) > 0, "no certificate");
    chain_der_len = (size_t)i2d_X509(certificate, &chain_der);
    X509_free(certificate);
}

static void answer(struct tls_connection *server, int good) {
    unsigned char signature[256];
    size_t len = sizeof signature;
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();

    require(server->sign.handle == HANDLE && server->sign.scheme == 0x0403, "wrong signature request");
    require(EVP_DigestSignInit(ctx, NULL, EVP_sha256(), NULL, private_key) == 1 &&
                EVP_DigestSign(ctx, signature, &len, server->sign.tbs, server->sign.tbs_len) == 1,
            "cannot sign");
    EVP_MD_CTX_free(ctx);
    server->sign.signature = signature;
    server->sign.signature_len = len;
    server->sign.state = good ? HSM_SIGN_READY : HSM_SIGN_CANCELLED;
    if (good)
        require(tls_handshake(server) == TLS_WANT_DATA, "the handshake does not go on after the signature");
    else
        require(tls_handshake(server) == TLS_FAILED && server->alert_sent == SSL_AD_INTERNAL_ERROR, "no alert");
}

static enum tls_status step(struct tls_connection *server) {
    enum tls_status status = tls_handshake(server);
    if (status != TLS_WANT_CERTIFICATE)
        return status;
    require(server->hello != NULL && tls_use_context(server, server_ctx), "no certificate chosen");
    return tls_handshake(server);
}

/* Gives the client what the server wrote, lets it go on, and returns what it wrote. */
static size_t client_step(SSL *client, struct tls_connection *server, unsigned char *data, size_t size) {
    int len;
    BIO_write(SSL_get_rbio(client), server->output, (int)server->output_len);
    tls_output_taken(server);
    SSL_do_handshake(client);
    len = BIO_read(SSL_get_wbio(client), data, (int)size);
    return len > 0 ? (size_t)len : 0;
}

static SSL *new_client(void) {
    SSL *client = SSL_new(client_ctx);
    SSL_set_bio(client, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    SSL_set_tlsext_host_name(client, "localhost");
    SSL_set_connect_state(client);
    return client;
}

enum ending { COMPLETE, REFUSED, VANISHED, GARBAGE };

static void run(enum ending ending, int max_version) {
    struct tls_connection server;
    unsigned char data[8192];
    SSL *client;
    size_t len;

    SSL_CTX_set_max_proto_version(client_ctx, max_version);
    client = new_client();
    require(tls_connection_init(&server, server_ctx, &settings), "no connection");
    len = client_step(client, &server, data, sizeof data);
    if (ending == GARBAGE)
        memset(data + len / 2, 0xFF, len - len / 2);
    server.input = data;
    server.input_len = len;
    if (ending == GARBAGE) {
        require(step(&server) == TLS_FAILED, "garbage was accepted");
    } else {
        require(step(&server) == TLS_WANT_SIGNATURE && hsm_live_jobs() == 1, "no signature asked for");
        if (ending != VANISHED)
            answer(&server, ending == COMPLETE);
    }
    if (ending == COMPLETE) {
        char received[6];
        server.input_len = client_step(client, &server, data, sizeof data);
        server.input = data;
        require(tls_handshake(&server) == TLS_OK, "the handshake is not complete");
        client_step(client, &server, data, sizeof data);
        require(tls_write(&server, (const unsigned char *)"hello", 5) == TLS_OK, "cannot write");
        client_step(client, &server, data, sizeof data);
        require(SSL_read(client, received, sizeof received) == 5, "the client got nothing");
        require(tls_close(&server) == TLS_OK, "cannot close");
    }
    tls_connection_free(&server);
    tls_connection_free(&server);
    tls_output_taken(&server);
    require(hsm_live_jobs() == 0, "a job is left");
    SSL_free(client);
}

/* A chain that OpenSSL cannot read, in its first or its second certificate. */
static void run_malformed_chain(void) {
    static const unsigned char malformed[] = {0x30, 0x03, 0x02, 0x01, 0x01};
    const unsigned char *chain[2] = {chain_der, malformed};
    const size_t lengths[2] = {chain_der_len, sizeof malformed};
    const char *schemes = "ecdsa_secp256r1_sha256";

    require(tls_context_new(chain, lengths, 2, 0, TLS1_2_VERSION, TLS1_3_VERSION, schemes, &settings) == NULL &&
                tls_context_new(chain + 1, lengths + 1, 1, 0, TLS1_2_VERSION, TLS1_3_VERSION, schemes, &settings) ==
                    NULL,
            "a malformed chain was accepted");
}

int main(void) {
    static const struct {
        const char *name;
        enum ending ending;
    } scenarios[] = {
        {"complete", COMPLETE}, {"signature refused", REFUSED}, {"vanished", VANISHED}, {"garbage", GARBAGE}};
    size_t i, round;

    require(tls_library_init(), "no library");
    make_certificate();
    settings.ticket_key_count = 1;
    client_ctx = SSL_CTX_new(TLS_client_method());
    for (round = 0; round < ROUNDS; round++) {
        server_ctx = tls_context_new((const unsigned char *const *)&chain_der, &chain_der_len, 1, HANDLE,
                                     TLS1_2_VERSION, TLS1_3_VERSION, "ecdsa_secp256r1_sha256", &settings);
        require(server_ctx != NULL, "no context");
        for (i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
            run(scenarios[i].ending, TLS1_2_VERSION);
            run(scenarios[i].ending, TLS1_3_VERSION);
        }
        SSL_CTX_free(server_ctx);
        run_malformed_chain();
    }
    for (i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        printf("leak_check: %s: %d rounds in TLS 1.2 and 1.3\n", scenarios[i].name, ROUNDS);
    SSL_CTX_free(client_ctx);
    EVP_PKEY_free(private_key);
    OPENSSL_free(chain_der);
    return 0;
}
