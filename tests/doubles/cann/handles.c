/* Handles are numbers, not pointers: a slot in a table and the slot's generation. A destroyed one is recognised for ever. */
#include "double.h"

#include <pthread.h>
#include <stdlib.h>

static const char *const names[] = { "", "stream", "event", "notify", "communicator", "physical memory", "context" };
struct slot { void *object; uint32_t generation; uint8_t kind; };
enum { SLOTS = 1 << 16, GENERATIONS = 1 << 24 };
static struct slot slots[SLOTS];
static uint32_t next_slot = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Bits: 56 to 62 a mark, 48 to 55 the kind, 24 to 47 the generation, 0 to 15 the slot. Not an address on any machine. */
static const uint64_t mark = 0x4eULL << 56;

void *handle_create(enum handle_kind kind, void *object)
{
    pthread_mutex_lock(&lock);
    for (uint32_t tried = 0; tried < SLOTS; tried++) {
        uint32_t index = (next_slot + tried) % SLOTS;
        struct slot *slot = &slots[index];
        if (slot->object || !index) continue;
        slot->object = object;
        slot->kind = (uint8_t)kind;
        slot->generation = (slot->generation + 1) % GENERATIONS;
        next_slot = index + 1;
        uint64_t handle = mark | (uint64_t)kind << 48 | (uint64_t)slot->generation << 24 | index;
        pthread_mutex_unlock(&lock);
        return (void *)handle;
    }
    say("more than %d handles", SLOTS);
    abort();
}

static struct slot *find(enum handle_kind kind, const void *handle)
{
    uint64_t number = (uint64_t)handle;
    struct slot *slot = &slots[number % SLOTS];
    bool alive = number >> 56 == mark >> 56 && slot->object && slot->kind == kind && (number >> 48 & 0xff) == kind &&
                 (number >> 24) % GENERATIONS == slot->generation;
    if (!alive) violation(ACL_ERROR_RT_INVALID_HANDLE, "%p is not a live %s handle", handle, names[kind]);
    return alive ? slot : NULL;
}

void *handle_object(enum handle_kind kind, const void *handle)
{
    pthread_mutex_lock(&lock);
    struct slot *slot = find(kind, handle);
    void *object = slot ? slot->object : NULL;
    pthread_mutex_unlock(&lock);
    return object;
}

void *handle_destroy(enum handle_kind kind, const void *handle)
{
    pthread_mutex_lock(&lock);
    struct slot *slot = find(kind, handle);
    void *object = slot ? slot->object : NULL;
    if (slot) slot->object = NULL;
    pthread_mutex_unlock(&lock);
    return object;
}
