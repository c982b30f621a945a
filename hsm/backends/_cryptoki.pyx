# cython: language_level=3
"""The PKCS#11 functions a worker needs, each called without the GIL. See _cryptoki.pyi.

Why not a general binding: the module must be initialised for threads, a signature must be one C_SignInit and one C_Sign
with no length query and one hand-over of the GIL, and recovery needs the CKR itself. That leaves little for one to do.
"""

from hsm.backends.pkcs11_errors import CryptokiError

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free

cdef extern from "<dlfcn.h>" nogil:
    int RTLD_NOW
    int RTLD_LOCAL
    void *dlopen(const char *filename, int flags)
    void *dlsym(void *handle, const char *symbol)
    char *dlerror()

cdef extern from "pkcs11_functions.h" nogil:
    ctypedef unsigned long CK_ULONG
    ctypedef unsigned char CK_BYTE
    CK_ULONG CKR_OK, CKR_CRYPTOKI_ALREADY_INITIALIZED, CKR_ATTRIBUTE_SENSITIVE, CKR_ATTRIBUTE_TYPE_INVALID
    CK_ULONG CKF_OS_LOCKING_OK, CKF_SERIAL_SESSION, CKF_RW_SESSION, CKU_USER, CK_UNAVAILABLE_INFORMATION
    ctypedef struct CK_INITIALIZE_ARGS:
        CK_ULONG flags
    ctypedef struct CK_TOKEN_INFO:
        CK_BYTE label[32]
        CK_BYTE serial[16]
        CK_ULONG flags
    ctypedef struct CK_MECHANISM:
        CK_ULONG mechanism
        void *parameter
        CK_ULONG parameter_len
    ctypedef struct CK_MECHANISM_INFO:
        CK_ULONG flags
    ctypedef struct CK_ATTRIBUTE:
        CK_ULONG type
        void *value
        CK_ULONG value_len
    ctypedef struct CK_FUNCTION_LIST:
        CK_ULONG (*C_Initialize)(CK_INITIALIZE_ARGS *) noexcept nogil
        CK_ULONG (*C_Finalize)(void *) noexcept nogil
        CK_ULONG (*C_GetSlotList)(CK_BYTE, CK_ULONG *, CK_ULONG *) noexcept nogil
        CK_ULONG (*C_GetTokenInfo)(CK_ULONG, CK_TOKEN_INFO *) noexcept nogil
        CK_ULONG (*C_GetMechanismList)(CK_ULONG, CK_ULONG *, CK_ULONG *) noexcept nogil
        CK_ULONG (*C_GetMechanismInfo)(CK_ULONG, CK_ULONG, CK_MECHANISM_INFO *) noexcept nogil
        CK_ULONG (*C_OpenSession)(CK_ULONG, CK_ULONG, void *, void *, CK_ULONG *) noexcept nogil
        CK_ULONG (*C_CloseSession)(CK_ULONG) noexcept nogil
        CK_ULONG (*C_Login)(CK_ULONG, CK_ULONG, CK_BYTE *, CK_ULONG) noexcept nogil
        CK_ULONG (*C_GetAttributeValue)(CK_ULONG, CK_ULONG, CK_ATTRIBUTE *, CK_ULONG) noexcept nogil
        CK_ULONG (*C_FindObjectsInit)(CK_ULONG, CK_ATTRIBUTE *, CK_ULONG) noexcept nogil
        CK_ULONG (*C_FindObjects)(CK_ULONG, CK_ULONG *, CK_ULONG, CK_ULONG *) noexcept nogil
        CK_ULONG (*C_FindObjectsFinal)(CK_ULONG) noexcept nogil
        CK_ULONG (*C_SignInit)(CK_ULONG, CK_MECHANISM *, CK_ULONG) noexcept nogil
        CK_ULONG (*C_Sign)(CK_ULONG, const CK_BYTE *, CK_ULONG, CK_BYTE *, CK_ULONG *) noexcept nogil
        CK_ULONG (*C_GenerateKeyPair)(
            CK_ULONG, CK_MECHANISM *, CK_ATTRIBUTE *, CK_ULONG, CK_ATTRIBUTE *, CK_ULONG, CK_ULONG *, CK_ULONG *
        ) noexcept nogil

ctypedef CK_ULONG (*GetFunctionList)(CK_FUNCTION_LIST **) noexcept nogil

cdef enum:
    MAX_SIGNATURE_BYTES = 1024
    MAX_ATTRIBUTE_BYTES = 65536
    FIND_BATCH = 64


cdef inline int check(str function, CK_ULONG code) except -1:
    if code != CKR_OK:
        raise CryptokiError(function, code)
    return 0


cdef class Template:
    """CK_ATTRIBUTEs that point into the values of a dict, which this keeps alive."""

    cdef CK_ATTRIBUTE *attributes
    cdef CK_ULONG count
    cdef object values

    def __cinit__(self, dict values):
        cdef bytes value
        self.values = dict(values)
        self.count = <CK_ULONG>len(values)
        self.attributes = <CK_ATTRIBUTE *>calloc(self.count or 1, sizeof(CK_ATTRIBUTE))
        if self.attributes == NULL:
            raise MemoryError
        for index, (type_, value) in enumerate(self.values.items()):
            self.attributes[<CK_ULONG>index].type = type_
            self.attributes[<CK_ULONG>index].value = <void *><char *>value
            self.attributes[<CK_ULONG>index].value_len = <CK_ULONG>len(value)

    def __dealloc__(self):
        free(self.attributes)


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

    def slots(self):
        cdef CK_ULONG count = 0
        cdef CK_ULONG code
        cdef CK_ULONG *slots
        # Asking for the count also makes a module look for new slots (v2.40, C_GetSlotList).
        with nogil:
            code = self.functions.C_GetSlotList(1, NULL, &count)
        check("C_GetSlotList", code)
        slots = <CK_ULONG *>calloc(count or 1, sizeof(CK_ULONG))
        if slots == NULL:
            raise MemoryError
        try:
            with nogil:
                code = self.functions.C_GetSlotList(1, slots, &count)
            check("C_GetSlotList", code)
            return [slots[i] for i in range(count)]
        finally:
            free(slots)

    def token_info(self, CK_ULONG slot):
        cdef CK_TOKEN_INFO info
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_GetTokenInfo(slot, &info)
        check("C_GetTokenInfo", code)
        return info.label[:32], info.serial[:16], info.flags

    def mechanisms(self, CK_ULONG slot):
        cdef CK_ULONG count = 0
        cdef CK_ULONG code
        cdef CK_ULONG *mechanisms
        cdef CK_MECHANISM_INFO info
        with nogil:
            code = self.functions.C_GetMechanismList(slot, NULL, &count)
        check("C_GetMechanismList", code)
        mechanisms = <CK_ULONG *>calloc(count or 1, sizeof(CK_ULONG))
        if mechanisms == NULL:
            raise MemoryError
        try:
            with nogil:
                code = self.functions.C_GetMechanismList(slot, mechanisms, &count)
            check("C_GetMechanismList", code)
            result = {}
            for i in range(count):
                code = self.functions.C_GetMechanismInfo(slot, mechanisms[i], &info)
                check("C_GetMechanismInfo", code)
                result[mechanisms[i]] = info.flags
            return result
        finally:
            free(mechanisms)

    def open_session(self, CK_ULONG slot):
        cdef CK_ULONG session
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_OpenSession(slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session)
        check("C_OpenSession", code)
        return session

    def close_session(self, CK_ULONG session):
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_CloseSession(session)
        check("C_CloseSession", code)

    def login(self, CK_ULONG session, const CK_BYTE[:] pin):
        cdef CK_BYTE *data = <CK_BYTE *>&pin[0]
        cdef CK_ULONG size = <CK_ULONG>pin.shape[0]
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_Login(session, CKU_USER, data, size)
        check("C_Login", code)

    def find_objects(self, CK_ULONG session, dict template, CK_ULONG limit):
        cdef Template wanted = Template(template)
        cdef CK_ULONG batch[FIND_BATCH]
        cdef CK_ULONG count = 0
        cdef CK_ULONG code
        cdef list found = []
        with nogil:
            code = self.functions.C_FindObjectsInit(session, wanted.attributes, wanted.count)
        check("C_FindObjectsInit", code)
        try:
            while <CK_ULONG>len(found) < limit:
                with nogil:
                    code = self.functions.C_FindObjects(session, batch, FIND_BATCH, &count)
                check("C_FindObjects", code)
                if count == 0:
                    break
                found.extend([batch[i] for i in range(count)])
        finally:
            with nogil:
                self.functions.C_FindObjectsFinal(session)
        return found[:limit]

    def attribute(self, CK_ULONG session, CK_ULONG object_, CK_ULONG type_):
        cdef CK_ATTRIBUTE attribute = CK_ATTRIBUTE(type=type_, value=NULL, value_len=0)
        cdef CK_ULONG code
        cdef bytes value
        with nogil:
            code = self.functions.C_GetAttributeValue(session, object_, &attribute, 1)
        if code in (CKR_ATTRIBUTE_SENSITIVE, CKR_ATTRIBUTE_TYPE_INVALID):
            return None
        check("C_GetAttributeValue", code)
        if attribute.value_len == CK_UNAVAILABLE_INFORMATION or attribute.value_len > MAX_ATTRIBUTE_BYTES:
            return None
        value = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>attribute.value_len)
        attribute.value = <char *>value
        with nogil:
            code = self.functions.C_GetAttributeValue(session, object_, &attribute, 1)
        check("C_GetAttributeValue", code)
        return value[:attribute.value_len]

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

    def generate_key_pair(self, CK_ULONG session, CK_ULONG mechanism, dict public, dict private):
        cdef CK_MECHANISM wanted = CK_MECHANISM(mechanism=mechanism, parameter=NULL, parameter_len=0)
        cdef Template public_template = Template(public)
        cdef Template private_template = Template(private)
        cdef CK_ULONG public_key
        cdef CK_ULONG private_key
        cdef CK_ULONG code
        with nogil:
            code = self.functions.C_GenerateKeyPair(
                session, &wanted, public_template.attributes, public_template.count,
                private_template.attributes, private_template.count, &public_key, &private_key)
        check("C_GenerateKeyPair", code)
        return public_key, private_key
