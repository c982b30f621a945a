/*
 * What a PKCS#11 module costs by itself: threads that sign with a session each and do nothing else.
 *
 *   bare_module MODULE PIN THREADS SECONDS   prints signatures per second and CPU microseconds of each
 *
 * The first token's first private key signs, by CKM_ECDSA.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pkcs11_functions.h"

enum { CKO_PRIVATE_KEY = 3, CKA_CLASS = 0, CKM_ECDSA = 0x1041, MAX_SLOTS = 16 };

static CK_FUNCTION_LIST *module;
static CK_ULONG slot, key;
static atomic_int stopping;
static atomic_long signatures;

static void check(const char *function, CK_ULONG code) {
    if (code != CKR_OK) {
        fprintf(stderr, "bare_module: %s: 0x%lx\n", function, code);
        exit(1);
    }
}

static CK_ULONG open_session(void) {
    CK_ULONG session;
    check("C_OpenSession", module->C_OpenSession(slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session));
    return session;
}

static void *sign(void *unused) {
    CK_ULONG session = open_session();
    CK_MECHANISM mechanism = {CKM_ECDSA, NULL, 0};
    CK_BYTE hash[32] = {1}, signature[1024];
    long made = 0;
    while (!atomic_load_explicit(&stopping, memory_order_relaxed)) {
        CK_ULONG size = sizeof signature;
        check("C_SignInit", module->C_SignInit(session, &mechanism, key));
        check("C_Sign", module->C_Sign(session, hash, sizeof hash, signature, &size));
        made++;
    }
    atomic_fetch_add(&signatures, made);
    return unused;
}

static void open_module(const char *path, const char *pin) {
    CK_ULONG (*get_list)(CK_FUNCTION_LIST **);
    CK_ULONG slots[MAX_SLOTS], count = MAX_SLOTS, class = CKO_PRIVATE_KEY;
    CK_INITIALIZE_ARGS arguments = {.flags = CKF_OS_LOCKING_OK};
    CK_ATTRIBUTE template = {CKA_CLASS, &class, sizeof class};
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL || (*(void **)&get_list = dlsym(library, "C_GetFunctionList")) == NULL) {
        fprintf(stderr, "bare_module: %s\n", dlerror());
        exit(1);
    }
    check("C_GetFunctionList", get_list(&module));
    check("C_Initialize", module->C_Initialize(&arguments));
    check("C_GetSlotList", module->C_GetSlotList(1, slots, &count));
    slot = slots[0];
    CK_ULONG session = open_session();
    check("C_Login", module->C_Login(session, CKU_USER, (CK_BYTE *)pin, strlen(pin)));
    check("C_FindObjectsInit", module->C_FindObjectsInit(session, &template, 1));
    check("C_FindObjects", module->C_FindObjects(session, &key, 1, &count));
    check("C_FindObjectsFinal", module->C_FindObjectsFinal(session));
}

static double cpu_s(void) {
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (double)used.tv_sec + (double)used.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: bare_module MODULE PIN THREADS SECONDS\n");
        return 2;
    }
    int threads = atoi(argv[3]), seconds = atoi(argv[4]);
    pthread_t *ids = calloc((size_t)threads, sizeof *ids);
    open_module(argv[1], argv[2]);
    double begun_s = cpu_s();
    for (int i = 0; i < threads; i++) {
        pthread_create(&ids[i], NULL, sign, NULL);
    }
    sleep((unsigned int)seconds);
    atomic_store(&stopping, 1);
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
    }
    double used_s = cpu_s() - begun_s;
    printf("%.1f %.2f\n", (double)signatures / seconds, used_s / (double)signatures * 1e6);
    return 0;
}
