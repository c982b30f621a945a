/* An OpenSSL 3 provider whose private keys are somewhere else: signing suspends the handshake until the caller has
 * fetched the signature. See _provider.c. */
#ifndef TLSPROXY_PROVIDER_H
#define TLSPROXY_PROVIDER_H

#include <stddef.h>

#include <openssl/evp.h>
#include <openssl/x509.h>

/* What libssl is given to choose implementations by: the default provider's, except for a key that is of ours. */
#define TLS_PROPERTY_QUERY "?provider=default"

enum hsm_sign_state {
    HSM_SIGN_IDLE,
    HSM_SIGN_WANTED,    /* the job is paused: scheme, handle and tbs say what is to be signed */
    HSM_SIGN_READY,     /* set by the caller before resuming: signature is there */
    HSM_SIGN_CANCELLED, /* set by the caller before resuming: signing fails, so the job unwinds */
};

/* The one signature a handshake needs. It belongs to the connection; the provider fills it before it pauses the job. */
struct hsm_sign {
    enum hsm_sign_state state;
    unsigned int scheme; /* TLS SignatureScheme code point, RFC 8446 section 4.2.3 */
    unsigned int handle; /* the number given to hsm_private_key */
    const unsigned char *tbs;
    size_t tbs_len; /* libssl's buffer: valid while the job is paused */
    const unsigned char *signature;
    size_t signature_len; /* the caller's buffer: must stay valid until the resumed job returns */
    size_t signature_max; /* bytes; an RSA signature has exactly this length */
};

/* The private library context in which TLS happens, with the default provider and this one; made on the first call.
 * NULL on failure (the OpenSSL error queue says why). The default context is never touched: there, the second
 * implementation of RSA and EC that this provider is would enter the process-wide method cache. */
OSSL_LIB_CTX *hsm_library_context(void);

/* A private key for `certificate` whose signatures are asked for by `handle`. NULL on failure. Owned by the caller. */
EVP_PKEY *hsm_private_key(X509 *certificate, unsigned int handle);

/* Says which connection's handshake this thread drives from now on: its signature requests go to `sign`. NULL: none. */
void hsm_enter(struct hsm_sign *sign);

/* Jobs paused in this process at this moment. */
long hsm_live_jobs(void);

#endif
