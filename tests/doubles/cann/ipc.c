/* Sharing plain allocations: export keys of 65 bytes, and the rules for importing that chunks have too. */
#include "double.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23   /* Linux 5.14 */
#endif

int segment_allow(struct segment *segment, const int32_t *pids, size_t number)
{
    for (size_t i = 0; i < number; i++) {
        int place = 0;
        while (place < HOLDERS && segment->whitelist[place] && segment->whitelist[place] != pids[i]) place++;
        if (place == HOLDERS) return refuse(ACL_ERROR_RT_PARAM_INVALID, "the whitelist has room for %d processes", HOLDERS);
        segment->whitelist[place] = pids[i];
    }
    return ACL_SUCCESS;
}

int segment_may_import(struct segment *segment, int card)
{
    if (fault_strikes(FAULT_IMPORT_REFUSED, card))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the driver refuses this import");
    if (segment->owner == getpid())
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "one process may not export and import the same memory");
    if (segment->card != card)
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "memory of card %d can only be imported there, not on card %d",
                      segment->card, card);
    bool allowed = segment->any_pid, owned = false, held = false;
    for (int i = 0; i < HOLDERS; i++) {
        if (segment->whitelist[i] == bare_tgid()) allowed = true;
        if (segment->holders[i].handles && segment->holders[i].pid == segment->owner) owned = true;
        if (segment->holders[i].handles && segment->holders[i].pid == getpid()) held = true;
    }
    if (!allowed)
        return refuse(ACL_ERROR_RT_NO_PERMISSION, "the bare TGID %d is not on the exporter's whitelist", bare_tgid());
    if (!owned || !process_is_alive(segment->owner))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the exporter %d has given the memory up", segment->owner);
    if (held) return refuse(ACL_ERROR_RT_PARAM_INVALID, "this process has imported this memory already");
    return ACL_SUCCESS;
}

static int export_range(struct range *range, void *address, uint64_t bytes, char *key, uint64_t flags)
{
    if (!range) return violation(ACL_ERROR_RT_PARAM_INVALID, "export: %p is not device memory (any more)", address);
    uint64_t offset = (uint64_t)((char *)address - range->base);
    struct piece *piece = piece_at(range, offset);
    if (range->kind == RANGE_IMPORT || !piece)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "export: %p is imported or not mapped", address);
    struct segment *segment = segment_at(piece->slot);
    bool whole = !offset && (bytes == range->requested || bytes == range->bytes);
    if (range->kind == RANGE_ALLOCATION && (!whole || range->requested % PAGE_BYTES))
        return refuse(ACL_ERROR_RT_PARAM_INVALID,
                      "export: %lu bytes at %p: only a whole allocation of whole pages can be shared, this one has %lu bytes at %p",
                      bytes, address, range->requested, (void *)range->base);
    if (segment->exported) return refuse(ACL_ERROR_RT_PARAM_INVALID, "export: %p has a key already", address);
    int code = hazard_check_read("export", address, range->kind == RANGE_ALLOCATION ? range->bytes : bytes);
    if (code) return code;
    segment->exported = 1;
    segment->any_pid = flags & 1;
    memset(segment->whitelist, 0, sizeof segment->whitelist);
    memcpy(key, segment->key, KEY_BYTES);
    count(COUNT_EXPORTS, 1);
    return ACL_SUCCESS;
}

API int aclrtIpcMemGetExportKey(void *address, size_t bytes, char *key, size_t length, uint64_t flags)
{
    int card, code = enter(&card);
    if (code) return code;
    if (!key || length < KEY_BYTES || flags > 1)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "a key has %d bytes, not %zu; flags %lu", KEY_BYTES, length, flags);
    if (fault_strikes(FAULT_EXPORT_REFUSED, card))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the driver does not export this memory");
    memory_lock();
    board_lock();
    code = export_range(range_at(address), address, bytes, key, flags);
    board_unlock();
    memory_unlock();
    struct place place;
    if (!code && !locate("export", address, bytes, card, &place)) large_pages(&place, bytes);
    return code;
}

API int aclrtIpcMemSetImportPid(const char *key, int32_t *pids, size_t number)
{
    int code = enter(NULL);
    if (code) return code;
    board_lock();
    struct segment *segment = segment_by_key(key);
    code = segment && segment->owner == getpid() ? segment_allow(segment, pids, number)
                                                 : refuse(ACL_ERROR_RT_PARAM_INVALID, "not an export key of this process");
    board_unlock();
    return code;
}

static int import_segment(struct segment *segment, int card, void **address)
{
    int code = segment_may_import(segment, card);
    if (code) return code;
    if (segment->is_chunk)   /* seen on hardware: such memory gets a key, but nobody can import it */
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the key is of VMM memory: that is shared by shareable handles");
    int descriptor = open_segment_memory(segment);
    if (descriptor < 0) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the exporter's memory is gone: %s", strerror(errno));
    struct range *range = range_create(RANGE_IMPORT, segment->bytes, HUGE_PAGE_BYTES, card);
    code = range ? range_map(range, 0, segment->bytes, descriptor, segment_slot(segment), NULL) : ACL_ERROR_RT_MEMORY_ALLOCATION;
    if (!code && !segment_hold(segment, getpid()))
        code = refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "more than %d processes hold this memory", HOLDERS);
    if (code) {
        if (range) range_destroy(range);
        close(descriptor);
        return code;
    }
    madvise(range->alias, segment->bytes, MADV_POPULATE_WRITE);   /* all at once, as a driver does; only faster than later */
    *address = range->base;
    count(COUNT_IMPORTS, 1);
    return ACL_SUCCESS;
}

API int aclrtIpcMemImportByKey(void **address, const char *key, uint64_t flags)
{
    int card, code = enter(&card);
    if (code) return code;
    if (!key || flags > 1) return refuse(ACL_ERROR_RT_PARAM_INVALID, "no key, or flags %lu", flags);
    memory_lock();
    board_lock();
    struct segment *segment = segment_by_key(key);
    code = segment ? import_segment(segment, card, address)
                   : refuse(ACL_ERROR_RT_PARAM_INVALID, "no memory has this key (any more)");
    board_unlock();
    memory_unlock();
    return code;
}

static int close_export(struct segment *segment)
{
    int importers = segment_importers(segment);
    if (importers)
        return violation(ACL_ERROR_RT_PARAM_INVALID,
                         "the exporter closes a key that %d processes have imported: importers close first", importers);
    segment->exported = 0;
    memset(segment->whitelist, 0, sizeof segment->whitelist);
    count(COUNT_EXPORTS, -1);
    return ACL_SUCCESS;
}

static int close_import(const char *key)
{
    struct range *range = import_with_key(key);
    if (!range) return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtIpcMemClose: this process has nothing open under this key");
    if (__atomic_load_n(&range->busy, __ATOMIC_ACQUIRE)) {
        violation(0, "aclrtIpcMemClose: %p is in use by %d tasks on streams", (void *)range->base, range->busy);
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    struct piece *piece = range->pieces;
    segment_release(segment_at(piece->slot), getpid());
    close(piece->descriptor);
    range_destroy(range);
    count(COUNT_IMPORTS, -1);
    return ACL_SUCCESS;
}

API int aclrtIpcMemClose(const char *key)
{
    int code = attach_process();
    if (code) return code;
    if (!key) return refuse(ACL_ERROR_RT_PARAM_INVALID, "no key");
    memory_lock();
    board_lock();
    struct segment *segment = segment_by_key(key);
    code = segment && segment->owner == getpid() ? close_export(segment) : close_import(key);
    board_unlock();
    memory_unlock();
    return code;
}
