/* Virtual memory management: physical chunks, reserved addresses, and shareable handles (one per chunk). */
#include "double.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct physical {
    void *handle;
    uint32_t slot;
    int descriptor, card;
    uint64_t bytes;
    int references;   /* by aclrtMallocPhysical, aclrtMemImportFrom…, aclrtMemRetainAllocationHandle */
    int mappings;
    bool imported;
};
struct location { uint32_t id, type; };
struct physical_properties { uint32_t handle_type, allocation_type, memory_attribute; struct location location; uint64_t reserved; };
_Static_assert(sizeof(struct physical_properties) == 32, "aclrtPhysicalMemProp");
enum { LOCATION_DEVICE = 1 };

static struct physical *imported[SEGMENTS];   /* by slot: the chunks that this process has imported */

static void *give_handle(struct physical *physical)
{
    if (!physical->references++) physical->handle = handle_create(HANDLE_PHYSICAL, physical);
    count(COUNT_PHYSICAL_HANDLES, 1);
    return physical->handle;
}

static void *new_physical(uint32_t slot, int descriptor, int card, uint64_t bytes, bool imported)
{
    struct physical *physical = malloc(sizeof *physical);
    *physical = (struct physical){ .slot = slot, .descriptor = descriptor, .card = card, .bytes = bytes, .imported = imported };
    return give_handle(physical);
}

/* With the memory locked. The memory lives as long as a handle or a mapping of any process. */
static void release_if_unused(struct physical *physical)
{
    if (physical->references || physical->mappings) return;
    board_lock();
    struct segment *segment = segment_at(physical->slot);
    /* Others can import it for as long as anybody holds it. [drv 9.0.0 svm_master_mem_share.c:1134-1215] */
    if (!physical->imported && segment->exported) count(COUNT_EXPORTS, -1);
    segment_release(segment, getpid());
    board_unlock();
    if (!physical->imported) count(COUNT_ALLOCATED_BYTES, -(int64_t)physical->bytes);
    if (physical->imported) {
        imported[physical->slot] = NULL;
        count(COUNT_IMPORTS, -1);
    }
    close(physical->descriptor);
    free(physical);
}

API int aclrtMemGetAllocationGranularity(struct physical_properties *properties, int32_t option, size_t *granularity)
{
    (void)option;
    if (!properties || !granularity) return refuse(ACL_ERROR_RT_PARAM_INVALID, "no properties");
    *granularity = HUGE_PAGE_BYTES;
    return ACL_SUCCESS;
}

/* HBM and plain memory, of 2 MiB, 4 KiB or 1 GiB pages; neither 0, which is DDR, nor 1.
 * [rt 9.0.0 aclrt_impl/memory.cpp memAttrHandlers] */
static bool is_device_memory(uint32_t attribute)
{
    return attribute == 4 || attribute == 5 || attribute == 10 || (attribute >= 12 && attribute <= 14);
}

API int aclrtMallocPhysical(void **handle, size_t bytes, const struct physical_properties *properties, uint64_t flags)
{
    int code = use_runtime("aclrtMallocPhysical");
    if (code) return code;
    int card = properties && properties->location.type == LOCATION_DEVICE ? card_of_device((int)properties->location.id) : -1;
    if (!bytes || flags || !is_device_memory(properties->memory_attribute))
        return refuse(ACL_ERROR_INVALID_PARAM, "aclrtMallocPhysical: %zu bytes, flags %lu, memory attribute %u", bytes, flags,
                      properties ? properties->memory_attribute : 0);
    if (card < 0 || !bytes || bytes % HUGE_PAGE_BYTES)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMallocPhysical: %zu bytes (a multiple of 2 MiB?) on card %d", bytes, card);
    if ((code = memory_available(card, bytes))) return code;
    int descriptor = card_memory(bytes);
    if (descriptor < 0) return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no memory: %s", strerror(errno));
    uint32_t slot;
    memory_lock();
    board_lock();
    code = segment_create(card, bytes, descriptor, true, &slot);
    board_unlock();
    if (code)
        close(descriptor);
    else {
        *handle = new_physical(slot, descriptor, card, bytes, false);
        count(COUNT_ALLOCATED_BYTES, (int64_t)bytes);
    }
    memory_unlock();
    return code;
}

API int aclrtFreePhysical(void *handle)
{
    int code = attach_process();
    if (code) return code;
    memory_lock();
    struct physical *physical = handle_object(HANDLE_PHYSICAL, handle);
    if (physical) {
        count(COUNT_PHYSICAL_HANDLES, -1);
        if (!--physical->references) handle_destroy(HANDLE_PHYSICAL, handle);
        release_if_unused(physical);
    }
    memory_unlock();
    return physical ? ACL_SUCCESS : ACL_ERROR_RT_INVALID_HANDLE;
}

API int aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *expected, uint64_t flags)
{
    (void)flags;   /* 1: huge pages */
    int card, code = enter(&card);
    if (code) return code;
    if (!bytes || bytes % HUGE_PAGE_BYTES || alignment || expected)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtReserveMemAddress: %zu bytes, alignment %zu, at %p", bytes, alignment,
                      expected);
    memory_lock();
    struct range *range = range_create(RANGE_RESERVATION, bytes, HUGE_PAGE_BYTES, card);
    if (range) {
        *address = range->base;
        count(COUNT_RESERVATIONS, 1);
    }
    memory_unlock();
    return range ? ACL_SUCCESS : refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses left for %zu bytes", bytes);
}

static int release_reservation(struct range *range, const void *address)
{
    if (!range || range->kind != RANGE_RESERVATION || range->base != address)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: %p is not the start of a reservation", address);
    if (range->pieces) {
        violation(0, "aclrtReleaseMemAddress: memory is still mapped at %p", address);
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    range_destroy(range);
    count(COUNT_RESERVATIONS, -1);
    return ACL_SUCCESS;
}

API int aclrtReleaseMemAddress(void *address)
{
    int code = attach_process();
    if (code) return code;
    memory_lock();
    code = release_reservation(range_at(address), address);
    memory_unlock();
    return code;
}

static int map_memory(char *address, size_t bytes, struct physical *physical)
{
    struct range *range = range_at(address);
    if (!range || range->kind != RANGE_RESERVATION || address + bytes > range->base + range->bytes)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: %p is not in a reservation of enough bytes", (void *)address);
    uint64_t offset = (uint64_t)(address - range->base);
    if (offset % HUGE_PAGE_BYTES || bytes != physical->bytes)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: %zu bytes at %p of a chunk of %lu bytes", bytes, (void *)address,
                      physical->bytes);
    for (uint64_t at = 0; at < bytes; at += HUGE_PAGE_BYTES)
        if (piece_at(range, offset + at))
            return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: there is memory at %p already", (void *)(address + at));
    if (range->card != physical->card)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: memory of card %d at addresses of card %d", physical->card,
                      range->card);
    int code = range_map(range, offset, bytes, physical->descriptor, physical->slot, physical);
    if (!code) {
        physical->mappings++;
        count(COUNT_MAPPINGS, 1);
    }
    return code;
}

API int aclrtMapMem(void *address, size_t bytes, size_t offset, void *handle, uint64_t flags)
{
    int code = use_runtime("aclrtMapMem");
    if (code) return code;
    if (offset || flags) return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: offset %zu, flags %lu", offset, flags);
    memory_lock();
    struct physical *physical = handle_object(HANDLE_PHYSICAL, handle);
    code = physical ? map_memory(address, bytes, physical) : ACL_ERROR_RT_INVALID_HANDLE;
    memory_unlock();
    return code;
}

/* The mapped chunk that begins at the address, or NULL. */
static struct piece *chunk_at(char *address, struct range **range)
{
    *range = range_at(address);
    bool reserved = *range && (*range)->kind == RANGE_RESERVATION;
    struct piece *piece = reserved ? piece_at(*range, (uint64_t)(address - (*range)->base)) : NULL;
    return piece && (*range)->base + piece->offset == address ? piece : NULL;
}

API int aclrtUnmapMem(void *address)
{
    int code = attach_process();
    if (code) return code;
    struct range *range;
    memory_lock();
    struct piece *piece = chunk_at(address, &range);
    if (!piece)
        code = violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: no mapped memory begins at %p", address);
    else if (__atomic_load_n(&range->busy, __ATOMIC_ACQUIRE)) {
        violation(0, "aclrtUnmapMem: %p is in use by %d tasks on streams", address, range->busy);
        code = ACL_ERROR_RT_PARAM_INVALID;
    } else {
        struct physical *physical = piece->handle;
        range_unmap(range, piece);
        physical->mappings--;
        count(COUNT_MAPPINGS, -1);
        release_if_unused(physical);
    }
    memory_unlock();
    return code;
}

#if CANN_RELEASE >= 850
API int aclrtMemRetainAllocationHandle(void *address, void **handle)
{
    int code = use_runtime("aclrtMemRetainAllocationHandle");
    if (code) return code;
    struct range *range;
    memory_lock();
    struct piece *piece = chunk_at(address, &range);
    if (piece)
        *handle = give_handle(piece->handle);
    else
        code = refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemRetainAllocationHandle: no mapped memory begins at %p", address);
    memory_unlock();
    return code;
}
#endif

API int aclrtMemSetAccess(void *address, size_t bytes, void *descriptors, size_t descriptor_count)
{
    (void)bytes;
    (void)descriptors;
    (void)descriptor_count;
    return was_device_memory(address) ? ACL_SUCCESS : refuse(ACL_ERROR_RT_PARAM_INVALID, "%p is not device memory", address);
}

/* ---- shareable handles: the chunk's number on its card, and the card's logical number in the *exporter's* container, which
 * the importer's driver looks up in the importer's. [drv 9.0.0 devmm_svm.c:5816-5960 devmm_get_share_devid] ---- */
static uint64_t shareable_of(const struct segment *segment)
{
    return segment->share_number | (uint64_t)(uint8_t)logical_of_card(segment->card) << 32;
}

static struct segment *segment_of(uint64_t shareable)
{
    return segment_shared_as(card_of_logical((int)(shareable >> 32 & 0xff)), (uint32_t)shareable);
}

static int export_chunk(struct physical *physical, uint64_t flags, uint64_t *shareable)
{
    struct segment *segment = segment_at(physical->slot);
    if (physical->imported) return refuse(ACL_ERROR_RT_PARAM_INVALID, "memory that was imported cannot be exported");
    if (segment->exported)   /* [drv 9.0.0 svm_master_mem_share.c] */
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "Current proc export or import repeatedly: this memory has a shareable handle already");
    segment_share(segment);
    segment->any_pid = flags & 1;
    *shareable = shareable_of(segment);
    count(COUNT_EXPORTS, 1);
    return ACL_SUCCESS;
}

API int aclrtMemExportToShareableHandle(void *handle, int32_t type, uint64_t flags, uint64_t *shareable)
{
    int code = use_runtime("aclrtMemExportToShareableHandle");
    if (code) return code;
    if (type || flags > 1) return refuse(ACL_ERROR_RT_PARAM_INVALID, "handle type %d, flags %lu", type, flags);
    if (fault_strikes(FAULT_EXPORT_REFUSED, current_card()))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the driver does not export this memory");
    memory_lock();
    struct physical *physical = handle_object(HANDLE_PHYSICAL, handle);
    board_lock();
    code = physical ? export_chunk(physical, flags, shareable) : ACL_ERROR_RT_INVALID_HANDLE;
    board_unlock();
    memory_unlock();
    return code;
}

API int aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t *pids, size_t number)
{
    int code = use_runtime("aclrtMemSetPidToShareableHandle");
    if (code) return code;
    board_lock();
    struct segment *segment = segment_of(shareable);
    if (!segment || segment->owner != getpid())
        code = refuse(ACL_ERROR_RT_PARAM_INVALID, "not a shareable handle of this process");
    else if (segment->any_pid)   /* [drv 9.0.0 svm_master_mem_share.c:148] */
        code = refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "Had set no need wlist, operation not permitted");
    else
        code = whitelist_add(segment->whitelist, pids, number);
    board_unlock();
    return code;
}

/* A second import gives the same handle, counted. [drv 9.0.0 devmm_svm.c devmm_record_get; the kernel itself refuses it] */
static int import_chunk(struct segment *segment, int card, void **handle)
{
    if (!segment) return refuse(ACL_ERROR_RT_PARAM_INVALID, "Share handle doesn't exist: no memory has this shareable handle (any more)");
    int code = may_import(segment->whitelist, segment->any_pid, segment->owner, segment->card, card, true);
    if (code) return code;
    struct physical *again = imported[segment_slot(segment)];
    if (again && release_is_below(850))
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "Can not import multi times: this process has imported this memory already");
    if (again) {
        *handle = give_handle(again);
        return ACL_SUCCESS;
    }
    int descriptor = open_segment_memory(segment);
    if (descriptor < 0) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the memory is gone: %s", strerror(errno));
    if (!segment_hold(segment, getpid(), descriptor)) {
        close(descriptor);
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "more than %d processes hold this memory", HOLDERS);
    }
    *handle = new_physical(segment_slot(segment), descriptor, card, segment->bytes, true);
    imported[segment_slot(segment)] = handle_object(HANDLE_PHYSICAL, *handle);
    count(COUNT_IMPORTS, 1);
    return ACL_SUCCESS;
}

API int aclrtMemImportFromShareableHandle(uint64_t shareable, int32_t device, void **handle)
{
    int code = enter(NULL);   /* [rt 9.0.0 api_impl.cc ImportFromShareableHandle: CheckCurCtxValid] */
    if (code) return code;
    memory_lock();
    board_lock();
    code = import_chunk(segment_of(shareable), card_of_device(device), handle);
    board_unlock();
    memory_unlock();
    return code;
}
