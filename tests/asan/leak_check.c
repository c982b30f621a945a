/* Drives the C files without Python, so that LeakSanitizer's verdict is about them alone.
 *
 * A libssl client and a tls_connection talk over memory; each scenario is one way for a connection to end. Prints one
 * line per scenario, and exits with 1 when one did not go as it should; LeakSanitizer speaks at the end. */
#include "../../tlsproxy/tls/_connection.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/async.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>

#define ROUNDS 50
#define HANDLE 7U

static EVP_PKEY *private_key; /* the signer's: the connection never sees it */
static unsigned char *chain_der;
static size_t chain_der_len;
static struct tls_settings settings;
static SSL_CTX *server_ctx, *client_ctx;
static struct tls_client_verifier *verifier;
static SSL_CTX *mutual_ctx; /* a listener's that verifies its clients */
static long verified;       /* certificates of clients, looked at one by one */

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

static void sign(struct tls_connection *server) {
    static unsigned char signature[256];
    size_t len = sizeof signature;
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();

    require(server->sign.handle == HANDLE && server->sign.scheme == 0x0403, "wrong signature request");
    require(EVP_DigestSignInit(ctx, NULL, EVP_sha256(), NULL, private_key) == 1 &&
                EVP_DigestSign(ctx, signature, &len, server->sign.tbs, server->sign.tbs_len) == 1,
            "cannot sign");
    EVP_MD_CTX_free(ctx);
    server->sign.signature = signature;
    server->sign.signature_len = len;
    server->sign.state = HSM_SIGN_READY;
}

static void answer(struct tls_connection *server, int good) {
    sign(server);
    if (!good)
        server->sign.state = HSM_SIGN_CANCELLED;
    if (good)
        require(tls_handshake(server) == TLS_WANT_DATA, "the handshake does not go on after the signature");
    else
        require(tls_handshake(server) == TLS_FAILED && server->alert_sent == SSL_AD_INTERNAL_ERROR, "no alert");
}

static enum tls_status step(struct tls_connection *server, SSL_CTX *ctx) {
    enum tls_status status = tls_handshake(server);
    if (status != TLS_WANT_CERTIFICATE)
        return status;
    require(server->hello != NULL && tls_use_context(server, ctx), "no certificate chosen");
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
        require(step(&server, server_ctx) == TLS_FAILED, "garbage was accepted");
    } else {
        require(step(&server, server_ctx) == TLS_WANT_SIGNATURE && hsm_live_jobs() == 1, "no signature asked for");
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

static int on_certificate(int ok, X509_STORE_CTX *ctx) {
    (void)ctx;
    verified++;
    require(ASYNC_get_current_job() == NULL, "a client's certificate is verified in a job");
    return ok;
}

/* The demo certificate is its own CA, and the client's. `crl`: one that has expired is added. */
static void make_verifier(int crl) {
    static const unsigned char id[TLS_CLIENT_VERIFIER_ID_BYTES] = {1};

    verifier = tls_client_verifier_new(1, 1, INT64_MAX, id);
    require(verifier != NULL && tls_client_verifier_add_ca(verifier, chain_der, chain_der_len), "no verifier");
    if (crl) {
        const unsigned char *der = chain_der;
        X509 *ca = d2i_X509(NULL, &der, (long)chain_der_len);
        X509_CRL *revoked = X509_CRL_new();
        ASN1_TIME *past = X509_gmtime_adj(NULL, -60);
        unsigned char *crl_der = NULL;
        int crl_len;

        X509_CRL_set_version(revoked, X509_CRL_VERSION_2);
        X509_CRL_set_issuer_name(revoked, X509_get_subject_name(ca));
        X509_CRL_set1_lastUpdate(revoked, past);
        X509_CRL_set1_nextUpdate(revoked, past);
        require(X509_CRL_sign(revoked, private_key, EVP_sha256()) > 0, "no CRL");
        crl_len = i2d_X509_CRL(revoked, &crl_der);
        require(tls_client_verifier_add_crl(verifier, crl_der, (size_t)crl_len), "the CRL was refused");
        require(!tls_client_verifier_add_crl(verifier, crl_der, 10), "half a CRL was accepted");
        OPENSSL_free(crl_der);
        ASN1_TIME_free(past);
        X509_CRL_free(revoked);
        X509_free(ca);
    }
    require(!tls_client_verifier_add_ca(verifier, chain_der, 10), "half a CA was accepted");
    mutual_ctx = tls_context_new((const unsigned char *const *)&chain_der, &chain_der_len, 1, HANDLE, TLS1_2_VERSION,
                                 TLS1_3_VERSION, "ecdsa_secp256r1_sha256", &settings, verifier);
    require(mutual_ctx != NULL, "no context that verifies clients");
    X509_STORE_set_verify_cb(SSL_CTX_get_cert_store(mutual_ctx), on_certificate);
}

/* A client with a certificate; `early`: its last flight is there before the signature, as far as it can be. Returns its
 * ticket, if there is one. */
static SSL_SESSION *run_mutual(int max_version, SSL_SESSION *resumed, int early, const char *refused) {
    struct tls_connection server;
    const char *reason = NULL;
    unsigned char data[16384], *common_name = NULL;
    SSL_SESSION *ticket = NULL;
    enum tls_status status;
    SSL *client;
    char received[6], *subject;
    long before = verified;

    SSL_CTX_set_max_proto_version(client_ctx, max_version);
    client = new_client();
    if (resumed != NULL)
        SSL_set_session(client, resumed);
    require(tls_connection_init(&server, mutual_ctx, &settings), "no connection");
    server.input_len = client_step(client, &server, data, sizeof data);
    server.input = data;
    status = step(&server, mutual_ctx);
    if (resumed == NULL) {
        require(status == TLS_WANT_SIGNATURE, "no signature asked for");
        if (early) {
            /* A record of TLS 1.2 with a Certificate that is none. */
            static const unsigned char record[] = {22, 3, 3, 0, 10, 11, 0, 0, 6, 0, 0, 3, 0, 0, 0};
            server.input = record;
            server.input_len = sizeof record;
            sign(&server);
            require(tls_handshake(&server) == TLS_FAILED && server.input_len < sizeof record,
                    "an early flight was not read");
            goto end;
        }
        answer(&server, 1);
    }
    server.input_len = client_step(client, &server, data, sizeof data);
    server.input = data;
    status = tls_handshake(&server);
    if (refused != NULL) {
        require(status == TLS_FAILED && tls_client_fault_of(&server, &reason) == TLS_CLIENT_REFUSED &&
                    strcmp(reason, refused) == 0,
                "a bad certificate was accepted");
        goto end;
    }
    require(status == TLS_OK && (resumed != NULL) == (verified == before), "the handshake is not complete");
    require(SSL_session_reused(server.ssl) == (resumed != NULL), "not resumed");
    subject = tls_subject(SSL_get0_peer_certificate(server.ssl));
    require(subject != NULL && strcmp(subject, "CN=localhost") == 0 &&
                tls_common_name(SSL_get0_peer_certificate(server.ssl), &common_name) == 9,
            "no name");
    OPENSSL_free(subject);
    OPENSSL_free(common_name);
    require(tls_write(&server, (const unsigned char *)"hello", 5) == TLS_OK, "cannot write");
    client_step(client, &server, data, sizeof data);
    require(SSL_read(client, received, sizeof received) == 5, "the client got nothing");
    SSL_shutdown(client); /* or libssl takes the session for a bad one */
    ticket = SSL_get1_session(client);
end:
    tls_connection_free(&server);
    tls_output_taken(&server);
    SSL_free(client);
    return ticket;
}

static void run_mutual_all(void) {
    static const int versions[] = {TLS1_2_VERSION, TLS1_3_VERSION};
    size_t i;

    for (i = 0; i < sizeof versions / sizeof *versions; i++) {
        SSL_SESSION *ticket, *again;
        make_verifier(0);
        ticket = run_mutual(versions[i], NULL, 0, NULL);
        again = run_mutual(versions[i], ticket, 0, NULL);
        SSL_SESSION_free(ticket);
        SSL_SESSION_free(again);
        run_mutual(versions[i], NULL, 1, NULL);
        SSL_CTX_free(mutual_ctx);
        tls_client_verifier_free(verifier);
        make_verifier(1);
        run_mutual(versions[i], NULL, 0, "CRL has expired");
        SSL_CTX_free(mutual_ctx);
        tls_client_verifier_free(verifier);
    }
}

/* A chain that OpenSSL cannot read, in its first or its second certificate. */
static void run_malformed_chain(void) {
    static const unsigned char malformed[] = {0x30, 0x03, 0x02, 0x01, 0x01};
    const unsigned char *chain[2] = {chain_der, malformed};
    const size_t lengths[2] = {chain_der_len, sizeof malformed};
    const char *schemes = "ecdsa_secp256r1_sha256";

    require(tls_context_new(chain, lengths, 2, 0, TLS1_2_VERSION, TLS1_3_VERSION, schemes, &settings, NULL) == NULL &&
                tls_context_new(chain + 1, lengths + 1, 1, 0, TLS1_2_VERSION, TLS1_3_VERSION, schemes, &settings,
                                NULL) == NULL,
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
    require(SSL_CTX_use_certificate_ASN1(client_ctx, (int)chain_der_len, chain_der) == 1 &&
                SSL_CTX_use_PrivateKey(client_ctx, private_key) == 1,
            "no certificate for the client");
    for (round = 0; round < ROUNDS; round++) {
        server_ctx = tls_context_new((const unsigned char *const *)&chain_der, &chain_der_len, 1, HANDLE,
                                     TLS1_2_VERSION, TLS1_3_VERSION, "ecdsa_secp256r1_sha256", &settings, NULL);
        require(server_ctx != NULL, "no context");
        for (i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
            run(scenarios[i].ending, TLS1_2_VERSION);
            run(scenarios[i].ending, TLS1_3_VERSION);
        }
        SSL_CTX_free(server_ctx);
        run_malformed_chain();
        run_mutual_all();
    }
    for (i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        printf("leak_check: %s: %d rounds in TLS 1.2 and 1.3\n", scenarios[i].name, ROUNDS);
    printf("leak_check: client certificates: %d rounds in TLS 1.2 and 1.3, %ld verified\n", ROUNDS, verified);
    SSL_CTX_free(client_ctx);
    EVP_PKEY_free(private_key);
    OPENSSL_free(chain_der);
    return 0;
}
