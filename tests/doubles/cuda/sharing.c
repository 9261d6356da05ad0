/* Handles. A handle names the exporter's block, its pid and ipc namespace and its user.
 *
 * Other pid namespace: INVALID_CONTEXT. openucx/ucx PR #11513 ("legacy CUDA IPC handles cannot be exchanged across
 * different PID namespaces"), vLLM PR #55906 ("invalid device context").
 * Other ipc namespace, other user: unknown, the worse is assumed. ucx #10070 asks for --ipc=host. The kernel module's
 * default policy shares with nobody; what libcuda sets is ALL or OS_SECURITY_TOKEN, which is "same user"
 * (open-gpu-kernel-modules src/nvidia/src/kernel/rmapi/sharing.c, os.c osValidateClientTokens). Row G4 of the proof
 * decides; CUDA_DOUBLE_SHARE_POLICY=all is the better case.
 */
#include "double.h"
#include <signal.h>

#define HANDLE_MAGIC 0x6475627543415044ull

typedef struct { char reserved[64]; } Handle;
struct handle {
    uint64_t magic, pid_namespace, ipc_namespace;
    uint32_t block, offset;
    uint64_t size;
    int32_t pid, uid, card, instance;
};
_Static_assert(sizeof(struct handle) <= sizeof(Handle), "a handle has 64 bytes");

static uint64_t namespace(const char *name) {
    char path[64];
    struct stat found;
    snprintf(path, sizeof path, "/proc/self/ns/%s", name);
    return stat(path, &found) ? 0 : found.st_ino;
}

static bool shares_with_all(void) {
    const char *policy = getenv("CUDA_DOUBLE_SHARE_POLICY");
    return policy && !strcmp(policy, "all");
}

API int cuIpcGetMemHandle(Handle *out, uint64_t address) {
    int code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (one && !one->is_import && !one->is_mapped_kind) {
        struct device device = visible[one->device];
        struct handle handle = {
            .magic = HANDLE_MAGIC, .pid_namespace = namespace("pid"), .ipc_namespace = namespace("ipc"),
            .block = (uint32_t)one->block, .offset = (uint32_t)one->offset,
            .size = one->size < BLOCK_BYTES ? BLOCK_BYTES : one->size,
            .pid = getpid(), .uid = (int32_t)geteuid(), .card = device.card, .instance = device.instance,
        };
        memset(out, 0, sizeof *out);
        memcpy(out, &handle, sizeof handle);
        code = SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* Whether this process may open it, on this device. */
static int check(const struct handle *handle, int device) {
    if (handle->pid_namespace != namespace("pid")) return INVALID_CONTEXT;
    if (!shares_with_all() && handle->ipc_namespace != namespace("ipc")) return INVALID_CONTEXT;
    if (!shares_with_all() && handle->uid != (int32_t)geteuid()) return NOT_PERMITTED;
    if (kill(handle->pid, 0) && errno == ESRCH) return INVALID_HANDLE;  /* a handle ends with its exporter */
    if (handle->pid == getpid()) return violation(INVALID_CONTEXT, "a process opens its own memory");
    if (visible[device].card != handle->card || visible[device].instance != handle->instance)
        return violation(INVALID_CONTEXT, "memory of card %d is opened on card %d", handle->card, visible[device].card);
    return SUCCESS;
}

static struct allocation *opened_before(const struct handle *handle) {
    for (int index = 0; index < ALLOCATIONS; index++) {
        struct allocation *one = &allocations[index];
        if (one->base && one->is_import && one->exporter == handle->pid && one->block == handle->block) return one;
    }
    return NULL;
}

static void import_path(char *path, size_t size, int exporter, uint64_t number) {
    path_of(path, size, "import-%d-%lu-%d", exporter, (unsigned long)number, getpid());
}

static struct allocation *open_block(const struct handle *handle, int device) {
    char path[512];
    struct allocation *one = attach(handle->pid, handle->block, handle->size, false);
    if (!one) return NULL;
    import_path(path, sizeof path, handle->pid, handle->block);
    int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0) close(fd);
    one->is_import = true;
    one->device = device;
    one->exporter = handle->pid;
    return one;
}

/* cuda.h: opened again it is the same address, and the driver counts. */
API int cuIpcOpenMemHandle_v2(uint64_t *address, Handle in, unsigned flags) {
    struct handle handle;
    int device = current();
    memcpy(&handle, &in, sizeof handle);
    if (device < 0) return INVALID_CONTEXT;
    if (flags != 1 || handle.magic != HANDLE_MAGIC) return INVALID_VALUE;
    if (fault("open-refused") >= 0) return MAP_FAILED_;
    int code = check(&handle, device);
    if (code) return code;
    pthread_mutex_lock(&lock);
    struct allocation *one = opened_before(&handle);
    if (!one) one = open_block(&handle, device);
    if (one) { one->opened++; *address = one->base + handle.offset; }
    pthread_mutex_unlock(&lock);
    return one ? SUCCESS : INVALID_HANDLE;
}

API int cuIpcCloseMemHandle(uint64_t address) {
    char path[512];
    int code = SUCCESS;
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (!one || !one->is_import) {
        code = violation(INVALID_VALUE, "%#lx is not open", (unsigned long)address);
    } else if (one->device != current()) {
        code = violation(INVALID_CONTEXT, "memory of device %d is closed on device %d", one->device, current());
    } else if (!--one->opened) {
        import_path(path, sizeof path, one->exporter, one->block);
        unlink(path);
        detach(one);
    }
    pthread_mutex_unlock(&lock);
    return code;
}
