/* What a listener's connections share: the process's one library context, and a server context for each certificate
 * with the versions, suites and options that every connection gets. */
#include "_connection.h"
#include "_internal.h"

#include <string.h>

#include <openssl/err.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

/* Mozilla's server-side TLS guidelines 5.7. Without DHE: its groups and its cost are not worth it beside ECDHE. */
#define CIPHERS_TLS13 "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
#define CIPHERS_TLS12                                                                                                  \
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"                         \
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
#define GROUPS "X25519:P-256:P-384"
#define SECURITY_LEVEL 2 /* 112 bits: what Mozilla's guidelines and Debian ask for */

int tls_library_init(void) {
#ifdef __GLIBC__
    /* By default glibc maps and unmaps a body-sized buffer each time, at twice the CPU per byte. */
    mallopt(M_MMAP_THRESHOLD, 8 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
    mallopt(M_TOP_PAD, 1 << 20);
#endif
    return hsm_library_context() != NULL && tls_callbacks_init() && tls_bio_init();
}

X509 *tls_certificate_from_der(const unsigned char *der, size_t len) {
    X509 *certificate = X509_new_ex(hsm_library_context(), TLS_PROPERTY_QUERY);
    if (certificate != NULL && d2i_X509(&certificate, &der, (long)len) == NULL)
        return NULL; /* d2i_X509 has freed it */
    return certificate;
}

static int use_chain(SSL_CTX *ctx, const unsigned char *const *chain, const size_t *chain_len, size_t count,
                     unsigned int handle) {
    X509 *leaf = tls_certificate_from_der(chain[0], chain_len[0]);
    EVP_PKEY *key = leaf == NULL ? NULL : hsm_private_key(leaf, handle);
    int ok = key != NULL && SSL_CTX_use_certificate(ctx, leaf) == 1 && SSL_CTX_use_PrivateKey(ctx, key) == 1;
    size_t i;

    for (i = 1; ok && i < count; i++) {
        X509 *issuer = tls_certificate_from_der(chain[i], chain_len[i]);
        ok = issuer != NULL && SSL_CTX_add0_chain_cert(ctx, issuer) == 1;
        if (!ok)
            X509_free(issuer);
    }
    EVP_PKEY_free(key);
    X509_free(leaf);
    return ok;
}

/* Tickets resume only under the certificate they were issued under, and only where clients are verified just as they
 * were there: the context id is a digest of both. */
static int bind_tickets(SSL_CTX *ctx, const unsigned char *leaf, size_t leaf_len,
                        const struct tls_client_verifier *verifier) {
    unsigned char id[SSL_MAX_SID_CTX_LENGTH + TLS_CLIENT_VERIFIER_ID_BYTES];
    size_t len;

    if (EVP_Q_digest(hsm_library_context(), "SHA256", NULL, leaf, leaf_len, id, &len) != 1)
        return 0;
    if (verifier != NULL) {
        memcpy(id + len, tls_client_verifier_id(verifier), TLS_CLIENT_VERIFIER_ID_BYTES);
        len += TLS_CLIENT_VERIFIER_ID_BYTES;
        if (EVP_Q_digest(hsm_library_context(), "SHA256", NULL, id, len, id, &len) != 1)
            return 0;
    }
    return SSL_CTX_set_session_id_context(ctx, id, (unsigned int)len) == 1;
}

SSL_CTX *tls_context_new(const unsigned char *const *chain, const size_t *chain_len, size_t count, unsigned int handle,
                         int min_version, int max_version, const char *schemes, const struct tls_settings *settings,
                         struct tls_client_verifier *verifier) {
    SSL_CTX *ctx;

    ERR_clear_error();
    ctx = SSL_CTX_new_ex(hsm_library_context(), TLS_PROPERTY_QUERY, TLS_server_method());
    if (ctx == NULL)
        return NULL;
    SSL_CTX_set_security_level(ctx, SECURITY_LEVEL);
    SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE |
                                 SSL_OP_PRIORITIZE_CHACHA);
    /* What we send is the chain as given, not completed with what clients are verified by. */
    SSL_CTX_set_mode(ctx, SSL_MODE_ASYNC | SSL_MODE_RELEASE_BUFFERS | SSL_MODE_NO_AUTO_CHAIN);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    tls_callbacks_install(ctx, settings);
    if (SSL_CTX_set_min_proto_version(ctx, min_version) == 1 && SSL_CTX_set_max_proto_version(ctx, max_version) == 1 &&
        SSL_CTX_set_ciphersuites(ctx, CIPHERS_TLS13) == 1 && SSL_CTX_set_cipher_list(ctx, CIPHERS_TLS12) == 1 &&
        SSL_CTX_set1_sigalgs_list(ctx, schemes) == 1 &&
        (SSL_CTX_set1_groups_list(ctx, "X25519MLKEM768:" GROUPS) == 1 || SSL_CTX_set1_groups_list(ctx, GROUPS) == 1) &&
        SSL_CTX_set_num_tickets(ctx, 1) == 1 && bind_tickets(ctx, chain[0], chain_len[0], verifier) &&
        use_chain(ctx, chain, chain_len, count, handle) &&
        (verifier == NULL || tls_client_verifier_install(ctx, verifier))) {
        ERR_clear_error(); /* the probe for X25519MLKEM768 may have left one */
        return ctx;
    }
    SSL_CTX_free(ctx);
    return NULL;
}
