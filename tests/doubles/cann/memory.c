/* Plain allocations, on the card and pinned on the host. */
#include "double.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

enum { FIRST_DESCRIPTOR = 8192 };   /* above what select() in other libraries can bear */

int memory_available(int card, uint64_t bytes)
{
    if (fault_strikes(FAULT_OUT_OF_MEMORY, card))
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "card %d is out of memory for %lu bytes", card, bytes);
    board_lock();
    if (card_bytes_used(card) + bytes > card_bytes_total()) release_the_dead();
    uint64_t used = card_bytes_used(card);
    board_unlock();
    if (used + bytes > card_bytes_total())
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "card %d is out of memory: %lu of %lu bytes used, %lu asked for", card,
                      used, card_bytes_total(), bytes);
    return ACL_SUCCESS;
}

/* Memory of the card that other processes can open: its descriptor, or -1. */
int card_memory(uint64_t bytes)
{
    int low = memfd_create("card", MFD_CLOEXEC);
    if (low < 0 || ftruncate(low, (off_t)bytes)) return -1;
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    int high = fcntl(low, F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR);
    if (high < 0) return low;
    close(low);
    return high;
}

API int aclrtMalloc(void **address, size_t bytes, int32_t policy)
{
    int card, code = enter(&card);
    if (code) return code;
    if (!address || !bytes) return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMalloc of %zu bytes", bytes);
    bool huge = policy != 2 /* ACL_MEM_MALLOC_NORMAL_ONLY */ && bytes > HUGE_PAGE_BYTES / 2;
    uint64_t page = huge ? HUGE_PAGE_BYTES : PAGE_BYTES, whole = round_up(bytes, page);
    if ((code = memory_available(card, whole))) return code;
    int descriptor = card_memory(whole);
    if (descriptor < 0) return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no memory: %s", strerror(errno));
    uint32_t slot = 0;
    memory_lock();
    struct range *range = range_create(RANGE_ALLOCATION, whole, page, card);
    board_lock();
    code = range ? segment_create(card, whole, descriptor, false, &slot) : ACL_ERROR_RT_MEMORY_ALLOCATION;
    board_unlock();
    if (!code) code = range_map(range, 0, whole, descriptor, slot, NULL);
    if (code) {
        if (range) range_destroy(range);
        close(descriptor);
    } else {
        range->requested = bytes;
        range->page = page;
        *address = range->base;
        count(COUNT_ALLOCATIONS, 1);
        count(COUNT_ALLOCATED_BYTES, (int64_t)whole);
    }
    memory_unlock();
    return code;
}

API int aclrtMallocAlign32(void **address, size_t bytes, int32_t policy) { return aclrtMalloc(address, bytes, policy); }

static int free_range(struct range *range, const void *address)
{
    if (!range || range->base != address)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p is not the start of a live allocation", address);
    if (range->kind != RANGE_ALLOCATION)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p was not allocated by aclrtMalloc in this process", address);
    if (__atomic_load_n(&range->busy, __ATOMIC_ACQUIRE))
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p is in use by %d tasks on streams", address, range->busy);
    struct piece *piece = range->pieces;
    struct segment *segment = segment_at(piece->slot);
    int importers = segment_importers(segment);
    if (importers)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p is still imported by %d processes", address, importers);
    if (segment->keys)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p has an export key that was not closed", address);
    segment_release(segment, getpid());
    close(piece->descriptor);
    count(COUNT_ALLOCATIONS, -1);
    count(COUNT_ALLOCATED_BYTES, -(int64_t)range->bytes);
    range_destroy(range);
    return ACL_SUCCESS;
}

API int aclrtFree(void *address)
{
    int code = attach_process();
    if (code) return code;
    memory_lock();
    board_lock();
    code = free_range(range_at(address), address);
    board_unlock();
    memory_unlock();
    return code;
}

#if CANN_RELEASE >= 900
API int aclrtMemGetAddressRange(void *address, void **base, size_t *bytes)
{
    int code = enter(NULL);
    if (code) return code;
    memory_lock();
    struct range *range = range_at(address);
    struct piece *piece = range ? piece_at(range, (uint64_t)((char *)address - range->base)) : NULL;
    if (!piece)
        code = refuse(ACL_ERROR_RT_PARAM_INVALID, "%p is not device memory", address);
    else {
        bool chunk = range->kind == RANGE_RESERVATION;
        *base = range->base + piece->offset;
        *bytes = chunk ? piece->bytes : range->requested;
    }
    memory_unlock();
    return code;
}
#endif

/* aclrtPtrAttributes: where an address is (type 0 host, 1 device, 2 neither), and the size of its pages. */
struct pointer_attributes { struct { uint32_t id, type; } location; uint32_t page_bytes, reserved[4]; };

API int aclrtPointerGetAttributes(const void *address, struct pointer_attributes *attributes)
{
    int code = attach_process();
    if (code) return code;
    memory_lock();
    struct range *range = range_at(address);
    *attributes = (struct pointer_attributes){ .location = { 0, 2 }, .page_bytes = PAGE_BYTES };
    if (range) {
        attributes->location.id = (uint32_t)device_of_card(range->card);
        attributes->location.type = 1;
    }
    memory_unlock();
    return ACL_SUCCESS;
}

API int aclrtGetMemInfo(int32_t attribute, size_t *available, size_t *total)
{
    (void)attribute;
    int card, code = enter(&card);
    if (code) return code;
    board_lock();
    release_the_dead();
    uint64_t used = card_bytes_used(card);
    board_unlock();
    *total = card_bytes_total();
    *available = used < *total ? *total - used : 0;
    return ACL_SUCCESS;
}

/* Pinned host memory: the size is kept in a page of its own before what the caller sees. */
API int aclrtMallocHost(void **address, size_t bytes)
{
    int code = enter(NULL);
    if (code) return code;
    char *mapped = mmap(NULL, bytes + PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMallocHost: %s", strerror(errno));
    *(size_t *)mapped = bytes + PAGE_BYTES;
    *address = mapped + PAGE_BYTES;
    count(COUNT_HOST_ALLOCATIONS, 1);
    return ACL_SUCCESS;
}

API int aclrtFreeHost(void *address)
{
    if (!address || (uint64_t)address % PAGE_BYTES)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost: %p is not from aclrtMallocHost", address);
    char *mapped = (char *)address - PAGE_BYTES;
    munmap(mapped, *(size_t *)mapped);
    count(COUNT_HOST_ALLOCATIONS, -1);
    return ACL_SUCCESS;
}

API int aclrtHostRegister(void *address, uint64_t bytes, int32_t type, void **device_address)
{
    (void)bytes;
    (void)type;
    *device_address = address;
    return ACL_SUCCESS;
}
API int aclrtHostUnregister(void *address)
{
    (void)address;
    return ACL_SUCCESS;
}
