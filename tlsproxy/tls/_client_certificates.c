/* Clients' certificates: libssl verifies them, by the CAs and CRLs given here and without a callback of ours. What is
 * ours is how long a ticket stands for a certificate, and to tell what was found. */
#include "_connection.h"
#include "_internal.h"

#include <string.h>
#include <time.h>

#include <openssl/err.h>
#include <openssl/x509_vfy.h>

/* What a CertificateRequest says that signatures, of clients and in their chains, may be made with. Without it libssl
 * would say what the listener's own key signs with, and no client of another kind could come. */
#define SCHEMES                                                                                                        \
    "ecdsa_secp256r1_sha256:ecdsa_secp384r1_sha384:ecdsa_secp521r1_sha512:ed25519:ed448:"                              \
    "rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:rsa_pss_rsae_sha512:rsa_pss_pss_sha256:rsa_pss_pss_sha384:"               \
    "rsa_pss_pss_sha512:rsa_pkcs1_sha256:rsa_pkcs1_sha384:rsa_pkcs1_sha512"

struct tls_client_verifier {
    X509_STORE *store;
    STACK_OF(X509_NAME) * names; /* of the CAs, for the CertificateRequest */
    int required, depth;
    int64_t crls_expire; /* seconds since the epoch */
    unsigned char id[TLS_CLIENT_VERIFIER_ID_BYTES];
};

struct tls_client_verifier *tls_client_verifier_new(int required, int depth, int64_t crls_expire,
                                                    const unsigned char *id) {
    struct tls_client_verifier *verifier = OPENSSL_zalloc(sizeof *verifier);

    if (verifier == NULL)
        return NULL;
    verifier->store = X509_STORE_new();
    verifier->names = sk_X509_NAME_new_null();
    if (verifier->store == NULL || verifier->names == NULL) {
        tls_client_verifier_free(verifier);
        return NULL;
    }
    verifier->required = required;
    verifier->depth = depth;
    verifier->crls_expire = crls_expire;
    memcpy(verifier->id, id, sizeof verifier->id);
    return verifier;
}

void tls_client_verifier_free(struct tls_client_verifier *verifier) {
    if (verifier == NULL)
        return;
    X509_STORE_free(verifier->store);
    sk_X509_NAME_pop_free(verifier->names, X509_NAME_free);
    OPENSSL_free(verifier);
}

int tls_client_verifier_add_ca(struct tls_client_verifier *verifier, const unsigned char *der, size_t len) {
    X509 *ca;
    X509_NAME *name = NULL;
    int ok;

    ERR_clear_error();
    ca = tls_certificate_from_der(der, len);
    ok = ca != NULL && X509_STORE_add_cert(verifier->store, ca) == 1 &&
         (name = X509_NAME_dup(X509_get_subject_name(ca))) != NULL && sk_X509_NAME_push(verifier->names, name) > 0;
    if (!ok)
        X509_NAME_free(name);
    X509_free(ca);
    return ok;
}

int tls_client_verifier_add_crl(struct tls_client_verifier *verifier, const unsigned char *der, size_t len) {
    X509_CRL *crl;
    int ok;

    ERR_clear_error();
    crl = X509_CRL_new_ex(hsm_library_context(), TLS_PROPERTY_QUERY);
    if (crl == NULL || d2i_X509_CRL(&crl, &der, (long)len) == NULL)
        return 0; /* d2i_X509_CRL has freed it */
    /* Every certificate of a chain is looked up, not only the client's: a CA can be revoked too. */
    ok = X509_STORE_add_crl(verifier->store, crl) == 1 &&
         X509_STORE_set_flags(verifier->store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL) == 1;
    X509_CRL_free(crl);
    return ok;
}

/* ---- How long a ticket stands for a certificate ---- */

/* SSL_CTX_generate_session_ticket_fn: notes in a ticket until when all that was verified is good. What is resumed has
 * that note from its first handshake. */
static int on_ticket_made(SSL *ssl, void *arg) {
    const struct tls_client_verifier *verifier = arg;
    STACK_OF(X509) *chain = SSL_get0_verified_chain(ssl);
    const ASN1_TIME *earliest = NULL;
    int64_t until;
    int i, days, seconds;

    if (chain == NULL)
        return 1;
    for (i = 0; i < sk_X509_num(chain); i++) {
        const ASN1_TIME *not_after = X509_get0_notAfter(sk_X509_value(chain, i));
        if (earliest == NULL || ASN1_TIME_compare(not_after, earliest) < 0)
            earliest = not_after;
    }
    if (ASN1_TIME_diff(&days, &seconds, NULL, earliest) != 1)
        return 0;
    until = (int64_t)time(NULL) + (int64_t)days * 86400 + seconds;
    if (until > verifier->crls_expire)
        until = verifier->crls_expire;
    return SSL_SESSION_set1_ticket_appdata(SSL_get_session(ssl), &until, sizeof until);
}

/* SSL_CTX_decrypt_session_ticket_fn: a ticket for a certificate that may have expired meanwhile is not taken, so that
 * the client is verified anew. */
static SSL_TICKET_RETURN on_ticket_read(SSL *ssl, SSL_SESSION *tls_session, const unsigned char *name, size_t name_len,
                                        SSL_TICKET_STATUS status, void *arg) {
    void *note = NULL;
    size_t note_len = 0;
    int64_t until = 0;

    (void)ssl;
    (void)name;
    (void)name_len;
    (void)arg;
    if (status != SSL_TICKET_SUCCESS && status != SSL_TICKET_SUCCESS_RENEW)
        return SSL_TICKET_RETURN_IGNORE_RENEW;
    if (SSL_SESSION_get0_peer(tls_session) != NULL) {
        if (SSL_SESSION_get0_ticket_appdata(tls_session, &note, &note_len) == 1 && note_len == sizeof until)
            memcpy(&until, note, sizeof until);
        if (time(NULL) > until)
            return SSL_TICKET_RETURN_IGNORE_RENEW;
    }
    return status == SSL_TICKET_SUCCESS ? SSL_TICKET_RETURN_USE : SSL_TICKET_RETURN_USE_RENEW;
}

int tls_client_verifier_install(SSL_CTX *ctx, struct tls_client_verifier *verifier) {
    int mode = SSL_VERIFY_PEER | (verifier->required ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0);
    STACK_OF(X509_NAME) *names = SSL_dup_CA_list(verifier->names);

    if (names == NULL)
        return 0;
    SSL_CTX_set_client_CA_list(ctx, names);
    SSL_CTX_set1_cert_store(ctx, verifier->store);
    SSL_CTX_set_verify(ctx, mode, NULL);
    SSL_CTX_set_verify_depth(ctx, verifier->depth);
    SSL_CTX_set_max_cert_list(ctx, TLS_CLIENT_CHAIN_MAX_BYTES);
    return SSL_CTX_set1_client_sigalgs_list(ctx, SCHEMES) == 1 &&
           SSL_CTX_set_session_ticket_cb(ctx, on_ticket_made, on_ticket_read, verifier) == 1;
}

const unsigned char *tls_client_verifier_id(const struct tls_client_verifier *verifier) {
    return verifier->id;
}

/* ---- What was found ---- */

enum tls_client_fault tls_client_fault_of(const struct tls_connection *connection, const char **reason) {
    long result = SSL_get_verify_result(connection->ssl);

    if (result != X509_V_OK) {
        *reason = X509_verify_cert_error_string(result);
        return TLS_CLIENT_REFUSED;
    }
    if (ERR_GET_REASON(ERR_peek_error()) == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE) {
        *reason = "none was sent";
        return TLS_CLIENT_WITHOUT_CERTIFICATE;
    }
    return TLS_CLIENT_NOT_AT_FAULT;
}

char *tls_subject(const X509 *certificate) {
    BIO *bio = BIO_new(BIO_s_mem());
    char *text = NULL, *subject = NULL;
    long len;

    if (bio != NULL && X509_NAME_print_ex(bio, X509_get_subject_name(certificate), 0, XN_FLAG_RFC2253) >= 0) {
        len = BIO_get_mem_data(bio, &text);
        subject = OPENSSL_strndup(len > 0 ? text : "", (size_t)len);
    }
    BIO_free(bio);
    return subject;
}

int tls_common_name(const X509 *certificate, unsigned char **utf8) {
    const X509_NAME *subject = X509_get_subject_name(certificate);
    int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);

    return at < 0 ? -1 : ASN1_STRING_to_UTF8(utf8, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
}
