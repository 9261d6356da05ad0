/* A double of NVIDIA's driver at its C ABI, over memory that processes share: see README.md. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define DEVICES 4
#define ALLOCATIONS 4096
#define CONTEXT(device) ((void *)(uintptr_t)(0xC0DE00 + (device)))
#define HANDLE_MAGIC 0x6475627543415044ull

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201, MAP_FAILED_ = 205, PEER_ACCESS_UNSUPPORTED = 217, INVALID_HANDLE = 400, ILLEGAL_ADDRESS = 700,
    PEER_ACCESS_ALREADY_ENABLED = 704,
};

typedef struct { char reserved[64]; } Handle;
struct handle { uint64_t magic, number, size; int32_t pid, device; };

struct allocation {
    uint64_t number;
    uint64_t base;  /* what callers see: no access */
    char *memory;   /* where the double reads and writes */
    uint64_t size;
    int device;
    bool is_import, is_mapped_kind;
    int exporter;
};

struct operation { uint64_t destination, source, size; struct operation *next; };
struct stream { void *context; struct operation *first, **last; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct allocation allocations[ALLOCATIONS];
static bool initialized, peers[DEVICES][DEVICES];
static struct stream default_stream = {.last = &default_stream.first};
static int retained[DEVICES];
static __thread void *stack[16];
static __thread int depth;

static const char *state(void) {
    const char *directory = getenv("CUDA_DOUBLE_STATE");
    return directory ? directory : "/tmp";
}

static void path_of(char *path, size_t size, const char *format, ...) {
    va_list arguments;
    int length = snprintf(path, size, "%s/", state());
    va_start(arguments, format);
    vsnprintf(path + length, size - length, format, arguments);
    va_end(arguments);
}

/* A caller's bug: it is written down, and the call fails. */
static int violation(int code, const char *format, ...) {
    char path[512], text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    path_of(path, sizeof path, "violations");
    FILE *file = fopen(path, "a");
    if (file) { fprintf(file, "%d: %s\n", getpid(), text); fclose(file); }
    return code;
}

/* The value of a fault, -1 if it is not set: a file of that name. */
static double fault(const char *name) {
    char path[512];
    double value = 0;
    path_of(path, sizeof path, "fault-%s", name);
    FILE *file = fopen(path, "r");
    if (!file) return -1;
    if (fscanf(file, "%lf", &value) != 1) value = 0;
    fclose(file);
    return value;
}

/* ---- devices */

static int visible[DEVICES], visible_count;

static void uuid_of(int card, unsigned char *uuid) {
    for (int index = 0; index < 16; index++) uuid[index] = (unsigned char)(0x10 * (card + 1) + index);
}

static void find_visible(void) {
    const char *variable = getenv("CUDA_VISIBLE_DEVICES");
    if (!variable) {
        for (visible_count = 0; visible_count < DEVICES; visible_count++) visible[visible_count] = visible_count;
        return;
    }
    char copy[256], *rest = copy, *part;
    snprintf(copy, sizeof copy, "%s", variable);
    while ((part = strsep(&rest, ","))) {
        char *end;
        long card = strtol(part, &end, 10);
        if (end == part || *end || card < 0 || card >= DEVICES) return;  /* as the driver: what follows is hidden */
        visible[visible_count++] = (int)card;
    }
}

API int cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    if (!initialized) find_visible();
    initialized = true;
    pthread_mutex_unlock(&lock);
    return visible_count ? SUCCESS : NO_DEVICE;
}

API int cuGetErrorName(int code, const char **text) {
    static const struct { int code; const char *name; } names[] = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {MAP_FAILED_, "CUDA_ERROR_MAP_FAILED"},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"}, {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    };
    for (size_t index = 0; index < sizeof names / sizeof *names; index++)
        if (names[index].code == code) { *text = names[index].name; return SUCCESS; }
    *text = "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}

API int cuGetErrorString(int code, const char **text) {
    *text = code == NO_DEVICE ? "no CUDA-capable device is detected" : "the double refuses";
    return SUCCESS;
}

API int cuDeviceGetCount(int *count) {
    if (!initialized) return NOT_INITIALIZED;
    *count = visible_count;
    return SUCCESS;
}

API int cuDeviceGet(int *device, int index) {
    if (!initialized) return NOT_INITIALIZED;
    if (index < 0 || index >= visible_count) return INVALID_DEVICE;
    *device = index;
    return SUCCESS;
}

API int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, (size_t)size, "Double of a GPU");
    return device < visible_count ? SUCCESS : INVALID_DEVICE;
}

API int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    if (device >= visible_count) return INVALID_DEVICE;
    uuid_of(visible[device], uuid);
    return SUCCESS;
}

API int cuDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer && fault("no-peer-access") < 0;
    return SUCCESS;
}

/* ---- contexts: only primary ones */

static int current(void) {
    if (!initialized || !depth || !stack[depth - 1]) return -1;
    return (int)((uintptr_t)stack[depth - 1] - (uintptr_t)CONTEXT(0));
}

API int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (!initialized) return NOT_INITIALIZED;
    if (device < 0 || device >= visible_count) return INVALID_DEVICE;
    if (fault("out-of-memory") >= 0) return OUT_OF_MEMORY;
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
    return device < DEVICES && retained[device] > 0;
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
    (void)flags;
    if (device < 0 || !is_context(context) || device == peer) return INVALID_CONTEXT;
    if (fault("no-peer-access") >= 0) return PEER_ACCESS_UNSUPPORTED;
    if (peers[device][peer]) return PEER_ACCESS_ALREADY_ENABLED;
    peers[device][peer] = true;
    return SUCCESS;
}

/* ---- memory */

static struct allocation *find(uint64_t address) {
    for (int index = 0; index < ALLOCATIONS; index++) {
        struct allocation *one = &allocations[index];
        if (one->base && address >= one->base && address < one->base + one->size) return one;
    }
    return NULL;
}

static void memory_path(char *path, size_t size, int pid, uint64_t number) {
    path_of(path, size, "memory-%d-%lu", pid, (unsigned long)number);
}

static void import_path(char *path, size_t size, const struct handle *handle) {
    path_of(path, size, "import-%d-%lu-%d", handle->pid, (unsigned long)handle->number, getpid());
}

static struct allocation *attach(const char *path, uint64_t size, int flags) {
    static uint64_t next = 1;
    for (int index = 0; index < ALLOCATIONS; index++) {
        struct allocation *one = &allocations[index];
        if (one->base) continue;
        int fd = open(path, flags | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0) return NULL;
        if ((flags & O_CREAT) && ftruncate(fd, (off_t)size)) { close(fd); return NULL; }
        char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        void *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        close(fd);
        *one = (struct allocation){.number = next++, .base = (uint64_t)base, .memory = memory, .size = size};
        return one;
    }
    return NULL;
}

/* The addresses stay reserved, so that a stale one is recognised for ever. */
static void detach(struct allocation *one) {
    munmap(one->memory, one->size);
    memset(one, 0, sizeof *one);
}

API int cuMemAlloc_v2(uint64_t *address, size_t size) {
    static uint64_t numbers;
    char path[512];
    int device = current();
    if (device < 0) return INVALID_CONTEXT;
    if (!size) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    uint64_t number = ++numbers;
    memory_path(path, sizeof path, getpid(), number);
    struct allocation *one = attach(path, size, O_CREAT | O_EXCL);
    if (one) { one->device = device; one->number = number; one->is_mapped_kind = fault("mapped-memory") >= 0; }
    *address = one ? one->base : 0;
    pthread_mutex_unlock(&lock);
    return one ? SUCCESS : OUT_OF_MEMORY;
}

/* Whether a living process has this process's allocation open. */
static bool is_open_elsewhere(uint64_t number) {
    char prefix[64];
    bool open = false;
    int length = snprintf(prefix, sizeof prefix, "import-%d-%lu-", getpid(), (unsigned long)number);
    DIR *directory = opendir(state());
    if (!directory) return false;
    for (struct dirent *entry; (entry = readdir(directory));)
        if (!strncmp(entry->d_name, prefix, (size_t)length) && !kill(atoi(entry->d_name + length), 0)) open = true;
    closedir(directory);
    return open;
}

API int cuMemFree_v2(uint64_t address) {
    char path[512];
    int code = SUCCESS;
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (!one || one->base != address || one->is_import) {
        code = violation(INVALID_VALUE, "%#lx is no allocation that can be freed", (unsigned long)address);
    } else if (is_open_elsewhere(one->number)) {
        code = violation(INVALID_VALUE, "%#lx is freed while another process has it open", (unsigned long)address);
    } else {
        memory_path(path, sizeof path, getpid(), one->number);
        unlink(path);
        detach(one);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

API int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t address) {
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (one) { *base = one->base; *size = one->size; }
    pthread_mutex_unlock(&lock);
    return one ? SUCCESS : INVALID_VALUE;
}

API int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (one) *(int *)value = !one->is_mapped_kind && !one->is_import;
    pthread_mutex_unlock(&lock);
    return one && attribute == 10 ? SUCCESS : INVALID_VALUE;
}

/* ---- sharing */

API int cuIpcGetMemHandle(Handle *out, uint64_t address) {
    int code = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (one && !one->is_import && !one->is_mapped_kind) {
        struct handle handle = {HANDLE_MAGIC, one->number, one->size, getpid(), visible[one->device]};
        memset(out, 0, sizeof *out);
        memcpy(out, &handle, sizeof handle);
        code = SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

API int cuIpcOpenMemHandle_v2(uint64_t *address, Handle in, unsigned flags) {
    char path[512];
    struct handle handle;
    int device = current();
    memcpy(&handle, &in, sizeof handle);
    if (device < 0) return INVALID_CONTEXT;
    if (flags != 1 || handle.magic != HANDLE_MAGIC) return INVALID_VALUE;
    if (fault("open-refused") >= 0) return MAP_FAILED_;
    if (kill(handle.pid, 0)) return INVALID_HANDLE;  /* a handle ends with its exporter */
    if (handle.pid == getpid()) return violation(INVALID_CONTEXT, "a process opens its own memory");
    if (visible[device] != handle.device)
        return violation(INVALID_CONTEXT, "memory of card %d is opened on card %d", handle.device, visible[device]);
    pthread_mutex_lock(&lock);
    import_path(path, sizeof path, &handle);
    if (!access(path, F_OK)) {  /* the driver would count; the broker does that itself */
        pthread_mutex_unlock(&lock);
        return violation(INVALID_VALUE, "a handle is opened a second time");
    }
    char memory[512];
    memory_path(memory, sizeof memory, handle.pid, handle.number);
    struct allocation *one = attach(memory, handle.size, 0);
    if (one) {
        int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        if (fd >= 0) close(fd);
        one->is_import = true;
        one->device = device;
        one->number = handle.number;
        one->exporter = handle.pid;
        *address = one->base;
    }
    pthread_mutex_unlock(&lock);
    return one ? SUCCESS : INVALID_HANDLE;
}

API int cuIpcCloseMemHandle(uint64_t address) {
    char path[512];
    int code = SUCCESS;
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (!one || one->base != address || !one->is_import) {
        code = violation(INVALID_VALUE, "%#lx is not open", (unsigned long)address);
    } else if (one->device != current()) {
        code = violation(INVALID_CONTEXT, "memory of device %d is closed on device %d", one->device, current());
    } else {
        struct handle handle = {.pid = one->exporter, .number = one->number};
        import_path(path, sizeof path, &handle);
        unlink(path);
        detach(one);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* ---- copies: what is in a stream happens when somebody waits for it, and not before */

static char *inside(uint64_t address, uint64_t size) {
    struct allocation *one = find(address);
    return one && address + size <= one->base + one->size ? one->memory + (address - one->base) : NULL;
}

static void wait_for(double seconds) {
    struct timespec time = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&time, NULL);
}

static int run(struct stream *stream) {
    int code = SUCCESS;
    double rate = fault("slow-copy");
    while (stream->first && fault("copy-hangs") >= 0) wait_for(0.05);
    for (struct operation *one; (one = stream->first);) {
        stream->first = one->next;
        if (rate > 0) wait_for((double)one->size / rate);
        if (fault("copy-fails") >= 0) code = ILLEGAL_ADDRESS;
        pthread_mutex_lock(&lock);
        char *destination = inside(one->destination, one->size), *source = inside(one->source, one->size);
        if (!destination || !source)
            code = violation(ILLEGAL_ADDRESS, "a copy of %lu bytes from %#lx to %#lx is not within memory",
                             (unsigned long)one->size, (unsigned long)one->source, (unsigned long)one->destination);
        else if (code == SUCCESS)
            memcpy(destination, source, one->size);
        pthread_mutex_unlock(&lock);
        free(one);
    }
    stream->last = &stream->first;
    return code;
}

API int cuMemcpyAsync(uint64_t destination, uint64_t source, size_t size, struct stream *stream) {
    struct operation *one = calloc(1, sizeof *one);
    if (!stream) stream = &default_stream;
    if (current() < 0) { free(one); return INVALID_CONTEXT; }
    if (stream->context && stream->context != stack[depth - 1]) {
        free(one);
        return violation(INVALID_HANDLE, "a stream is used in another context");
    }
    *one = (struct operation){destination, source, size, NULL};
    *stream->last = one;
    stream->last = &one->next;
    return SUCCESS;
}

API int cuStreamCreate(struct stream **out, unsigned flags) {
    if (current() < 0 || flags > 1) return INVALID_CONTEXT;
    *out = calloc(1, sizeof **out);
    (*out)->context = stack[depth - 1];
    (*out)->last = &(*out)->first;
    return SUCCESS;
}

API int cuStreamSynchronize(struct stream *stream) { return run(stream ? stream : &default_stream); }

API int cuStreamDestroy_v2(struct stream *stream) {
    int code = stream->first ? violation(INVALID_HANDLE, "a stream is destroyed with work in it") : SUCCESS;
    free(stream);
    return code;
}

API int cuCtxSynchronize(void) { return current() < 0 ? INVALID_CONTEXT : run(&default_stream); }

static int copy_host(void *host, uint64_t address, size_t size, bool to_host) {
    int code = current() < 0 ? INVALID_CONTEXT : run(&default_stream);
    if (code) return code;
    pthread_mutex_lock(&lock);
    char *memory = inside(address, size);
    if (memory) memcpy(to_host ? host : memory, to_host ? memory : host, size);
    pthread_mutex_unlock(&lock);
    return memory ? SUCCESS : violation(INVALID_VALUE, "%lu bytes at %#lx are not memory", (unsigned long)size, (unsigned long)address);
}

API int cuMemcpyDtoH_v2(void *host, uint64_t source, size_t size) { return copy_host(host, source, size, true); }
API int cuMemcpyHtoD_v2(uint64_t destination, const void *host, size_t size) {
    return copy_host((void *)host, destination, size, false);
}
