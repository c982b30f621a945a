/* An OpenSSL 3 provider whose private keys are somewhere else.
 *
 * A key here is a public key (held by the default provider) and a number. Signing with it, which libssl does in the
 * middle of a handshake, writes down what is to be signed and pauses the ASYNC job that the handshake runs in:
 * SSL_do_handshake then returns SSL_ERROR_WANT_ASYNC to its caller, who fetches the signature and calls it again.
 *
 * Nothing in this file calls Python: a paused job's stack is not a stack that the interpreter knows.
 *
 * Interfaces: provider(7), provider-keymgmt(7), provider-signature(7), ASYNC_start_job(3). */
#include "_provider.h"

#include <string.h>
#include <strings.h>

#include <openssl/async.h>
#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/err.h>
#include <openssl/param_build.h>
#include <openssl/params.h>
#include <openssl/provider.h>
#include <openssl/rsa.h>

#define PROPERTIES "provider=hsm"
#define PARAM_HANDLE "hsm-handle"

/* TLS SignatureScheme code points (RFC 8446 section 4.2.3); the other hashes follow by offset. */
#define ECDSA_SHA256 0x0403U
#define ECDSA_SHA384 0x0503U
#define RSA_PKCS1_SHA256 0x0401U
#define RSA_PSS_RSAE_SHA256 0x0804U

struct hsm_key {
    int is_rsa;
    EVP_PKEY *public_key; /* in the default provider */
    int has_handle;       /* it stands for a private key */
    unsigned int handle;
};

struct signature_ctx {
    const struct hsm_key *key; /* kept alive by the EVP_PKEY_CTX around us */
    unsigned int hash;         /* 0: SHA-256, 1: SHA-384, 2: SHA-512 */
    int pss;
};

static OSSL_LIB_CTX *library_context;
static _Thread_local struct hsm_sign *current_sign;
static long live_jobs;

void hsm_enter(struct hsm_sign *sign) {
    current_sign = sign;
}

long hsm_live_jobs(void) {
    return __atomic_load_n(&live_jobs, __ATOMIC_RELAXED);
}

/* ---- Keys: provider-keymgmt(7) ---- */

static struct hsm_key *key_new(int is_rsa) {
    struct hsm_key *key = OPENSSL_zalloc(sizeof *key);
    if (key != NULL)
        key->is_rsa = is_rsa;
    return key;
}

static void *rsa_key_new(void *provider_ctx) {
    (void)provider_ctx;
    return key_new(1);
}

static void *ec_key_new(void *provider_ctx) {
    (void)provider_ctx;
    return key_new(0);
}

static void key_free(void *key_data) {
    struct hsm_key *key = key_data;
    if (key == NULL)
        return;
    EVP_PKEY_free(key->public_key);
    OPENSSL_free(key);
}

static int key_has(const void *key_data, int selection) {
    const struct hsm_key *key = key_data;
    if ((selection & OSSL_KEYMGMT_SELECT_PRIVATE_KEY) != 0 && !key->has_handle)
        return 0;
    return key->public_key != NULL;
}

static int key_match(const void *key_data1, const void *key_data2, int selection) {
    const struct hsm_key *key1 = key_data1, *key2 = key_data2;
    (void)selection; /* the public key decides, whatever else is asked for: it fixes the private one */
    return key1->public_key != NULL && key2->public_key != NULL && EVP_PKEY_eq(key1->public_key, key2->public_key) == 1;
}

/* Called with a handle by hsm_private_key, and without one when OpenSSL compares a certificate's key with ours. */
static int key_import(void *key_data, int selection, const OSSL_PARAM params[]) {
    struct hsm_key *key = key_data;
    const OSSL_PARAM *handle = OSSL_PARAM_locate_const(params, PARAM_HANDLE);
    EVP_PKEY_CTX *ctx;
    int ok;

    if (key->public_key != NULL || (selection & OSSL_KEYMGMT_SELECT_PUBLIC_KEY) == 0)
        return 0;
    if (handle != NULL && !OSSL_PARAM_get_uint(handle, &key->handle))
        return 0;
    ctx = EVP_PKEY_CTX_new_from_name(library_context, key->is_rsa ? "RSA" : "EC", "provider=default");
    ok = ctx != NULL && EVP_PKEY_fromdata_init(ctx) == 1 &&
         EVP_PKEY_fromdata(ctx, &key->public_key, EVP_PKEY_PUBLIC_KEY, (OSSL_PARAM *)params) == 1;
    EVP_PKEY_CTX_free(ctx);
    key->has_handle = ok && handle != NULL;
    return ok;
}

static const OSSL_PARAM *rsa_import_types(int selection) {
    static const OSSL_PARAM types[] = {
        OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_N, NULL, 0),
        OSSL_PARAM_BN(OSSL_PKEY_PARAM_RSA_E, NULL, 0),
        OSSL_PARAM_uint(PARAM_HANDLE, NULL),
        OSSL_PARAM_END,
    };
    (void)selection;
    return types;
}

static const OSSL_PARAM *ec_import_types(int selection) {
    static const OSSL_PARAM types[] = {
        OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, NULL, 0),
        OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_PUB_KEY, NULL, 0),
        OSSL_PARAM_uint(PARAM_HANDLE, NULL),
        OSSL_PARAM_END,
    };
    (void)selection;
    return types;
}

static int key_get_params(void *key_data, OSSL_PARAM params[]) {
    const struct hsm_key *key = key_data;
    return key->public_key != NULL && EVP_PKEY_get_params(key->public_key, params) == 1;
}

static const OSSL_PARAM *key_gettable_params(void *provider_ctx) {
    static const OSSL_PARAM gettable[] = {
        OSSL_PARAM_int(OSSL_PKEY_PARAM_BITS, NULL),
        OSSL_PARAM_int(OSSL_PKEY_PARAM_SECURITY_BITS, NULL),
        OSSL_PARAM_int(OSSL_PKEY_PARAM_MAX_SIZE, NULL),
        OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_DEFAULT_DIGEST, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_PKEY_PARAM_GROUP_NAME, NULL, 0),
        OSSL_PARAM_octet_string(OSSL_PKEY_PARAM_ENCODED_PUBLIC_KEY, NULL, 0),
        OSSL_PARAM_END,
    };
    (void)provider_ctx;
    return gettable;
}

/* Names of our own: under "RSA" or "ECDSA" the default provider's signatures would be fetched for our keys. */
static const char *rsa_operation_name(int operation) {
    return operation == OSSL_OP_SIGNATURE ? "HSM-RSA" : NULL;
}

static const char *ec_operation_name(int operation) {
    return operation == OSSL_OP_SIGNATURE ? "HSM-ECDSA" : NULL;
}

/* There is no EXPORT: no other provider can take a key over, so none can be asked to sign with it. */
static const OSSL_DISPATCH rsa_keymgmt[] = {
    {OSSL_FUNC_KEYMGMT_NEW, (void (*)(void))rsa_key_new},
    {OSSL_FUNC_KEYMGMT_FREE, (void (*)(void))key_free},
    {OSSL_FUNC_KEYMGMT_HAS, (void (*)(void))key_has},
    {OSSL_FUNC_KEYMGMT_MATCH, (void (*)(void))key_match},
    {OSSL_FUNC_KEYMGMT_IMPORT, (void (*)(void))key_import},
    {OSSL_FUNC_KEYMGMT_IMPORT_TYPES, (void (*)(void))rsa_import_types},
    {OSSL_FUNC_KEYMGMT_GET_PARAMS, (void (*)(void))key_get_params},
    {OSSL_FUNC_KEYMGMT_GETTABLE_PARAMS, (void (*)(void))key_gettable_params},
    {OSSL_FUNC_KEYMGMT_QUERY_OPERATION_NAME, (void (*)(void))rsa_operation_name},
    {0, NULL},
};

static const OSSL_DISPATCH ec_keymgmt[] = {
    {OSSL_FUNC_KEYMGMT_NEW, (void (*)(void))ec_key_new},
    {OSSL_FUNC_KEYMGMT_FREE, (void (*)(void))key_free},
    {OSSL_FUNC_KEYMGMT_HAS, (void (*)(void))key_has},
    {OSSL_FUNC_KEYMGMT_MATCH, (void (*)(void))key_match},
    {OSSL_FUNC_KEYMGMT_IMPORT, (void (*)(void))key_import},
    {OSSL_FUNC_KEYMGMT_IMPORT_TYPES, (void (*)(void))ec_import_types},
    {OSSL_FUNC_KEYMGMT_GET_PARAMS, (void (*)(void))key_get_params},
    {OSSL_FUNC_KEYMGMT_GETTABLE_PARAMS, (void (*)(void))key_gettable_params},
    {OSSL_FUNC_KEYMGMT_QUERY_OPERATION_NAME, (void (*)(void))ec_operation_name},
    {0, NULL},
};

/* ---- Signatures: provider-signature(7) ---- */

static void *signature_newctx(void *provider_ctx, const char *properties) {
    (void)provider_ctx;
    (void)properties;
    return OPENSSL_zalloc(sizeof(struct signature_ctx));
}

static void signature_freectx(void *signature_data) {
    OPENSSL_free(signature_data);
}

/* libssl also calls EVP_PKEY_CTX_set_rsa_padding and _saltlen; an integer or a name arrives, by OpenSSL version. */
static int signature_set_ctx_params(void *signature_data, const OSSL_PARAM params[]) {
    struct signature_ctx *ctx = signature_data;
    const OSSL_PARAM *param = OSSL_PARAM_locate_const(params, OSSL_SIGNATURE_PARAM_PAD_MODE);
    int number = 0;

    if (param != NULL) {
        if (param->data_type == OSSL_PARAM_UTF8_STRING)
            number = strcmp(param->data, OSSL_PKEY_RSA_PAD_MODE_PSS) == 0       ? RSA_PKCS1_PSS_PADDING
                     : strcmp(param->data, OSSL_PKEY_RSA_PAD_MODE_PKCSV15) == 0 ? RSA_PKCS1_PADDING
                                                                                : 0;
        else if (!OSSL_PARAM_get_int(param, &number))
            return 0;
        if (number != RSA_PKCS1_PSS_PADDING && number != RSA_PKCS1_PADDING)
            return 0;
        ctx->pss = number == RSA_PKCS1_PSS_PADDING;
    }
    param = OSSL_PARAM_locate_const(params, OSSL_SIGNATURE_PARAM_PSS_SALTLEN);
    if (param == NULL)
        return 1;
    /* TLS fixes the salt to the length of the digest (RFC 8446 section 4.2.3); the signer takes that for granted. */
    if (param->data_type == OSSL_PARAM_UTF8_STRING)
        return strcmp(param->data, OSSL_PKEY_RSA_PSS_SALT_LEN_DIGEST) == 0;
    return OSSL_PARAM_get_int(param, &number) && number == RSA_PSS_SALTLEN_DIGEST;
}

static const OSSL_PARAM *signature_settable_ctx_params(void *signature_data, void *provider_ctx) {
    static const OSSL_PARAM settable[] = {
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PAD_MODE, NULL, 0),
        OSSL_PARAM_utf8_string(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, NULL, 0),
        OSSL_PARAM_END,
    };
    (void)signature_data;
    (void)provider_ctx;
    return settable;
}

/* Also called by libssl only to learn whether a digest is supported: nothing may happen here but taking notes. */
static int signature_digest_sign_init(void *signature_data, const char *digest, void *key_data,
                                      const OSSL_PARAM params[]) {
    static const char *const names[][2] = {{"SHA2-256", "SHA256"}, {"SHA2-384", "SHA384"}, {"SHA2-512", "SHA512"}};
    struct signature_ctx *ctx = signature_data;
    const struct hsm_key *key = key_data;
    unsigned int hash;

    if (key == NULL || !key->has_handle || digest == NULL)
        return 0;
    /* ECDSA with SHA-512 is for P-521 keys alone, which the HSM protocol does not have. */
    for (hash = 0; hash < (key->is_rsa ? 3 : 2); hash++) {
        if (strcasecmp(digest, names[hash][0]) == 0 || strcasecmp(digest, names[hash][1]) == 0) {
            ctx->key = key;
            ctx->hash = hash;
            return params == NULL || signature_set_ctx_params(ctx, params);
        }
    }
    return 0;
}

static unsigned int signature_scheme(const struct signature_ctx *ctx) {
    if (!ctx->key->is_rsa)
        return ctx->hash == 0 ? ECDSA_SHA256 : ECDSA_SHA384;
    return ctx->pss ? RSA_PSS_RSAE_SHA256 + ctx->hash : RSA_PKCS1_SHA256 + 0x100U * ctx->hash;
}

static int signature_digest_sign(void *signature_data, unsigned char *signature, size_t *signature_len,
                                 size_t signature_size, const unsigned char *tbs, size_t tbs_len) {
    const struct signature_ctx *ctx = signature_data;
    struct hsm_sign *sign = current_sign;
    int size;

    if (ctx->key == NULL || (size = EVP_PKEY_get_size(ctx->key->public_key)) <= 0)
        return 0;
    if (signature == NULL) { /* a question about the length; the job must not pause */
        *signature_len = (size_t)size;
        return 1;
    }
    if (sign == NULL || sign->state != HSM_SIGN_IDLE) {
        ERR_raise_data(ERR_LIB_PROV, ERR_R_INTERNAL_ERROR, "no handshake waits for a signature");
        return 0;
    }
    sign->scheme = signature_scheme(ctx);
    sign->handle = ctx->key->handle;
    sign->tbs = tbs;
    sign->tbs_len = tbs_len;
    sign->signature_max = (size_t)size;
    sign->state = HSM_SIGN_WANTED;
    __atomic_add_fetch(&live_jobs, 1, __ATOMIC_RELAXED);
    ASYNC_pause_job();
    __atomic_sub_fetch(&live_jobs, 1, __ATOMIC_RELAXED);
    sign->tbs = NULL;
    if (sign->state != HSM_SIGN_READY || sign->signature_len > signature_size) {
        ERR_raise_data(ERR_LIB_PROV, ERR_R_OPERATION_FAIL, "no signature was made");
        return 0;
    }
    memcpy(signature, sign->signature, sign->signature_len);
    *signature_len = sign->signature_len;
    sign->state = HSM_SIGN_IDLE;
    return 1;
}

/* DIGEST_SIGN_UPDATE and _FINAL are absent, as in the default provider's EdDSA: TLS 1.2 and 1.3 sign in one call. */
static const OSSL_DISPATCH signature_functions[] = {
    {OSSL_FUNC_SIGNATURE_NEWCTX, (void (*)(void))signature_newctx},
    {OSSL_FUNC_SIGNATURE_FREECTX, (void (*)(void))signature_freectx},
    {OSSL_FUNC_SIGNATURE_DIGEST_SIGN_INIT, (void (*)(void))signature_digest_sign_init},
    {OSSL_FUNC_SIGNATURE_DIGEST_SIGN, (void (*)(void))signature_digest_sign},
    {OSSL_FUNC_SIGNATURE_SET_CTX_PARAMS, (void (*)(void))signature_set_ctx_params},
    {OSSL_FUNC_SIGNATURE_SETTABLE_CTX_PARAMS, (void (*)(void))signature_settable_ctx_params},
    {0, NULL},
};

/* ---- The provider itself: provider-base(7) ---- */

static const OSSL_ALGORITHM *provider_query(void *provider_ctx, int operation, int *no_cache) {
    /* The aliases matter: libssl asks EVP_PKEY_is_a() with any of them. */
    static const OSSL_ALGORITHM keymgmt[] = {
        {"RSA:rsaEncryption:1.2.840.113549.1.1.1", PROPERTIES, rsa_keymgmt, "RSA key in an HSM"},
        {"EC:id-ecPublicKey:1.2.840.10045.2.1", PROPERTIES, ec_keymgmt, "EC key in an HSM"},
        {NULL, NULL, NULL, NULL},
    };
    static const OSSL_ALGORITHM signature[] = {
        {"HSM-RSA", PROPERTIES, signature_functions, "RSA signature by an HSM"},
        {"HSM-ECDSA", PROPERTIES, signature_functions, "ECDSA signature by an HSM"},
        {NULL, NULL, NULL, NULL},
    };
    (void)provider_ctx;
    *no_cache = 0;
    switch (operation) {
    case OSSL_OP_KEYMGMT:
        return keymgmt;
    case OSSL_OP_SIGNATURE:
        return signature;
    default:
        return NULL;
    }
}

static int provider_init(const OSSL_CORE_HANDLE *core, const OSSL_DISPATCH *in, const OSSL_DISPATCH **out,
                         void **provider_ctx) {
    static const OSSL_DISPATCH functions[] = {
        {OSSL_FUNC_PROVIDER_QUERY_OPERATION, (void (*)(void))provider_query},
        {0, NULL},
    };
    (void)in;
    *out = functions;
    *provider_ctx = (void *)core; /* unused, but OpenSSL takes NULL for "not initialised" in places */
    return 1;
}

OSSL_LIB_CTX *hsm_library_context(void) {
    OSSL_LIB_CTX *ctx;

    if (library_context != NULL)
        return library_context;
    ctx = OSSL_LIB_CTX_new();
    if (ctx == NULL)
        return NULL;
    /* Once any provider is loaded by name, "default" is no longer loaded by itself. */
    if (!OSSL_PROVIDER_add_builtin(ctx, "hsm", provider_init) || OSSL_PROVIDER_load(ctx, "default") == NULL ||
        OSSL_PROVIDER_load(ctx, "hsm") == NULL) {
        OSSL_LIB_CTX_free(ctx);
        return NULL;
    }
    library_context = ctx;
    return ctx;
}

EVP_PKEY *hsm_private_key(X509 *certificate, unsigned int handle) {
    EVP_PKEY *public_key = X509_get0_pubkey(certificate), *key = NULL;
    OSSL_PARAM handle_params[] = {OSSL_PARAM_uint(PARAM_HANDLE, &handle), OSSL_PARAM_END};
    OSSL_PARAM *public_params = NULL, *params = NULL;
    EVP_PKEY_CTX *ctx = NULL;

    if (public_key == NULL || EVP_PKEY_todata(public_key, EVP_PKEY_PUBLIC_KEY, &public_params) != 1)
        return NULL;
    params = OSSL_PARAM_merge(public_params, handle_params);
    ctx = EVP_PKEY_CTX_new_from_name(library_context, EVP_PKEY_is_a(public_key, "RSA") ? "RSA" : "EC", PROPERTIES);
    if (params == NULL || ctx == NULL || EVP_PKEY_fromdata_init(ctx) != 1 ||
        EVP_PKEY_fromdata(ctx, &key, EVP_PKEY_KEYPAIR, params) != 1)
        key = NULL;
    EVP_PKEY_CTX_free(ctx);
    OSSL_PARAM_free(params);
    OSSL_PARAM_free(public_params);
    return key;
}
