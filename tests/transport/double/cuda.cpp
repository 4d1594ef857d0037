// A double of libcuda for machines without a GPU: device memory is anonymous files, which another
// process maps through a handle that names the owner's descriptor; copies are carried out when their
// event has been asked for a few times, so that whoever does not wait has nothing. It refuses what
// the driver refuses: no current context, an address that is not a base, unknown flags, a handle of
// the same process. Where cuda.h is found the compiler holds every signature against it.

#if __has_include(<cuda.h>)
#include <cuda.h>
#else
#include <cstddef>
typedef int CUresult, CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef unsigned long long CUdeviceptr;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
#define CUDA_SUCCESS 0
#define CUDA_ERROR_INVALID_VALUE 1
#define CUDA_ERROR_NO_DEVICE 100
#define CUDA_ERROR_INVALID_DEVICE 101
#define CUDA_ERROR_INVALID_CONTEXT 201
#define CUDA_ERROR_MAP_FAILED 205
#define CUDA_ERROR_NOT_READY 600
#define cuDeviceGetUuid cuDeviceGetUuid_v2
#define cuDeviceTotalMem cuDeviceTotalMem_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemGetAddressRange cuMemGetAddressRange_v2
#define cuMemHostRegister cuMemHostRegister_v2
#define cuIpcOpenMemHandle cuIpcOpenMemHandle_v2
#endif

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static_assert(sizeof(CUipcMemHandle) == 64 && sizeof(CUuuid) == 16, "as the driver has them");
static_assert(sizeof(CUdeviceptr) == 8 && sizeof(CUdevice) == 4, "as the driver has them");

namespace {

struct Memory { CUdeviceptr base; size_t size; int fd; };
struct Copy { CUdeviceptr to, from; size_t size; };
struct Handle { int pid, fd; size_t size; unsigned char rest[48]; };
static_assert(sizeof(Handle) == sizeof(CUipcMemHandle), "all of it is passed by value");

std::vector<Memory> memories;
std::vector<Memory> pinned;
std::vector<Copy> waiting;
thread_local std::vector<CUcontext> contexts;
int questions = 0;
bool is_stuck = false;
constexpr int QUESTIONS_BEFORE_IT_IS_DONE = 3;

int num_devices() {
    const char *count = getenv("DOUBLE_DEVICES");
    return count ? atoi(count) : 2;
}

Memory *find(CUdeviceptr address, size_t size) {
    for (Memory &memory : memories)
        if (memory.base <= address && address + size <= memory.base + memory.size) return &memory;
    return nullptr;
}

// What a copy may touch without waiting: memory of a device, and pages of the host that are pinned.
bool is_copied(CUdeviceptr address, size_t size) {
    if (find(address, size)) return true;
    for (Memory &memory : pinned)
        if (memory.base <= address && address + size <= memory.base + memory.size) return true;
    return false;
}

CUresult map(int fd, size_t size, CUdeviceptr *address) {
    void *base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return CUDA_ERROR_MAP_FAILED;
    *address = (CUdeviceptr)base;
    memories.push_back({*address, size, fd});
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void double_stick(int stuck) { is_stuck = stuck; }
int double_mapped() { return (int)memories.size(); }
int double_pinned() { return (int)pinned.size(); }
int double_waiting() { return (int)waiting.size(); }

CUresult cuInit(unsigned int) { return num_devices() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }

CUresult cuGetErrorName(CUresult error, const char **name) {
    switch ((int)error) {
        case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case CUDA_ERROR_NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
        case CUDA_ERROR_INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case CUDA_ERROR_INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case CUDA_ERROR_MAP_FAILED: *name = "CUDA_ERROR_MAP_FAILED"; break;
        default: *name = nullptr; return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = num_devices();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal < 0 || ordinal >= num_devices()) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal + 7;  // an ordinal is not a device
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, (size_t)size, "double %d", device - 7);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *size, CUdevice) {
    *size = (size_t)1 << 30;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, 0, sizeof uuid->bytes);
    uuid->bytes[15] = (char)device;
    return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    *can = device != peer && !getenv("DOUBLE_APART");
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(size_t)(0x1000 + device);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
    if ((size_t)context < 0x1007) return CUDA_ERROR_INVALID_CONTEXT;
    contexts.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *context = contexts.back();
    contexts.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *address, size_t size) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    int fd = memfd_create("double of cuda", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) != 0) return CUDA_ERROR_INVALID_VALUE;
    return map(fd, size, address);
}

CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    Memory *memory = find(address, 1);
    if (!memory) return CUDA_ERROR_INVALID_VALUE;
    *base = memory->base;
    *size = memory->size;
    return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    Memory *memory = find(address, 1);
    if (!memory || memory->base != address || getenv("DOUBLE_EXPANDABLE"))
        return CUDA_ERROR_INVALID_VALUE;
    Handle named = {getpid(), memory->fd, memory->size, {}};
    memset(named.rest, 0xAB, sizeof named.rest);
    memcpy(handle, &named, sizeof named);
    return CUDA_SUCCESS;
}

CUresult cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    Handle named;
    memcpy(&named, &handle, sizeof named);
    for (unsigned char byte : named.rest)
        if (byte != 0xAB) return CUDA_ERROR_INVALID_VALUE;
    if (flags != 1) return CUDA_ERROR_INVALID_VALUE;
    if (named.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", named.pid, named.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return CUDA_ERROR_MAP_FAILED;
    CUresult result = map(fd, named.size, address);
    close(fd);
    return result;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    for (size_t i = 0; i < memories.size(); i++)
        if (memories[i].base == address) {
            munmap((void *)address, memories[i].size);
            memories.erase(memories.begin() + (long)i);
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemHostRegister(void *address, size_t size, unsigned int flags) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (!size || flags != 1 || is_copied((CUdeviceptr)address, 1) || getenv("DOUBLE_UNPINNABLE"))
        return CUDA_ERROR_INVALID_VALUE;
    pinned.push_back({(CUdeviceptr)address, size, -1});
    return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void *address) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    for (size_t i = 0; i < pinned.size(); i++)
        if (pinned[i].base == (CUdeviceptr)address) {
            pinned.erase(pinned.begin() + (long)i);
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *stream = (CUstream)0x51;
    return flags == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *event = (CUevent)0xE1;
    return flags == 2 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (stream != (CUstream)0x51 || !is_copied(to, size) || !is_copied(from, size))
        return CUDA_ERROR_INVALID_VALUE;
    waiting.push_back({to, from, size});
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    if (event != (CUevent)0xE1 || stream != (CUstream)0x51) return CUDA_ERROR_INVALID_VALUE;
    questions = 0;
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
    if (event != (CUevent)0xE1) return CUDA_ERROR_INVALID_VALUE;
    if (is_stuck || ++questions < QUESTIONS_BEFORE_IT_IS_DONE) return CUDA_ERROR_NOT_READY;
    for (Copy &copy : waiting) memcpy((void *)copy.to, (void *)copy.from, copy.size);
    waiting.clear();
    return CUDA_SUCCESS;
}

}  // extern "C"
