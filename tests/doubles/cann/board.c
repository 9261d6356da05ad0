/* The board: one file per host, mapped by all its processes, with every piece of device memory and every fault rule.
 * A process that was killed is noticed the next time somebody looks at what it held. */
#include "double.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct opener { int32_t pid; uint64_t mounts; };
struct board {
    char magic[8];                       /* written last, when the rest is ready */
    uint64_t fault_rules;
    struct fault_rule faults[FAULTS];    /* control.py writes here */
    uint64_t next_serial, next_slot, next_key;
    uint64_t used[CARDS];
    struct segment segments[SEGMENTS];
    uint32_t next_share[CARDS], shared[CARDS][SEGMENTS];   /* slot + 1, by the chunk's number on its card */
    struct key keys[KEYS];
    struct opener openers[CARDS][HOLDERS];
    pthread_mutex_t lock;
};
_Static_assert(offsetof(struct board, faults) == 16 && sizeof(struct fault_rule) == 24 &&
                   offsetof(struct board, segments) == 2088 && sizeof(struct segment) == 432 &&
                   offsetof(struct segment, holders) == 144,
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

/* aclInit comes first; without it the card works, but what is meant to say why something failed is not set up.
 * [doc of aclInit; rt 9.0.0: nothing checks it] */
static bool initialised;

API int aclInit(const char *configuration)
{
    (void)configuration;
    int code = attach_process();
    if (code) return code;
    if (__atomic_exchange_n(&initialised, true, __ATOMIC_ACQ_REL)) return ACL_ERROR_REPEAT_INITIALIZE;
    return ACL_SUCCESS;
}
API int aclFinalize(void)
{
    __atomic_store_n(&initialised, false, __ATOMIC_RELEASE);
    return ACL_SUCCESS;
}

bool runtime_is_initialised(void) { return __atomic_load_n(&initialised, __ATOMIC_ACQUIRE); }

int use_runtime(const char *call)
{
    static bool said;
    int code = attach_process();
    if (!code && !runtime_is_initialised() && !__atomic_exchange_n(&said, true, __ATOMIC_ACQ_REL))
        violation(0, "%s before aclInit: nothing would say why a call fails", call);
    return code;
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

int process_end(int pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }

bool has_ended(int descriptor)
{
    struct pollfd end = { .fd = descriptor, .events = POLLIN };
    return poll(&end, 1, 0) != 0;
}

bool process_is_alive(int pid)
{
    int descriptor = process_end(pid);
    if (descriptor < 0)
        return errno != ESRCH && errno != EINVAL && (kill(pid, 0) == 0 || errno == EPERM);   /* no descriptor is free */
    bool alive = !has_ended(descriptor);
    close(descriptor);
    return alive;
}

int bare_tgid(int pid)
{
    /* The number space of the host is not the one of the container: a caller that sends its own getpid() is refused. */
    return pid + 0x400000;
}

struct segment *segment_at(uint32_t slot) { return &board->segments[slot]; }

uint32_t segment_slot(const struct segment *segment) { return (uint32_t)(segment - board->segments); }

struct key *board_keys(void) { return board->keys; }

uint64_t board_next_key(void) { return ++board->next_key; }

static void drop_if_unheld(struct segment *segment)
{
    for (int i = 0; i < HOLDERS; i++)
        if (segment->holders[i].handles) return;
    board->used[segment->card] -= segment->bytes;
    if (segment->exported) board->shared[segment->card][segment->share_number] = 0;
    memset(segment, 0, sizeof *segment);
}

static void drop_dead_holders(struct segment *segment)
{
    for (int i = 0; i < HOLDERS; i++)
        if (segment->holders[i].handles && !process_is_alive(segment->holders[i].pid)) segment->holders[i].handles = 0;
    drop_if_unheld(segment);
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
            .is_chunk = is_chunk,
            .holders = { { getpid(), 1, descriptor } },
        };
        board->next_slot = *slot + 1;
        board->used[card] += bytes;
        return ACL_SUCCESS;
    }
    return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, "the board has no more than %d pieces of memory", SEGMENTS);
}

bool segment_hold(struct segment *segment, int pid, int descriptor) { return holders_add(segment->holders, pid, descriptor); }

void segment_release(struct segment *segment, int pid)
{
    holders_remove(segment->holders, pid);
    drop_if_unheld(segment);
}

/* Numbers count up on each card, so that they can be guessed, and one is not used again for long. [drv 9.0.0
 * svm_phy_addr_blk_mng.c:179: cyclic] */
void segment_share(struct segment *segment)
{
    uint32_t *shared = board->shared[segment->card], number;
    do
        number = board->next_share[segment->card]++ % SEGMENTS;
    while (shared[number]);
    shared[number] = segment_slot(segment) + 1;
    segment->share_number = number;
    segment->exported = 1;
}

struct segment *segment_shared_as(int card, uint32_t share_number)
{
    uint32_t slot = card >= 0 && share_number < SEGMENTS ? board->shared[card][share_number] : 0;
    if (!slot) return NULL;
    struct segment *segment = &board->segments[slot - 1];
    drop_dead_holders(segment);
    return segment->serial ? segment : NULL;
}

int segment_importers(struct segment *segment)
{
    int importers = 0;
    for (int i = 0; segment->keys && i < KEYS; i++) {
        struct key *key = &board->keys[i];
        if (key->serial && key->slot == segment_slot(segment) && key->owner == segment->owner)
            importers += holders_alive(key->importers, segment->owner);
    }
    return importers;
}

void release_the_dead(void)
{
    for (uint32_t slot = 0; slot < SEGMENTS; slot++)
        if (board->segments[slot].serial) drop_dead_holders(&board->segments[slot]);
}

uint64_t card_bytes_used(int card) { return board->used[card]; }

uint64_t card_bytes_total(void) { return (uint64_t)setting_integer("CANN_DOUBLE_CARD_BYTES", 64LL << 30); }

/* Whoever holds the memory can give it to others: a chunk outlives its exporter. */
int open_segment_memory(const struct segment *segment)
{
    for (int i = 0; i < HOLDERS; i++) {
        const struct holder *holder = &segment->holders[i];
        char path[64];
        if (!holder->handles || !process_is_alive(holder->pid)) continue;
        snprintf(path, sizeof path, "/proc/%d/fd/%d", holder->pid, holder->descriptor);
        int descriptor = open(path, O_RDWR | O_CLOEXEC);
        if (descriptor >= 0) return descriptor;
    }
    return -1;
}

/* ---- who may open a card: the mount namespace of its first opener, until its last one is gone
 * [drv uda_access.c uda_occupy_dev_by_ns; exempt: uda_cur_is_admin] ---- */
static uint64_t mount_namespace(int pid)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/%d/ns/mnt", pid);
    return stat(path, &status) ? 0 : (uint64_t)status.st_ino;
}

/* The emulated host's own: that of the process that made its directory, or the machine's. */
static uint64_t host_mount_namespace(void)
{
    char path[512];
    unsigned long long inode = 0;
    snprintf(path, sizeof path, "%s/host_mount_namespace", state_directory());
    FILE *file = fopen(path, "re");
    if (!file) return mount_namespace(1);
    if (fscanf(file, "%llu", &inode) != 1) inode = 0;
    fclose(file);
    return inode;
}

static bool is_root_with_all_capabilities(void)
{
    unsigned long long effective = 0, last = 0, outside = 1, mapped = 0;
    char line[256];
    FILE *file = fopen("/proc/self/status", "re");
    while (file && fgets(line, sizeof line, file)) sscanf(line, "CapEff: %llx", &effective);
    if (file) fclose(file);
    if ((file = fopen("/proc/sys/kernel/cap_last_cap", "re"))) {
        if (fscanf(file, "%llu", &last) != 1) last = 63;
        fclose(file);
    }
    if ((file = fopen("/proc/self/uid_map", "re"))) {   /* the first user namespace maps every number to itself */
        if (fscanf(file, "%*u %llu %llu", &outside, &mapped) != 2) mapped = 0;
        fclose(file);
    }
    return !geteuid() && effective == (2ULL << last) - 1 && !outside && mapped == UINT32_MAX;
}

int card_occupy(int card)
{
    uint64_t mounts = mount_namespace(getpid());
    if (mounts == host_mount_namespace() || is_root_with_all_capabilities()) return ACL_SUCCESS;
    struct opener *place = NULL;
    for (int i = 0; i < HOLDERS; i++) {
        struct opener *opener = &board->openers[card][i];
        if (opener->pid && !process_is_alive(opener->pid)) opener->pid = 0;
        if (opener->pid && opener->mounts != mounts)
            return refuse(ACL_ERROR_RT_DEV_SETUP_ERROR,
                          "Conflict open udevid %d: process %d of another mount namespace (container) has the card", card,
                          opener->pid);
        if (!opener->pid || opener->pid == getpid()) place = opener;
    }
    if (place) *place = (struct opener){ getpid(), mounts };
    return ACL_SUCCESS;
}
