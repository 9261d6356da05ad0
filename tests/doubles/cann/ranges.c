/* The device addresses of this process; double.h says how they work. All of them lie in one arena, which is never used
 * twice: an address that was freed is known to have been device memory for as long as the process lives. */
#include "double.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25   /* Linux 6.1 */
#endif

static const uint64_t arena_bytes = 16ULL << 40;
static char *arena, *arena_next;
static struct range **ranges;   /* by address */
static size_t number, capacity;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void memory_lock(void) { pthread_mutex_lock(&lock); }
void memory_unlock(void) { pthread_mutex_unlock(&lock); }

bool was_device_memory(const void *address)
{
    return arena && (const char *)address >= arena && (const char *)address < arena + arena_bytes;
}

/* Aligned so that the host's large pages fit, where they can. */
static char *reserve_alias(uint64_t bytes)
{
    uint64_t spare = bytes < HUGE_PAGE_BYTES ? 0 : HUGE_PAGE_BYTES;
    char *reserved = mmap(NULL, bytes + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return NULL;
    char *alias = spare ? (char *)round_up((uint64_t)reserved, HUGE_PAGE_BYTES) : reserved;
    if (alias > reserved) munmap(reserved, (size_t)(alias - reserved));
    if (alias < reserved + spare) munmap(alias + bytes, (size_t)(reserved + spare - alias));
    return alias;
}

struct range *range_create(enum range_kind kind, uint64_t bytes, uint64_t alignment, int card)
{
    if (!arena) {
        void *reserved = mmap(NULL, arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) return NULL;
        arena = arena_next = reserved;
    }
    struct range *range = calloc(1, sizeof *range);
    *range = (struct range){ .kind = kind, .bytes = bytes, .requested = bytes, .card = card, .exporter_end = -1 };
    range->base = (char *)round_up((uint64_t)arena_next, alignment);
    range->alias = reserve_alias(bytes);
    if (!range->alias || range->base + bytes + PAGE_BYTES > arena + arena_bytes) {
        free(range);
        return NULL;
    }
    arena_next = range->base + bytes + PAGE_BYTES;   /* nothing follows directly */
    if (number == capacity) ranges = realloc(ranges, (capacity = capacity ? 2 * capacity : 64) * sizeof *ranges);
    ranges[number++] = range;   /* addresses only grow, so the order holds */
    return range;
}

int range_map(struct range *range, uint64_t offset, uint64_t bytes, int descriptor, uint32_t slot, void *handle)
{
    if (mmap(range->alias + offset, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED)
        return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host cannot map it: %s", strerror(errno));
    struct piece *piece = malloc(sizeof *piece), **place = &range->pieces;
    while (*place && (*place)->offset < offset) place = &(*place)->next;
    *piece = (struct piece){ offset, bytes, 0, slot, descriptor, handle, *place };
    *place = piece;
    return ACL_SUCCESS;
}

void large_pages(const struct place *place, uint64_t bytes)
{
    uint64_t from = round_up((uint64_t)place->alias, HUGE_PAGE_BYTES), to = (uint64_t)(place->alias + bytes) & ~(HUGE_PAGE_BYTES - 1ULL);
    if (place->on_device && from < to) madvise((void *)from, to - from, MADV_COLLAPSE);
}

void range_unmap(struct range *range, struct piece *piece)
{
    struct piece **place = &range->pieces;
    while (*place != piece) place = &(*place)->next;
    *place = piece->next;
    mmap(range->alias + piece->offset, piece->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    free(piece);
}

void range_destroy(struct range *range)
{
    while (range->pieces) range_unmap(range, range->pieces);
    munmap(range->alias, range->bytes);
    if (range->exporter_end >= 0) close(range->exporter_end);
    size_t index = 0;
    while (ranges[index] != range) index++;
    memmove(&ranges[index], &ranges[index + 1], (--number - index) * sizeof *ranges);
    free(range);
}

struct range *range_at(const void *address)
{
    size_t low = 0, high = number;   /* the last range that begins at or before the address */
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle]->base <= (const char *)address)
            low = middle + 1;
        else
            high = middle;
    }
    struct range *range = low ? ranges[low - 1] : NULL;
    return range && (const char *)address < range->base + range->bytes ? range : NULL;
}

struct range *import_of(uint64_t key_serial)
{
    for (size_t i = 0; i < number; i++)
        if (ranges[i]->kind == RANGE_IMPORT && ranges[i]->key == key_serial) return ranges[i];
    return NULL;
}

bool place_is_dead(const struct place *place)
{
    const struct range *range = place->range;
    if (!place->on_device || range->kind != RANGE_IMPORT) return false;
    if (key_is_closed(range->key)) return true;
    return range->exporter_end < 0 ? !process_is_alive(range->exporter) : has_ended(range->exporter_end);
}

/* Pages that are not there any more: the device faults. A process whose exporter died cannot help it; one that uses
 * memory whose export was ended in order has a bug. */
static int page_fault(const char *what, const void *address, struct range *range)
{
    if (process_is_alive(range->exporter))
        violation(0, "%s: %p is used after its exporter, process %d, ended the export", what, address, range->exporter);
    card_break(range->card);
    return card_lost_code(range->card, what);
}

struct piece *piece_at(struct range *range, uint64_t offset)
{
    for (struct piece *piece = range->pieces; piece; piece = piece->next)
        if (offset >= piece->offset && offset < piece->offset + piece->bytes) return piece;
    return NULL;
}

static int check_mapped(const char *what, struct range *range, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = offset; at < offset + bytes;) {
        struct piece *piece = piece_at(range, at);
        if (!piece)
            return violation(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is reserved, but no memory is mapped there", what,
                             (void *)(range->base + at));
        at = piece->offset + piece->bytes;
    }
    return ACL_SUCCESS;
}

int locate(const char *what, const void *address, uint64_t bytes, int card, struct place *place)
{
    *place = (struct place){ .alias = (char *)address };
    if (!was_device_memory(address)) return ACL_SUCCESS;
    memory_lock();
    struct range *range = range_at(address);
    int code = ACL_SUCCESS;
    /* What follows has no bytes to give, so it fails even where violations are only counted. */
    if (!range)
        code = violation(0, "%s: %p is not device memory (any more)", what, address), code = ACL_ERROR_RT_PARAM_INVALID;
    else if ((uint64_t)((const char *)address - range->base) + bytes > range->bytes)
        code = violation(0, "%s: %lu bytes at %p end %lu bytes behind the allocation", what, bytes, address,
                         (uint64_t)((const char *)address - range->base) + bytes - range->bytes),
        code = ACL_ERROR_RT_PARAM_INVALID;
    else if (card_is_lost(range->card))
        code = card_lost_code(range->card, what);
    else if (place_is_dead(&(struct place){ .range = range, .on_device = true }))
        code = page_fault(what, address, range);
    else if (check_mapped(what, range, (uint64_t)((const char *)address - range->base), bytes))
        code = ACL_ERROR_RT_PARAM_INVALID;
    else if (card >= 0 && range->card != card)
        code = violation(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is on card %d, the work is on card %d", what, address,
                         range->card, card);
    if (!code) {
        uint64_t offset = (uint64_t)((const char *)address - range->base);
        *place = (struct place){ range->alias + offset, range, true, offset };
    }
    memory_unlock();
    return code;
}

void place_hold(const struct place *place)
{
    if (place->on_device) __atomic_fetch_add(&place->range->busy, 1, __ATOMIC_ACQ_REL);
}

void place_release(const struct place *place)
{
    if (place->on_device) __atomic_fetch_sub(&place->range->busy, 1, __ATOMIC_ACQ_REL);
}

/* What a kernel on the card would see at a device address: for tests that compute on "device" memory with host code.
 * NULL where a kernel would fault; checks that no write to it is under way. */
API void *cann_double_kernel_view(void *address, uint64_t bytes)
{
    int card;
    struct place place;
    if (enter(&card) || locate("kernel", address, bytes, card, &place) || !place.on_device) return NULL;
    return hazard_check_write("kernel", address, bytes) ? NULL : place.alias;
}
