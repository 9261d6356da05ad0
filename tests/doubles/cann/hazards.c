/* Races between streams and the host: what tasks write until the host has waited for it, and read until they are done.
 * A host that reads or overwrites such memory through ACL, shares it or frees it has a bug that shows on hardware only now
 * and then. Here it always shows. */
#include "double.h"

#include <pthread.h>
#include <stdlib.h>

struct access { uint64_t stream, sequence; const char *begin, *end; bool writes; };
struct join { uint64_t stream, sequence, other, other_sequence; };   /* `stream` waits for `other` */
static struct access *accesses;
static struct join *joins;
static size_t accesses_number, accesses_capacity, joins_number, joins_capacity;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(uint64_t stream, uint64_t sequence, const void *address, uint64_t bytes, bool writes)
{
    pthread_mutex_lock(&lock);
    if (accesses_number == accesses_capacity)
        accesses = realloc(accesses, (accesses_capacity = accesses_capacity ? 2 * accesses_capacity : 256) * sizeof *accesses);
    accesses[accesses_number++] = (struct access){ stream, sequence, address, (const char *)address + bytes, writes };
    pthread_mutex_unlock(&lock);
}

void hazard_write(uint64_t stream, uint64_t sequence, const void *address, uint64_t bytes)
{
    add(stream, sequence, address, bytes, true);
}

void hazard_read(uint64_t stream, uint64_t sequence, const void *address, uint64_t bytes)
{
    add(stream, sequence, address, bytes, false);
}

void hazard_task_done(uint64_t stream, uint64_t sequence)
{
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < accesses_number;)
        if (!accesses[i].writes && accesses[i].stream == stream && accesses[i].sequence == sequence)
            accesses[i] = accesses[--accesses_number];
        else
            i++;
    pthread_mutex_unlock(&lock);
}

void hazard_joined(uint64_t stream, uint64_t sequence, uint64_t other, uint64_t other_sequence)
{
    pthread_mutex_lock(&lock);
    if (joins_number == joins_capacity)
        joins = realloc(joins, (joins_capacity = joins_capacity ? 2 * joins_capacity : 64) * sizeof *joins);
    joins[joins_number++] = (struct join){ stream, sequence, other, other_sequence };
    pthread_mutex_unlock(&lock);
}

static void synchronised(uint64_t stream, uint64_t sequence)
{
    for (size_t i = 0; i < accesses_number;)
        if (accesses[i].stream == stream && accesses[i].sequence <= sequence)
            accesses[i] = accesses[--accesses_number];
        else
            i++;
    for (size_t i = 0; i < joins_number;)
        if (joins[i].stream == stream && joins[i].sequence <= sequence) {
            struct join join = joins[i];
            joins[i] = joins[--joins_number];
            synchronised(join.other, join.other_sequence);   /* no cycle: a join is gone before it is followed */
            i = 0;
        } else
            i++;
}

void hazard_synchronised(uint64_t stream, uint64_t sequence)
{
    pthread_mutex_lock(&lock);
    synchronised(stream, sequence);
    pthread_mutex_unlock(&lock);
}

static bool find(const char *begin, uint64_t bytes, bool only_writes, struct access *found)
{
    bool overlaps = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < accesses_number && !overlaps; i++)
        if (accesses[i].begin < begin + bytes && begin < accesses[i].end && (accesses[i].writes || !only_writes)) {
            *found = accesses[i];
            overlaps = true;
        }
    pthread_mutex_unlock(&lock);
    return overlaps;
}

int hazard_check_read(const char *what, const void *address, uint64_t bytes)
{
    struct access access;
    if (!find(address, bytes, true, &access)) return ACL_SUCCESS;
    return violation(ACL_ERROR_RT_PARAM_INVALID, "%s reads %lu bytes at %p that stream %lu writes: nobody has synchronised it",
                     what, bytes, address, access.stream);
}

int hazard_check_write(const char *what, const void *address, uint64_t bytes)
{
    struct access access;
    if (!find(address, bytes, false, &access)) return ACL_SUCCESS;
    return violation(ACL_ERROR_RT_PARAM_INVALID, "%s writes %lu bytes at %p that stream %lu still %s", what, bytes, address,
                     access.stream, access.writes ? "writes: nobody has synchronised it" : "reads");
}
