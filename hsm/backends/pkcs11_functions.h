/*
 * What a worker, and perf/bare_module, call of PKCS#11 v2.40 (OASIS) themselves, declared here rather than taken over
 * with a header of 2,000 lines. Unused members of CK_FUNCTION_LIST are there only to keep the others in their places;
 * those after C_Sign are left out.
 */
#ifndef PKCS11_FUNCTIONS_H
#define PKCS11_FUNCTIONS_H

typedef unsigned char CK_BYTE;
typedef unsigned long CK_ULONG;

#define CKR_OK 0x00UL
#define CKR_CRYPTOKI_ALREADY_INITIALIZED 0x191UL
#define CKF_OS_LOCKING_OK 0x02UL
#define CKF_RW_SESSION 0x02UL
#define CKF_SERIAL_SESSION 0x04UL
#define CKU_USER 1UL

typedef struct {
    CK_BYTE major;
    CK_BYTE minor;
} CK_VERSION;

typedef struct {
    void *create_mutex;
    void *destroy_mutex;
    void *lock_mutex;
    void *unlock_mutex;
    CK_ULONG flags;
    void *reserved;
} CK_INITIALIZE_ARGS;

typedef struct {
    CK_ULONG mechanism;
    void *parameter;
    CK_ULONG parameter_len;
} CK_MECHANISM;

typedef struct {
    CK_ULONG type;
    void *value;
    CK_ULONG value_len;
} CK_ATTRIBUTE;

typedef struct {
    CK_VERSION version;
    CK_ULONG (*C_Initialize)(CK_INITIALIZE_ARGS *);
    CK_ULONG (*C_Finalize)(void *);
    void *C_GetInfo;
    void *C_GetFunctionList;
    CK_ULONG (*C_GetSlotList)(CK_BYTE token_present, CK_ULONG *slots, CK_ULONG *count);
    void *C_GetSlotInfo;
    void *C_GetTokenInfo;
    void *C_GetMechanismList;
    void *C_GetMechanismInfo;
    void *C_InitToken;
    void *C_InitPIN;
    void *C_SetPIN;
    CK_ULONG (*C_OpenSession)(CK_ULONG slot, CK_ULONG flags, void *application, void *notify, CK_ULONG *session);
    void *C_CloseSession;
    void *C_CloseAllSessions;
    void *C_GetSessionInfo;
    void *C_GetOperationState;
    void *C_SetOperationState;
    CK_ULONG (*C_Login)(CK_ULONG session, CK_ULONG user, CK_BYTE *pin, CK_ULONG pin_len);
    void *C_Logout;
    void *C_CreateObject;
    void *C_CopyObject;
    void *C_DestroyObject;
    void *C_GetObjectSize;
    void *C_GetAttributeValue;
    void *C_SetAttributeValue;
    CK_ULONG (*C_FindObjectsInit)(CK_ULONG session, CK_ATTRIBUTE *, CK_ULONG count);
    CK_ULONG (*C_FindObjects)(CK_ULONG session, CK_ULONG *objects, CK_ULONG limit, CK_ULONG *count);
    CK_ULONG (*C_FindObjectsFinal)(CK_ULONG session);
    void *C_EncryptInit;
    void *C_Encrypt;
    void *C_EncryptUpdate;
    void *C_EncryptFinal;
    void *C_DecryptInit;
    void *C_Decrypt;
    void *C_DecryptUpdate;
    void *C_DecryptFinal;
    void *C_DigestInit;
    void *C_Digest;
    void *C_DigestUpdate;
    void *C_DigestKey;
    void *C_DigestFinal;
    CK_ULONG (*C_SignInit)(CK_ULONG session, CK_MECHANISM *, CK_ULONG key);
    CK_ULONG (*C_Sign)(CK_ULONG session, const CK_BYTE *data, CK_ULONG data_len, CK_BYTE *signature, CK_ULONG *len);
} CK_FUNCTION_LIST;

#endif
