/* The board: one file per host, mapped by all its processes, with every piece of device memory and every fault rule.
 * A process that was killed is noticed the next time somebody looks at what it held. */
#include "double.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

struct board {
    char magic[8];                       /* written last, when the rest is ready */
    uint64_t fault_rules;
    struct fault_rule faults[FAULTS];    /* control.py writes here */
    uint64_t next_serial, next_slot;
    uint64_t used[CARDS];
    struct segment segments[SEGMENTS];
    pthread_mutex_t lock;
};
_Static_assert(offsetof(struct board, faults) == 16 && sizeof(struct fault_rule) == 24 &&
                   offsetof(struct board, segments) == 2080 && sizeof(struct segment) == 400 &&
                   offsetof(struct segment, holders) == 136,
               "control.py knows this layout");

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct board *board;
static int attached_pid;

const char *state_directory(void)
{
    const char *path = setting("CANN_DOUBLE_STATE", NULL);
    if (!path) {
        say("CANN_DOUBLE_STATE is not set: it names the directory in which the processes of a host meet");
        abort();
    }
    return path;
}

static void initialise(struct board *fresh)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&fresh->lock, &attributes);
    fresh->fault_rules = FAULTS;
    memcpy(fresh->magic, "CANNBRD1", sizeof fresh->magic);
}

static void attach(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/processes", state_directory());
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/board", state_directory());
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    if (file < 0 || fcntl(file, F_SETLKW, &whole) || ftruncate(file, sizeof *board)) {
        say("%s: %s", path, strerror(errno));
        abort();
    }
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (board == MAP_FAILED) abort();
    if (memcmp(board->magic, "CANNBRD1", sizeof board->magic)) initialise(board);
    close(file);   /* and unlocks it */
    attached_pid = getpid();
    count(COUNT_VIOLATIONS, 0);   /* the process has a sheet from now on */
}

int attach_process(void)
{
    pthread_once(&once, attach);
    if (attached_pid == getpid()) return ACL_SUCCESS;
    return violation(ACL_ERROR_RT_CONTEXT_NULL, "process %d is a fork of %d, which uses the device", getpid(), attached_pid);
}

struct fault_rule *board_faults(void)
{
    pthread_once(&once, attach);
    return board->faults;
}

void board_lock(void)
{
    pthread_once(&once, attach);
    if (pthread_mutex_lock(&board->lock) == EOWNERDEAD) pthread_mutex_consistent(&board->lock);
}

void board_unlock(void) { pthread_mutex_unlock(&board->lock); }

bool process_is_alive(int pid)
{
    char path[64], state = 'X';
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file) return false;
    if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'R';   /* a name with a ')' in it */
    fclose(file);
    return state != 'Z' && state != 'X';
}

int bare_tgid(void)
{
    /* The number space of the host is not the one of the container: a caller that sends its own getpid() is refused. */
    return getpid() + 0x400000;
}

struct segment *segment_at(uint32_t slot) { return &board->segments[slot]; }

uint32_t segment_slot(const struct segment *segment) { return (uint32_t)(segment - board->segments); }

static void drop_if_unheld(struct segment *segment)
{
    for (int i = 0; i < HOLDERS; i++)
        if (segment->holders[i].handles) return;
    board->used[segment->card] -= segment->bytes;
    memset(segment, 0, sizeof *segment);
}

static void drop_dead_holders(struct segment *segment)
{
    for (int i = 0; i < HOLDERS; i++)
        if (segment->holders[i].handles && !process_is_alive(segment->holders[i].pid)) segment->holders[i].handles = 0;
    drop_if_unheld(segment);
}

struct segment *segment_by_key(const char *key)
{
    uint32_t slot;
    if (sscanf(key, "%8x", &slot) != 1 || slot >= SEGMENTS) return NULL;
    struct segment *segment = &board->segments[slot];
    return segment->serial && segment->exported && !strncmp(segment->key, key, KEY_BYTES) ? segment : NULL;
}

static void write_key(struct segment *segment, uint32_t slot)
{
    uint64_t noise[3];
    if (getrandom(noise, sizeof noise, 0) != sizeof noise) abort();
    snprintf(segment->key, sizeof segment->key, "%08x%08x%016lx%016lx%016lx", slot, (uint32_t)segment->serial, noise[0],
             noise[1], noise[2]);
}

int segment_create(int card, uint64_t bytes, int descriptor, bool is_chunk, uint32_t *slot)
{
    for (uint32_t tried = 0; tried < SEGMENTS; tried++) {
        *slot = (uint32_t)((board->next_slot + tried) % SEGMENTS);
        struct segment *segment = &board->segments[*slot];
        if (segment->serial) continue;
        *segment = (struct segment){
            .serial = ++board->next_serial,
            .bytes = bytes,
            .card = card,
            .owner = getpid(),
            .descriptor = descriptor,
            .is_chunk = is_chunk,
            .holders = { { getpid(), 1 } },
        };
        write_key(segment, *slot);
        board->next_slot = *slot + 1;
        board->used[card] += bytes;
        return ACL_SUCCESS;
    }
    return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the board has no more than %d pieces of memory", SEGMENTS);
}

bool segment_hold(struct segment *segment, int pid)
{
    struct holder *free_place = NULL;
    for (int i = 0; i < HOLDERS; i++) {
        struct holder *holder = &segment->holders[i];
        if (holder->handles && holder->pid == pid) {
            holder->handles++;
            return true;
        }
        if (!holder->handles && !free_place) free_place = holder;
    }
    if (!free_place) return false;
    *free_place = (struct holder){ pid, 1 };
    return true;
}

void segment_release(struct segment *segment, int pid)
{
    for (int i = 0; i < HOLDERS; i++)
        if (segment->holders[i].handles && segment->holders[i].pid == pid) segment->holders[i].handles--;
    drop_if_unheld(segment);
}

int segment_importers(struct segment *segment)
{
    int importers = 0;
    for (int i = 0; i < HOLDERS; i++)
        if (segment->holders[i].handles && segment->holders[i].pid != segment->owner &&
            process_is_alive(segment->holders[i].pid))
            importers++;
    return importers;
}

void release_the_dead(void)
{
    for (uint32_t slot = 0; slot < SEGMENTS; slot++)
        if (board->segments[slot].serial) drop_dead_holders(&board->segments[slot]);
}

uint64_t card_bytes_used(int card) { return board->used[card]; }

uint64_t card_bytes_total(void) { return (uint64_t)setting_integer("CANN_DOUBLE_CARD_BYTES", 64LL << 30); }

int open_segment_memory(const struct segment *segment)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", segment->owner, segment->descriptor);
    return open(path, O_RDWR | O_CLOEXEC);
}
