# cython: language_level=3
"""The PKCS#11 calls that are not python-pkcs11's, each made without the GIL. See _cryptoki.pyi."""

from hsm.backends.pkcs11_errors import CryptokiError

cdef extern from "<dlfcn.h>" nogil:
    int RTLD_NOW
    int RTLD_LOCAL
    void *dlopen(const char *filename, int flags)
    void *dlsym(void *handle, const char *symbol)
    char *dlerror()

cdef extern from "pkcs11_functions.h" nogil:
    ctypedef unsigned long CK_ULONG
    ctypedef unsigned char CK_BYTE
    CK_ULONG CKR_OK, CKR_CRYPTOKI_ALREADY_INITIALIZED, CKF_OS_LOCKING_OK, CKU_USER
    ctypedef struct CK_INITIALIZE_ARGS:
        CK_ULONG flags
    ctypedef struct CK_MECHANISM:
        CK_ULONG mechanism
        void *parameter
        CK_ULONG parameter_len
    ctypedef struct CK_FUNCTION_LIST:
        CK_ULONG (*C_Initialize)(CK_INITIALIZE_ARGS *) noexcept nogil
        CK_ULONG (*C_Finalize)(void *) noexcept nogil
        CK_ULONG (*C_Login)(CK_ULONG, CK_ULONG, CK_BYTE *, CK_ULONG) noexcept nogil
        CK_ULONG (*C_SignInit)(CK_ULONG, CK_MECHANISM *, CK_ULONG) noexcept nogil
        CK_ULONG (*C_Sign)(CK_ULONG, const CK_BYTE *, CK_ULONG, CK_BYTE *, CK_ULONG *) noexcept nogil

ctypedef CK_ULONG (*GetFunctionList)(CK_FUNCTION_LIST **) noexcept nogil

cdef enum:
    MAX_SIGNATURE_BYTES = 1024


cdef inline int check(str function, CK_ULONG code) except -1:
    if code != CKR_OK:
        raise CryptokiError(function, code)
    return 0


cdef class Module:
    cdef CK_FUNCTION_LIST *functions

    def __cinit__(self, str path):
        cdef bytes encoded = path.encode("utf-8", "surrogateescape")
        cdef void *library = dlopen(encoded, RTLD_NOW | RTLD_LOCAL)
        cdef GetFunctionList get_function_list
        cdef CK_ULONG code
        if library == NULL:
            raise OSError(dlerror().decode("utf-8", "replace"))
        get_function_list = <GetFunctionList>dlsym(library, "C_GetFunctionList")
        if get_function_list == NULL:
            raise OSError(f"{path}: not a PKCS#11 module: it has no C_GetFunctionList")
        with nogil:
            code = get_function_list(&self.functions)
        check("C_GetFunctionList", code)

    def initialize(self):
        cdef CK_INITIALIZE_ARGS arguments
        cdef CK_ULONG code
        arguments = CK_INITIALIZE_ARGS(flags=CKF_OS_LOCKING_OK)
        with nogil:
            code = self.functions.C_Initialize(&arguments)
        if code != CKR_CRYPTOKI_ALREADY_INITIALIZED:
            check("C_Initialize", code)

    def finalize(self):
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_Finalize(NULL)
        check("C_Finalize", code)

    def login(self, CK_ULONG session, const CK_BYTE[:] pin):
        cdef CK_BYTE *data = <CK_BYTE *>&pin[0]
        cdef CK_ULONG size = <CK_ULONG>pin.shape[0]
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_Login(session, CKU_USER, data, size)
        check("C_Login", code)

    def sign(self, CK_ULONG session, CK_ULONG mechanism, bytes parameter, CK_ULONG key, bytes data):
        cdef CK_MECHANISM wanted
        cdef CK_BYTE signature[MAX_SIGNATURE_BYTES]
        cdef CK_ULONG signature_len = MAX_SIGNATURE_BYTES
        cdef const CK_BYTE *data_start = <const CK_BYTE *><char *>data
        cdef CK_ULONG data_len = <CK_ULONG>len(data)
        cdef CK_ULONG init_code
        cdef CK_ULONG code = CKR_OK
        wanted.mechanism = mechanism
        wanted.parameter_len = <CK_ULONG>len(parameter)
        wanted.parameter = <void *><char *>parameter if wanted.parameter_len else NULL
        with nogil:
            init_code = self.functions.C_SignInit(session, &wanted, key)
            if init_code == CKR_OK:
                code = self.functions.C_Sign(session, data_start, data_len, signature, &signature_len)
        check("C_SignInit", init_code)
        check("C_Sign", code)
        return signature[:signature_len]
