/* Memory. Allocations below 2 MiB share a block, as cudaMalloc's do: CUDA C++ programming guide, "Interprocess
 * communication" (a handle may expose other allocations of the same block). */
#include "double.h"
#include <dirent.h>
#include <signal.h>

#define ALIGNMENT 512ull

struct allocation allocations[ALLOCATIONS];
static struct { uint64_t number, base, used; char *memory; int device, live; } block;
static uint64_t blocks;

struct allocation *find(uint64_t address) {
    for (int index = 0; index < ALLOCATIONS; index++) {
        struct allocation *one = &allocations[index];
        if (one->base && address >= one->base && address < one->base + one->size) return one;
    }
    return NULL;
}

static struct allocation *unused(void) {
    for (int index = 0; index < ALLOCATIONS; index++)
        if (!allocations[index].base) return &allocations[index];
    return NULL;
}

/* The file of a block. What a process sees of it is an address without access; the double reads and writes elsewhere. */
struct allocation *attach(int pid, uint64_t number, uint64_t size, bool is_fresh) {
    char path[512];
    struct allocation *one = unused();
    path_of(path, sizeof path, "memory-%d-%lu", pid, (unsigned long)number);
    int fd = one ? open(path, (is_fresh ? O_CREAT | O_EXCL : 0) | O_RDWR | O_CLOEXEC, 0666) : -1;
    if (fd < 0) return NULL;
    if (is_fresh && (fchmod(fd, 0666) || ftruncate(fd, (off_t)size))) { close(fd); return NULL; }
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    void *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    close(fd);
    *one = (struct allocation){.base = (uint64_t)base, .memory = memory, .size = size, .block = number};
    return one;
}

/* The addresses stay reserved, so that a stale one is recognised for ever. */
void detach(struct allocation *one) {
    munmap(one->memory, one->size);
    memset(one, 0, sizeof *one);
}

static struct allocation *within_block(uint64_t size, int device) {
    if (!block.live || block.device != device || block.used + size > BLOCK_BYTES) {
        struct allocation *whole = attach(getpid(), ++blocks, BLOCK_BYTES, true);
        if (!whole) return NULL;
        block.number = blocks, block.base = whole->base, block.memory = whole->memory, block.device = device;
        block.used = block.live = 0;
        memset(whole, 0, sizeof *whole);
    }
    struct allocation *one = unused();
    if (!one) return NULL;
    *one = (struct allocation){.base = block.base + block.used, .memory = block.memory + block.used, .size = size,
                               .block = block.number, .offset = block.used};
    block.used = (block.used + size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    block.live++;
    return one;
}

API int cuMemAlloc_v2(uint64_t *address, size_t size) {
    int device = current();
    if (device < 0) return INVALID_CONTEXT;
    if (!size) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    struct allocation *one =
        size < BLOCK_BYTES ? within_block(size, device) : attach(getpid(), ++blocks, size, true);
    if (one) { one->device = device; one->is_mapped_kind = fault("mapped-memory") >= 0; }
    *address = one ? one->base : 0;
    pthread_mutex_unlock(&lock);
    return one ? SUCCESS : OUT_OF_MEMORY;
}

/* Whether a living process has the block open. */
static bool is_open_elsewhere(uint64_t number) {
    char prefix[64], path[512];
    bool open = false;
    int length = snprintf(prefix, sizeof prefix, "import-%d-%lu-", getpid(), (unsigned long)number);
    path_of(path, sizeof path, "%s", "");
    DIR *directory = opendir(path);
    if (!directory) return false;
    for (struct dirent *entry; (entry = readdir(directory));)
        if (!strncmp(entry->d_name, prefix, (size_t)length) && !kill(atoi(entry->d_name + length), 0)) open = true;
    closedir(directory);
    return open;
}

static void forget(struct allocation *one) {
    char path[512];
    path_of(path, sizeof path, "memory-%d-%lu", getpid(), (unsigned long)one->block);
    if (one->size >= BLOCK_BYTES) {
        unlink(path);
        detach(one);
        return;
    }
    if (one->block == block.number) block.live--;  /* a block's file stays: others may lie in it */
    memset(one, 0, sizeof *one);
}

API int cuMemFree_v2(uint64_t address) {
    int code = SUCCESS;
    pthread_mutex_lock(&lock);
    struct allocation *one = find(address);
    if (!one || one->base != address || one->is_import)
        code = violation(INVALID_VALUE, "%#lx is no allocation that can be freed", (unsigned long)address);
    else if (is_open_elsewhere(one->block))
        code = violation(INVALID_VALUE, "%#lx is freed while another process has it open", (unsigned long)address);
    else
        forget(one);
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
    return one && attribute == 10 ? SUCCESS : INVALID_VALUE;  /* IS_LEGACY_CUDA_IPC_CAPABLE */
}
