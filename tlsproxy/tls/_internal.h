/* What the C files of this directory owe each other. */
#ifndef TLSPROXY_INTERNAL_H
#define TLSPROXY_INTERNAL_H

#include "_connection.h"

/* Each prepares its file's part of the process, once. Returns 1, or 0 on failure (the error queue says why). */
int tls_bio_init(void);
int tls_callbacks_init(void);

/* Has libssl call _callbacks.c for every connection of `ctx`. */
void tls_callbacks_install(SSL_CTX *ctx, const struct tls_settings *settings);

#endif
