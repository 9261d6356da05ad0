/* Contexts: only primary ones. */
#include "double.h"
#include <sys/file.h>

static bool peers[CARDS * INSTANCES][CARDS * INSTANCES];
static int retained[CARDS * INSTANCES];
static __thread void *stack[16];
static __thread int depth;

void *current_context(void) { return depth ? stack[depth - 1] : NULL; }

int current(void) {
    if (!initialized || !current_context()) return -1;
    return (int)((uintptr_t)current_context() - (uintptr_t)CONTEXT(0));
}

/* cuda.h, CU_COMPUTEMODE_EXCLUSIVE_PROCESS: contexts of one process at a time. The lock ends with the process. */
static bool is_free(int card) {
    static int locks[CARDS];
    char path[512];
    if (fault("exclusive-process") < 0 || locks[card]) return true;
    path_of(path, sizeof path, "exclusive-%d", card);
    int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB)) { close(fd); return false; }
    locks[card] = fd;
    return true;
}

API int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (!initialized) return NOT_INITIALIZED;
    if (device < 0 || device >= visible_count) return INVALID_DEVICE;
    if (fault("out-of-memory") >= 0) return OUT_OF_MEMORY;
    if (!is_free(visible[device].card)) return DEVICE_UNAVAILABLE;
    __atomic_fetch_add(&retained[device], 1, __ATOMIC_SEQ_CST);
    *context = CONTEXT(device);
    return SUCCESS;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
    if (__atomic_fetch_sub(&retained[device], 1, __ATOMIC_SEQ_CST) <= 0) {
        retained[device] = 0;
        return violation(INVALID_CONTEXT, "the context of device %d is released once too often", device);
    }
    return SUCCESS;
}

static bool is_context(void *context) {
    uintptr_t device = (uintptr_t)context - (uintptr_t)CONTEXT(0);
    return device < CARDS * INSTANCES && retained[device] > 0;
}

API int cuCtxSetCurrent(void *context) {
    if (context && !is_context(context)) return violation(INVALID_CONTEXT, "no such context: %p", context);
    if (!depth) depth = 1;
    stack[depth - 1] = context;
    return SUCCESS;
}

API int cuCtxPushCurrent_v2(void *context) {
    if (!is_context(context)) return violation(INVALID_CONTEXT, "no such context: %p", context);
    stack[depth++] = context;
    return SUCCESS;
}

API int cuCtxPopCurrent_v2(void **context) {
    if (!depth) return violation(INVALID_CONTEXT, "nothing to pop");
    *context = stack[--depth];
    return SUCCESS;
}

API int cuCtxEnablePeerAccess(void *context, unsigned flags) {
    int device = current(), peer = (int)((uintptr_t)context - (uintptr_t)CONTEXT(0));
    if (flags) return INVALID_VALUE;
    if (device < 0 || !is_context(context) || device == peer) return INVALID_CONTEXT;
    if (fault("no-peer-access") >= 0) return PEER_ACCESS_UNSUPPORTED;
    if (peers[device][peer]) return PEER_ACCESS_ALREADY_ENABLED;
    peers[device][peer] = true;
    return SUCCESS;
}
