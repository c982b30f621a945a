/* What the C files of this directory owe each other. */
#ifndef TLSPROXY_INTERNAL_H
#define TLSPROXY_INTERNAL_H

#include "_connection.h"

/* Each prepares its file's part of the process, once. Returns 1, or 0 on failure (the error queue says why). */
int tls_bio_init(void);
int tls_callbacks_init(void);

/* Has libssl call _callbacks.c for every connection of `ctx`. */
void tls_callbacks_install(SSL_CTX *ctx, const struct tls_settings *settings);

/* Has libssl ask the clients of `ctx` for certificates. Returns 1, or 0 on failure. */
int tls_client_verifier_install(SSL_CTX *ctx, struct tls_client_verifier *verifier);

const unsigned char *tls_client_verifier_id(const struct tls_client_verifier *verifier);

/* A certificate of the private library context; NULL on failure. Owned by the caller. */
X509 *tls_certificate_from_der(const unsigned char *der, size_t len);

#endif
