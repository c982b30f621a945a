/*
 * A PKCS#11 module for tests: it wraps a real one and does to the caller what HSMs do to theirs. It sleeps, answers
 * with errors, hangs, loses sessions and logins, and hides mechanisms, as its control block says.
 *
 * Beside this library's own file, so that several copies can be at work in one process tree, stand
 *
 *   LIBRARY.target    a line with the path of the module to wrap; then lines NAME=VALUE for its environment
 *   LIBRARY.control   struct control, mapped shared (see __init__.py)
 *
 * Sessions are lost for real: they are closed in the wrapped module, whose own errors the caller then sees.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong_t;

/* Where the functions this module replaces stand in CK_FUNCTION_LIST (PKCS#11 v2.40, section 4.2, order of pkcs11f.h).
 */
enum {
    INITIALIZE = 0,
    FINALIZE = 1,
    GET_FUNCTION_LIST = 3,
    GET_SLOT_LIST = 4,
    GET_TOKEN_INFO = 6,
    GET_MECHANISM_LIST = 7,
    GET_MECHANISM_INFO = 8,
    OPEN_SESSION = 12,
    CLOSE_SESSION = 13,
    CLOSE_ALL_SESSIONS = 14,
    LOGIN = 18,
    FIND_OBJECTS_INIT = 26,
    SIGN_INIT = 42,
    SIGN = 43,
    FUNCTION_COUNT = 68
};

enum { CKR_OK = 0, CKR_GENERAL_ERROR = 5, CKR_MECHANISM_INVALID = 0x70 };

struct function_list {
    unsigned char version[2];
    void *function[FUNCTION_COUNT];
};

/* Bits of control.error_functions and control.hang_functions. */
enum {
    ON_SIGN = 1,
    ON_SIGN_INIT = 2,
    ON_OPEN_SESSION = 4,
    ON_LOGIN = 8,
    ON_FIND = 16,
    ON_SLOTS = 32,
    ON_INITIALIZE = 64
};

enum { HIDDEN_MECHANISMS = 16, SLOTS = 16 };

struct control {
    /* Written by the test. */
    _Atomic uint32_t sign_latency_us;
    _Atomic uint32_t error;           /* the CKR to answer with */
    _Atomic uint32_t error_functions; /* for which functions */
    _Atomic uint32_t error_after;     /* how many calls of them still go well */
    _Atomic uint32_t error_count;     /* how many more times; UINT32_MAX: for ever */
    _Atomic uint32_t hang_functions;  /* which functions do not return as long as this is so */
    _Atomic uint32_t losses;          /* each increment closes all sessions, and so ends the login */
    _Atomic uint32_t close_one_in;    /* one session in so many C_SignInit is closed first; 0: never */
    _Atomic uint32_t close_all_one_in;
    _Atomic uint32_t corrupt_one_in; /* one signature in so many has a bit flipped; 0: never */
    _Atomic uint32_t hidden[HIDDEN_MECHANISMS];
    /* Written by the module. */
    _Atomic uint32_t sign_calls;
    _Atomic uint32_t login_calls;
    _Atomic uint32_t open_sessions;
    _Atomic uint32_t open_session_calls;
    _Atomic uint32_t find_calls;
    _Atomic uint32_t initialize_calls;
    _Atomic uint32_t failed_closes; /* of sessions that were not there: with some modules, of another's */
};

static struct control *control;
static struct function_list *target;
static struct function_list own;
static ulong_t slots[SLOTS];
static int slot_count;
static _Atomic uint32_t losses_done;
/* Closing all sessions while another thread signs is undefined in some modules, so it waits for them. */
static pthread_rwlock_t calls = PTHREAD_RWLOCK_INITIALIZER;

static void remember_slot(ulong_t slot) {
    pthread_rwlock_wrlock(&calls);
    for (int i = 0; i < slot_count; i++) {
        if (slots[i] == slot) {
            pthread_rwlock_unlock(&calls);
            return;
        }
    }
    if (slot_count < SLOTS) {
        slots[slot_count++] = slot;
    }
    pthread_rwlock_unlock(&calls);
}

static void close_all_sessions(void) {
    ulong_t (*close_all)(ulong_t) = target->function[CLOSE_ALL_SESSIONS];
    pthread_rwlock_wrlock(&calls);
    for (int i = 0; i < slot_count; i++) {
        close_all(slots[i]);
    }
    atomic_store(&control->open_sessions, 0);
    pthread_rwlock_unlock(&calls);
}

static void lose_sessions_if_asked(void) {
    uint32_t wanted = atomic_load(&control->losses);
    if (atomic_exchange(&losses_done, wanted) != wanted) {
        close_all_sessions();
    }
}

static int happens(uint32_t one_in) {
    static _Thread_local unsigned int seed;
    if (seed == 0) {
        seed = (unsigned int)(uintptr_t)&seed | 1;
    }
    return one_in != 0 && (uint32_t)rand_r(&seed) % one_in == 0;
}

/* Counts down to 0, or not at all from UINT32_MAX; returns what there was. */
static uint32_t use_one(_Atomic uint32_t *count) {
    uint32_t left = atomic_load(count);
    while (left != 0 && left != UINT32_MAX && !atomic_compare_exchange_weak(count, &left, left - 1)) {
    }
    return left;
}

static void sleep_us(uint32_t us) {
    struct timespec rest = {us / 1000000, (long)(us % 1000000) * 1000};
    while (nanosleep(&rest, &rest) != 0 && errno == EINTR) {
    }
}

/* The error to answer `function` with, or CKR_OK; not before it is to return at all. */
static ulong_t injected(uint32_t function) {
    while (atomic_load(&control->hang_functions) & function) {
        sleep_us(1000);
    }
    if ((atomic_load(&control->error_functions) & function) == 0) {
        return CKR_OK;
    }
    if (use_one(&control->error_after) != 0) {
        return CKR_OK;
    }
    return use_one(&control->error_count) == 0 ? CKR_OK : atomic_load(&control->error);
}

static ulong_t initialize(void *arguments) {
    ulong_t (*call)(void *) = target->function[INITIALIZE];
    atomic_fetch_add(&control->initialize_calls, 1);
    ulong_t error = injected(ON_INITIALIZE);
    return error != CKR_OK ? error : call(arguments);
}

static ulong_t finalize(void *reserved) {
    ulong_t (*call)(void *) = target->function[FINALIZE];
    atomic_store(&control->open_sessions, 0);
    return call(reserved);
}

static ulong_t get_slot_list(unsigned char present, ulong_t *list, ulong_t *count) {
    ulong_t error = injected(ON_SLOTS);
    ulong_t (*call)(unsigned char, ulong_t *, ulong_t *) = target->function[GET_SLOT_LIST];
    return error != CKR_OK ? error : call(present, list, count);
}

static ulong_t get_token_info(ulong_t slot, void *info) {
    ulong_t error = injected(ON_SLOTS);
    ulong_t (*call)(ulong_t, void *) = target->function[GET_TOKEN_INFO];
    return error != CKR_OK ? error : call(slot, info);
}

static int is_hidden(ulong_t mechanism) {
    for (int i = 0; i < HIDDEN_MECHANISMS; i++) {
        /* CKM_RSA_PKCS_KEY_PAIR_GEN is 0, so that nothing hidden is 0 too. */
        if (mechanism != 0 && atomic_load(&control->hidden[i]) == mechanism) {
            return 1;
        }
    }
    return 0;
}

static ulong_t get_mechanism_list(ulong_t slot, ulong_t *list, ulong_t *count) {
    ulong_t (*call)(ulong_t, ulong_t *, ulong_t *) = target->function[GET_MECHANISM_LIST];
    ulong_t result = call(slot, list, count);
    if (result != CKR_OK || list == NULL) {
        return result;
    }
    ulong_t kept = 0;
    for (ulong_t i = 0; i < *count; i++) {
        if (!is_hidden(list[i])) {
            list[kept++] = list[i];
        }
    }
    *count = kept;
    return CKR_OK;
}

static ulong_t get_mechanism_info(ulong_t slot, ulong_t mechanism, void *info) {
    ulong_t (*call)(ulong_t, ulong_t, void *) = target->function[GET_MECHANISM_INFO];
    return is_hidden(mechanism) ? CKR_MECHANISM_INVALID : call(slot, mechanism, info);
}

static ulong_t open_session(ulong_t slot, ulong_t flags, void *application, void *notify, ulong_t *session) {
    ulong_t (*call)(ulong_t, ulong_t, void *, void *, ulong_t *) = target->function[OPEN_SESSION];
    atomic_fetch_add(&control->open_session_calls, 1);
    lose_sessions_if_asked();
    ulong_t error = injected(ON_OPEN_SESSION);
    if (error != CKR_OK) {
        return error;
    }
    remember_slot(slot);
    pthread_rwlock_rdlock(&calls);
    ulong_t result = call(slot, flags, application, notify, session);
    if (result == CKR_OK) {
        atomic_fetch_add(&control->open_sessions, 1);
    }
    pthread_rwlock_unlock(&calls);
    return result;
}

static ulong_t close_session(ulong_t session) {
    ulong_t (*call)(ulong_t) = target->function[CLOSE_SESSION];
    pthread_rwlock_rdlock(&calls);
    ulong_t result = call(session);
    if (result == CKR_OK) {
        atomic_fetch_sub(&control->open_sessions, 1);
    } else {
        atomic_fetch_add(&control->failed_closes, 1);
    }
    pthread_rwlock_unlock(&calls);
    return result;
}

static ulong_t login(ulong_t session, ulong_t user, unsigned char *pin, ulong_t pin_len) {
    ulong_t (*call)(ulong_t, ulong_t, unsigned char *, ulong_t) = target->function[LOGIN];
    atomic_fetch_add(&control->login_calls, 1);
    lose_sessions_if_asked();
    ulong_t error = injected(ON_LOGIN);
    if (error != CKR_OK) {
        return error;
    }
    pthread_rwlock_rdlock(&calls);
    ulong_t result = call(session, user, pin, pin_len);
    pthread_rwlock_unlock(&calls);
    return result;
}

static ulong_t find_objects_init(ulong_t session, void *template, ulong_t count) {
    ulong_t (*call)(ulong_t, void *, ulong_t) = target->function[FIND_OBJECTS_INIT];
    atomic_fetch_add(&control->find_calls, 1);
    lose_sessions_if_asked();
    ulong_t error = injected(ON_FIND);
    if (error != CKR_OK) {
        return error;
    }
    pthread_rwlock_rdlock(&calls);
    ulong_t result = call(session, template, count);
    pthread_rwlock_unlock(&calls);
    return result;
}

static ulong_t sign_init(ulong_t session, void *mechanism, ulong_t key) {
    ulong_t (*call)(ulong_t, void *, ulong_t) = target->function[SIGN_INIT];
    lose_sessions_if_asked();
    if (happens(atomic_load(&control->close_all_one_in))) {
        close_all_sessions();
    }
    if (happens(atomic_load(&control->close_one_in))) {
        close_session(session);
    }
    ulong_t error = injected(ON_SIGN_INIT);
    if (error != CKR_OK) {
        return error;
    }
    pthread_rwlock_rdlock(&calls);
    ulong_t result = call(session, mechanism, key);
    pthread_rwlock_unlock(&calls);
    return result;
}

static ulong_t sign(ulong_t session, unsigned char *data, ulong_t data_len, unsigned char *signature,
                    ulong_t *signature_len) {
    ulong_t (*call)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *) = target->function[SIGN];
    atomic_fetch_add(&control->sign_calls, 1);
    uint32_t latency_us = atomic_load(&control->sign_latency_us);
    if (latency_us != 0) {
        sleep_us(latency_us);
    }
    ulong_t error = injected(ON_SIGN);
    lose_sessions_if_asked();
    if (error != CKR_OK) {
        return error;
    }
    pthread_rwlock_rdlock(&calls);
    ulong_t result = call(session, data, data_len, signature, signature_len);
    pthread_rwlock_unlock(&calls);
    if (result == CKR_OK && signature != NULL && happens(atomic_load(&control->corrupt_one_in))) {
        signature[*signature_len - 1] ^= 1;
    }
    return result;
}

ulong_t C_GetFunctionList(struct function_list **list);

/* Opens the file beside this library whose name ends so. */
static int open_beside(const char *suffix, int flags) {
    char path[PATH_MAX];
    Dl_info self;
    if (dladdr((void *)C_GetFunctionList, &self) == 0) {
        return -1;
    }
    snprintf(path, sizeof path, "%s%s", self.dli_fname, suffix);
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0) {
        fprintf(stderr, "fault_module: %s: %s\n", path, strerror(errno));
    }
    return fd;
}

static int map_control(void) {
    int fd = open_beside(".control", O_RDWR);
    if (fd < 0) {
        return 0;
    }
    void *block = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (block == MAP_FAILED) {
        return 0;
    }
    control = block;
    atomic_store(&losses_done, atomic_load(&control->losses));
    atomic_store(&control->open_sessions, 0);
    return 1;
}

static int load_target(void) {
    char line[PATH_MAX];
    int fd = open_beside(".target", O_RDONLY);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
    void *library = NULL;
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *value = strchr(line, '=');
        if (library == NULL) {
            library = dlopen(line, RTLD_NOW | RTLD_LOCAL);
        } else if (value != NULL) {
            *value = '\0';
            setenv(line, value + 1, 1);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    ulong_t (*get_list)(struct function_list **);
    if (library == NULL || (*(void **)&get_list = dlsym(library, "C_GetFunctionList")) == NULL) {
        fprintf(stderr, "fault_module: no module to wrap\n");
        return 0;
    }
    return get_list(&target) == CKR_OK;
}

ulong_t C_GetFunctionList(struct function_list **list) {
    if (target == NULL) {
        if (!map_control() || !load_target()) {
            target = NULL;
            return CKR_GENERAL_ERROR;
        }
        own = *target;
        own.function[INITIALIZE] = initialize;
        own.function[FINALIZE] = finalize;
        own.function[GET_FUNCTION_LIST] = C_GetFunctionList;
        own.function[GET_SLOT_LIST] = get_slot_list;
        own.function[GET_TOKEN_INFO] = get_token_info;
        own.function[GET_MECHANISM_LIST] = get_mechanism_list;
        own.function[GET_MECHANISM_INFO] = get_mechanism_info;
        own.function[OPEN_SESSION] = open_session;
        own.function[CLOSE_SESSION] = close_session;
        own.function[LOGIN] = login;
        own.function[FIND_OBJECTS_INIT] = find_objects_init;
        own.function[SIGN_INIT] = sign_init;
        own.function[SIGN] = sign;
    }
    *list = &own;
    return CKR_OK;
}
