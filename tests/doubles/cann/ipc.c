/* Sharing plain allocations by export keys. */
#include "double.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23   /* Linux 5.14 */
#endif

enum { PIDS_IN_A_CALL = 31 };

/* Any part that begins with a page, as often as wanted. [drv 9.0.0 svm_shmem_interprocess.c devmm_ipc_mem_create_para_check] */
static int check_part(const struct range *range, const void *address, uint64_t bytes)
{
    uint64_t offset = (uint64_t)((const char *)address - range->base);
    if (range->kind == RANGE_ALLOCATION && (!bytes || offset % range->page || offset + bytes > range->bytes))
        return refuse(ACL_ERROR_RT_PARAM_INVALID,
                      "export: %lu bytes at %p: not a part, from a page of %lu bytes on, of the allocation of %lu bytes at %p",
                      bytes, address, range->page, range->requested, (void *)range->base);
    return ACL_SUCCESS;
}

static int export_range(struct range *range, void *address, uint64_t bytes, char *name, uint64_t flags)
{
    if (!range) return violation(ACL_ERROR_RT_PARAM_INVALID, "export: %p is not device memory (any more)", address);
    uint64_t offset = (uint64_t)((char *)address - range->base);
    struct piece *piece = piece_at(range, offset);
    if (range->kind == RANGE_IMPORT || !piece)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "export: %p is imported or not mapped", address);
    struct segment *segment = segment_at(piece->slot);
    int code = check_part(range, address, bytes);
    if (!code && segment->exported)
        code = refuse(ACL_ERROR_RT_PARAM_INVALID, "export: the chunk at %p is shared by a handle already", address);
    if (!code) code = hazard_check_read("export", address, bytes);
    if (code) return code;
    struct key *key = key_create(segment, offset - piece->offset, bytes, flags & 1);
    if (!key) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the board has no more than %d keys", KEYS);
    key_name(key, name);
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

static int admit(struct key *key, const int32_t *pids, size_t number)
{
    if (!key || key->owner != getpid()) return refuse(ACL_ERROR_RT_PARAM_INVALID, "not an export key of this process");
    if (number > PIDS_IN_A_CALL)
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "%zu processes: a call takes %d at most", number, PIDS_IN_A_CALL);
    if (key->any_pid)   /* [drv 9.0.0 svm_shmem_node.c:1076] */
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "Had set no need wlist, operation not permitted");
    return whitelist_add(key->whitelist, pids, number);
}

API int aclrtIpcMemSetImportPid(const char *name, int32_t *pids, size_t number)
{
    int code = enter(NULL);
    if (code) return code;
    board_lock();
    code = admit(key_named(name), pids, number);
    board_unlock();
    return code;
}

/* One more import in this process: the same address, counted. [drv 9.0.0 devmm_svm.c devmm_record_get] */
static int import_again(struct range *range, void **address)
{
    if (release_is_below(850)) return refuse(ACL_ERROR_RT_PARAM_INVALID, "this process has imported this memory already");
    range->opened++;
    range->forgotten = false;
    *address = range->base;
    return ACL_SUCCESS;
}

static int map_part(struct range *range, struct key *key, int descriptor)
{
    int code = range_map(range, 0, range->bytes, descriptor, key->slot, NULL);
    if (!code && key->offset &&
        mmap(range->alias, range->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor, (off_t)key->offset) == MAP_FAILED)
        code = refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host cannot map it: %s", strerror(errno));
    if (!code && !holders_add(key->importers, getpid(), -1))
        code = refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "more than %d processes have this memory", HOLDERS);
    return code;
}

static int import_fresh(struct key *key, int card, void **address)
{
    struct segment *segment = segment_at(key->slot);
    if (segment->is_chunk)   /* seen on hardware: such memory gets a key, but nobody can import it */
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the key is of VMM memory: that is shared by shareable handles");
    int descriptor = open_segment_memory(segment);
    if (descriptor < 0) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the exporter's memory is gone: %s", strerror(errno));
    struct range *range = range_create(RANGE_IMPORT, round_up(key->bytes, PAGE_BYTES), HUGE_PAGE_BYTES, card);
    int code = range ? map_part(range, key, descriptor) : ACL_ERROR_RT_MEMORY_ALLOCATION;
    if (code) {
        if (range) range_destroy(range);
        close(descriptor);
        return code;
    }
    range->pieces->file_offset = key->offset;
    range->key = key->serial;
    range->exporter = key->owner;
    range->exporter_end = process_end(key->owner);
    range->opened = 1;
    madvise(range->alias, range->bytes, MADV_POPULATE_WRITE);   /* all at once, as a driver does; only faster than later */
    *address = range->base;
    count(COUNT_IMPORTS, 1);
    return ACL_SUCCESS;
}

static int import_key(struct key *key, int card, bool peer_flag, void **address)
{
    if (!key) return refuse(ACL_ERROR_RT_PARAM_INVALID, "no memory has this key (any more)");
    int code = may_import(key->whitelist, key->any_pid, key->owner, segment_at(key->slot)->card, card, peer_flag);
    if (code) return code;
    struct range *range = import_of(key->serial);
    return range ? import_again(range, address) : import_fresh(key, card, address);
}

API int aclrtIpcMemImportByKey(void **address, const char *name, uint64_t flags)
{
    int card, code = enter(&card);
    if (code) return code;
    if (!name || flags > 1) return refuse(ACL_ERROR_RT_PARAM_INVALID, "no key, or flags %lu", flags);
    memory_lock();
    board_lock();
    code = import_key(key_named(name), card, flags & 1, address);
    board_unlock();
    memory_unlock();
    return code;
}

/* Never refused: the driver takes the memory from whoever has it open. [drv 9.0.0 svm_shmem_node.c
 * _devmm_ipc_node_free_open_pages] */
static int close_export(struct key *key)
{
    key_close(key);
    count(COUNT_EXPORTS, -1);
    return ACL_SUCCESS;
}

/* The runtime forgets the name with the first close, however often it was opened; then the driver takes a close for the
 * exporter's and refuses it. [rt 9.0.0 api_impl.cc IpcCloseMemoryByName; hardware-truth B4] */
static int close_import(const char *name)
{
    unsigned long serial = 0;
    if (strnlen(name, KEY_BYTES) == 36) sscanf(name + 8, "%16lx", &serial);
    struct range *range = serial ? import_of(serial) : NULL;
    if (!range) return violation(ACL_ERROR_RT_PARAM_INVALID, "aclrtIpcMemClose: this process has nothing open under this key");
    if (range->forgotten) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "No permission to destroy");
    if (__atomic_load_n(&range->busy, __ATOMIC_ACQUIRE)) {
        violation(0, "aclrtIpcMemClose: %p is in use by %d tasks on streams", (void *)range->base, range->busy);
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    range->forgotten = true;
    if (--range->opened) return ACL_SUCCESS;
    struct key *key = key_with_serial(serial);
    if (key) holders_remove(key->importers, getpid());
    close(range->pieces->descriptor);
    range_destroy(range);
    count(COUNT_IMPORTS, -1);
    return ACL_SUCCESS;
}

API int aclrtIpcMemClose(const char *name)
{
    int code = enter(NULL);   /* [rt 9.0.0 api_impl.cc IpcCloseMemoryByName: a context is needed] */
    if (code) return code;
    if (!name) return refuse(ACL_ERROR_RT_PARAM_INVALID, "no key");
    memory_lock();
    board_lock();
    struct key *key = key_named(name);
    code = key && key->owner == getpid() ? close_export(key) : close_import(name);
    board_unlock();
    memory_unlock();
    return code;
}
