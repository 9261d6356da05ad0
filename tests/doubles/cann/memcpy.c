/* Copies: synchronous, in a stream, in batches, and as FFTS+ tasks. */
#include "double.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum kind { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, BY_ADDRESS };

/* The memory may have been taken away while it was copied: the copy faults then. */
static int check_alive(const struct place *to, const struct place *from)
{
    const struct place *dead = place_is_dead(to) ? to : place_is_dead(from) ? from : NULL;
    if (!dead) return ACL_SUCCESS;
    card_break(dead->range->card);
    return card_lost_code(dead->range->card, "copy");
}

/* Whether the memory is of another card than the one that reads it. */
static bool is_a_peers(const struct place *place)
{
    if (!place->on_device) return false;
    memory_lock();
    board_lock();
    struct piece *piece = piece_at(place->range, place->offset);
    bool is_other = piece && segment_at(piece->slot)->card != place->range->card;
    board_unlock();
    memory_unlock();
    return is_other;
}

/* As long as a slow link needs; the memory may be taken away meanwhile. */
static void take_time(const struct place *to, const struct place *from, uint64_t bytes)
{
    if (!is_a_peers(from) || !fault_strikes(FAULT_SLOW_LINK, to->range->card)) return;
    count(COUNT_PENDING_TASKS, 1);
    double until = seconds_now() + (double)bytes / fault_value(FAULT_SLOW_LINK, to->range->card, 1e12);
    while (seconds_now() < until && fault_strikes(FAULT_SLOW_LINK, to->range->card) && !place_is_dead(from))
        nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
    count(COUNT_PENDING_TASKS, -1);
}

int copy_places(const struct place *to, const struct place *from, uint64_t bytes)
{
    if (to->on_device) take_time(to, from, bytes);
    memcpy(to->alias, from->alias, bytes);
    return check_alive(to, from);
}

/* Finds both ends, on the card, and checks what the caller says about them. */
static int prepare(const char *what, struct place *to, void *destination, size_t room, struct place *from, const void *source,
                   size_t bytes, int kind, int card)
{
    if (bytes > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "%s: %zu bytes into %zu", what, bytes, room);
    int code = locate(what, source, bytes, card, from);
    if (!code) code = locate(what, destination, bytes, card, to);
    if (code) return code;
    if (kind != BY_ADDRESS && kind != from->on_device * 2 + to->on_device)
        return violation(ACL_ERROR_RT_PARAM_INVALID, "%s: kind %d, but the copy is %s to %s", what, kind,
                         from->on_device ? "device" : "host", to->on_device ? "device" : "host");
    return ACL_SUCCESS;
}

static const struct segment *segment_behind(const struct place *place)
{
    struct piece *piece = piece_at(place->range, place->offset);
    return piece ? segment_at(piece->slot) : NULL;
}

static bool is_imported_chunk(const struct segment *segment) { return segment->is_chunk && segment->owner != getpid(); }

/* What is copied from device to device without a stream goes through the driver, which copies no imported chunk within
 * its card. [drv 8.5.0 svm_master_memcpy.c:376, 9.0.0:378: EOPNOTSUPP] Between cards a user's fails with 507899, and
 * works in a stream (910A, CANN 9.0); the source copies it as between host and device: the worse is assumed. */
static int may_copy_without_a_stream(const struct place *to, const struct place *from)
{
    if (!to->on_device || !from->on_device) return ACL_SUCCESS;
    memory_lock();
    board_lock();
    const struct segment *one = segment_behind(from), *other = segment_behind(to);
    bool between_cards = one && other && one->card != other->card;
    bool with_chunk = one && other && (is_imported_chunk(one) || is_imported_chunk(other));
    board_unlock();
    memory_unlock();
    if (between_cards) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "a copy between cards needs a stream");
    if (with_chunk) return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "a copy of an imported chunk within its card needs a stream");
    return ACL_SUCCESS;
}

static int copy_now(const char *what, void *destination, size_t room, const void *source, size_t bytes, int kind, int card)
{
    struct place to, from;
    int code = prepare(what, &to, destination, room, &from, source, bytes, kind, card);
    if (!code) code = may_copy_without_a_stream(&to, &from);
    if (!code) code = hazard_check_read(what, source, bytes);
    if (!code) code = hazard_check_write(what, destination, bytes);
    return code ? code : copy_places(&to, &from, bytes);
}

API int aclrtMemcpy(void *destination, size_t room, const void *source, size_t bytes, int32_t kind)
{
    int card, code = enter(&card);
    return code ? code : copy_now("aclrtMemcpy", destination, room, source, bytes, kind, card);
}

API int aclrtMemcpyBatch(void **destinations, size_t *rooms, void **sources, size_t *sizes, size_t copies, void *attributes,
                         size_t *attribute_indexes, size_t attribute_number, size_t *failed)
{
    (void)attributes;   /* locations of both ends, which the addresses tell too */
    (void)attribute_indexes;
    (void)attribute_number;
    int card, code = enter(&card);
    for (size_t i = 0; i < copies && !code; i++) {
        code = copy_now("aclrtMemcpyBatch", destinations[i], rooms[i], sources[i], sizes[i], BY_ADDRESS, card);
        if (code && failed) *failed = i;
    }
    return code;
}

static int run_copy(struct stream *stream, struct task *task)
{
    (void)stream;
    return copy_places(&task->places[0], &task->places[1], task->bytes);
}

/* The places of a task are on the device or host addresses; only the former are held. */
static int put_copy(const char *what, void *destination, size_t room, const void *source, size_t bytes, int kind, void *handle)
{
    struct stream *stream = stream_of(handle);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    struct task task = { .run = run_copy, .bytes = bytes };
    int code = prepare(what, &task.places[0], destination, room, &task.places[1], source, bytes, kind, stream_card(stream));
    return code ? code : stream_put(stream, task, source, destination);
}

API int aclrtMemcpyAsync(void *destination, size_t room, const void *source, size_t bytes, int32_t kind, void *stream)
{
    int code = enter(NULL);
    return code ? code : put_copy("aclrtMemcpyAsync", destination, room, source, bytes, kind, stream);
}

API int aclrtMemset(void *address, size_t room, int32_t value, size_t bytes)
{
    int card, code = enter(&card);
    if (code) return code;
    if (bytes > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemset: %zu bytes into %zu", bytes, room);
    struct place place;
    code = locate("aclrtMemset", address, bytes, card, &place);
    if (!code) code = hazard_check_write("aclrtMemset", address, bytes);
    if (!code) memset(place.alias, value, bytes);
    return code;
}

static int run_set(struct stream *stream, struct task *task)
{
    (void)stream;
    memset(task->places[0].alias, (int)(intptr_t)task->argument, task->bytes);
    return ACL_SUCCESS;
}

API int aclrtMemsetAsync(void *address, size_t room, int32_t value, size_t bytes, void *handle)
{
    int code = enter(NULL);
    if (code) return code;
    struct stream *stream = stream_of(handle);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    if (bytes > room) return refuse(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemsetAsync: %zu bytes into %zu", bytes, room);
    struct task task = { .run = run_set, .bytes = bytes, .argument = (void *)(intptr_t)value };
    code = locate("aclrtMemsetAsync", address, bytes, stream_card(stream), &task.places[0]);
    return code ? code : stream_put(stream, task, NULL, address);
}

/* ---- FFTS+: a launch is a list of 128-byte contexts; those without a length are labels, the others SDMA copies ---- */
struct sdma_context {
    uint8_t head[88];
    uint32_t source_low, source_high, source_offset, destination_low, destination_high, destination_offset, bytes, tail_bytes;
    uint8_t rest[8];
};
_Static_assert(sizeof(struct sdma_context) == 128, "the size of an FFTS+ context");
struct launch { void *entry; const struct sdma_context *contexts; size_t bytes; };

API int rtGeneralCtrl(uintptr_t *arguments, uint32_t number, uint32_t type)
{
    (void)type;
    int code = enter(NULL);
    if (code) return code;
    if (number < 2 || !arguments) return refuse(ACL_ERROR_RT_PARAM_INVALID, "rtGeneralCtrl with %u arguments", number);
    const struct launch *launch = (const struct launch *)arguments[0];
    for (size_t i = 0; i < launch->bytes / sizeof *launch->contexts && !code; i++) {
        const struct sdma_context *context = &launch->contexts[i];
        void *destination = (void *)((uint64_t)context->destination_high << 32 | context->destination_low);
        void *source = (void *)((uint64_t)context->source_high << 32 | context->source_low);
        if (context->bytes)
            code = put_copy("FFTS+ copy", destination, context->bytes, source, context->bytes, BY_ADDRESS, (void *)arguments[1]);
    }
    return code;
}
