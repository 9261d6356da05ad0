/* What the double's files share. One process loads one copy of it; processes meet in the state directory (board.c).
 *
 * Lock order: memory_lock() -> board_lock(). Streams, events and communicators have locks of their own, taken last. */
#ifndef CANN_DOUBLE_H
#define CANN_DOUBLE_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* The release of CANN whose functions there are; CANN_DOUBLE_RELEASE has the rules of the same one. [acl_rt.h of each tag] */
#ifndef CANN_RELEASE
#define CANN_RELEASE 850
#endif
#define API __attribute__((visibility("default")))
#define PRINTF(text, first) __attribute__((format(printf, text, first)))

/* ACL's and HCCL's error codes, by their own names. */
enum {
    ACL_SUCCESS = 0,
    ACL_ERROR_INVALID_PARAM = 100000,
    ACL_ERROR_REPEAT_INITIALIZE = 100002,
    ACL_ERROR_RT_PARAM_INVALID = 107000,
    ACL_ERROR_RT_INVALID_DEVICEID = 107001,
    ACL_ERROR_RT_CONTEXT_NULL = 107002,
    ACL_ERROR_RT_INVALID_HANDLE = 107017,
    ACL_ERROR_RT_THREAD_SUBSCRIBE = 107012,
    ACL_ERROR_RT_WAIT_TIMEOUT = 107019,
    ACL_ERROR_FEATURE_UNSUPPORTED = 200006,
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207000,
    ACL_ERROR_RT_MEMORY_ALLOCATION = 207001,
    ACL_ERROR_RT_NO_PERMISSION = 207006,
    ACL_ERROR_RT_INTERNAL_ERROR = 507000,
    ACL_ERROR_RT_AICPU_EXCEPTION = 507018,
    ACL_ERROR_RT_DEV_SETUP_ERROR = 507033,
    ACL_ERROR_RT_STREAM_SYNC_TIMEOUT = 507046,
    ACL_ERROR_RT_EVENT_SYNC_TIMEOUT = 507047,
    ACL_ERROR_RT_COPY_DATA = 507052,
    ACL_ERROR_RT_DRV_INTERNAL_ERROR = 507899,
};
enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_PTR = 2,
    HCCL_E_INTERNAL = 4,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_UNAVAIL = 7,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_TCP_CONNECT = 11,
    HCCL_E_NETWORK = 19,
    HCCL_E_REMOTE = 21,
};

enum { PAGE_BYTES = 4096, HUGE_PAGE_BYTES = 2 << 20, KEY_BYTES = 65, CARDS = 64 };

static inline uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

/* ---- settings.c: what the environment says ---- */
const char *setting(const char *name, const char *otherwise);
int64_t setting_integer(const char *name, int64_t otherwise);
bool strict(void);
bool release_is_below(int release);   /* CANN_DOUBLE_RELEASE="8.5" is 850 */
double seconds_now(void);
struct timespec deadline_after_ms(int64_t milliseconds);

/* ---- accounting.c: counters that tests read, and the list of what was done wrong ---- */
enum counter {
    COUNT_ALLOCATIONS,
    COUNT_ALLOCATED_BYTES,
    COUNT_HOST_ALLOCATIONS,
    COUNT_PHYSICAL_HANDLES,
    COUNT_RESERVATIONS,
    COUNT_MAPPINGS,
    COUNT_EXPORTS,
    COUNT_IMPORTS,
    COUNT_STREAMS,
    COUNT_EVENTS,
    COUNT_NOTIFIES,
    COUNT_COMMUNICATORS,
    COUNT_PENDING_TASKS,
    COUNT_TASKS_RUN,
    COUNT_BYTES_SENT,
    COUNT_BYTES_RECEIVED,
    COUNT_VIOLATIONS,
    COUNTERS,
};
void count(enum counter counter, int64_t by);
/* Remembers the text for aclGetRecentErrMsg and returns the code. An error that a caller may meet in good faith. */
int refuse(int code, const char *format, ...) PRINTF(2, 3);
/* A caller's bug: counted, written to the process's list and to stderr. Returns `code` if strict, else ACL_SUCCESS. */
int violation(int code, const char *format, ...) PRINTF(2, 3);
void say(const char *format, ...) PRINTF(1, 2);

/* ---- board.c: the memory that all processes of one host share ---- */
struct holder { int32_t pid, handles, descriptor; };
enum { HOLDERS = 24, SEGMENTS = 16384, KEYS = 4096, FAULTS = 64 };
/* One piece of device memory: a plain allocation, which its owner alone holds, or a physical chunk, which lives as long as
 * any process has a handle or a mapping of it. */
struct segment {
    uint64_t serial;       /* 0: free slot. Never repeats. */
    uint64_t bytes;
    int32_t card;
    int32_t owner;         /* pid that allocated it */
    uint32_t is_chunk;     /* allocated by aclrtMallocPhysical */
    uint32_t keys;         /* of a plain allocation: open export keys */
    uint32_t exported;     /* of a chunk: it has its one shareable handle, with this number on its card */
    uint32_t share_number;
    uint32_t any_pid;      /* no whitelist */
    uint32_t spare;
    int32_t whitelist[HOLDERS];   /* bare TGIDs */
    struct holder holders[HOLDERS];
};
/* An export key of a part of a plain allocation. */
struct key {
    uint64_t serial;       /* 0: free. Never repeats. */
    uint64_t segment, offset, bytes;
    uint32_t slot;
    int32_t owner;
    uint32_t any_pid, spare;
    int32_t whitelist[HOLDERS];
    struct holder importers[HOLDERS];
};
struct fault_rule {
    int32_t kind;          /* 0: no rule */
    int32_t pid;           /* 0: every process */
    int32_t card;          /* -1: every card */
    int32_t times;         /* how often it still strikes; -1: for ever */
    double value;
};
int attach_process(void);                       /* once per process; an error in a forked child */
int use_runtime(const char *call);              /* attach_process, and a violation if aclInit was not called before */
const char *state_directory(void);
bool runtime_is_initialised(void);
struct fault_rule *board_faults(void);
void board_lock(void);
void board_unlock(void);
struct segment *segment_at(uint32_t slot);      /* with the board locked, as all that follow */
uint32_t segment_slot(const struct segment *segment);
int segment_create(int card, uint64_t bytes, int descriptor, bool is_chunk, uint32_t *slot);
bool segment_hold(struct segment *segment, int pid, int descriptor);
void segment_release(struct segment *segment, int pid);   /* the last holder's release frees the slot */
void segment_share(struct segment *segment);              /* gives a chunk its number */
struct segment *segment_shared_as(int card, uint32_t share_number);
int segment_importers(struct segment *segment);           /* living processes that have opened keys of it */
void release_the_dead(void);                              /* gives up what killed processes held */
uint64_t card_bytes_used(int card);
uint64_t card_bytes_total(void);
bool process_is_alive(int pid);
int process_end(int pid);                       /* a descriptor for `has_ended`, -1 if there is none */
bool has_ended(int descriptor);                 /* also if nobody has waited for the process yet */
int bare_tgid(int pid);
int open_segment_memory(const struct segment *segment);   /* a holder's memfd, opened here; -1: it cannot be had */
/* Whether this process may open the card now, by the mount namespaces of those that have it open. */
int card_occupy(int card);

/* ---- keys.c: export keys, on the board ---- */
struct key *board_keys(void);
uint64_t board_next_key(void);
struct key *key_create(struct segment *segment, uint64_t offset, uint64_t bytes, bool any_pid);
struct key *key_named(const char *name);                  /* open, and its owner alive; or NULL */
bool key_is_closed(uint64_t serial);                      /* without the board's lock; its owner may have died */
struct key *key_with_serial(uint64_t serial);             /* as key_named */
void key_name(const struct key *key, char name[KEY_BYTES]);
void key_close(struct key *key);
bool holders_add(struct holder *holders, int pid, int descriptor);
void holders_remove(struct holder *holders, int pid);
int holders_alive(const struct holder *holders, int but);
int whitelist_add(int32_t *whitelist, const int32_t *pids, size_t number);
int may_import(const int32_t *whitelist, bool any_pid, int exporter, int card, int here, bool peer_flag);

/* ---- faults.c ---- */
enum fault {
    FAULT_NONE,
    FAULT_PEER_LOSS_ERROR,   /* a lost peer gives an error instead of hanging */
    FAULT_PEER_LOST,         /* every peer counts as lost */
    FAULT_SLOW_LINK,         /* value: bytes per second */
    FAULT_CORRUPT_LINK,      /* one bit of what is received is wrong */
    FAULT_IMPORT_REFUSED,
    FAULT_EXPORT_REFUSED,
    FAULT_OUT_OF_MEMORY,
    FAULT_ASYNC_ERROR,       /* the next task on a stream fails */
    FAULT_DEVICE_RESET,      /* everything that this process has on the card is lost */
    FAULT_CARD_UNAVAILABLE,  /* aclrtSetDevice fails */
    FAULT_SLOW_COMMUNICATOR, /* value: seconds that setting one up takes */
    FAULT_NO_PEER_ACCESS,    /* the card reaches no memory of others */
    FAULT_KINDS,
};
bool fault_strikes(enum fault kind, int card);               /* uses up one of `times` */
double fault_value(enum fault kind, int card, double otherwise);   /* does not */

/* ---- numbers.c: three ways to count. A card is physical. A logical number counts the cards of the container, a device
 * those of the logical ones that ASCEND_RT_VISIBLE_DEVICES shows to the process. ---- */
int devices_visible(int cards[CARDS]);   /* their number */
int card_of_device(int device);          /* -1: no such device */
int device_of_card(int card);
int logical_of_card(int card);
int card_of_logical(int logical);

/* ---- device.c: contexts, and the thread's current card ---- */
int current_card(void);              /* -1: this thread has no device */
int enter(int *card);                /* start of each call that needs a device: attached, a device set, not lost */
bool card_is_lost(int card);
int card_lost_code(int card, const char *what);   /* refuses with the reason */
bool reaches_peer(int card, int peer);   /* this process enabled it, and the card can */
void card_break(int card);           /* a page fault on the device: this process can do nothing more there */

/* ---- ranges.c: the device addresses of this process ----
 * A device address cannot be read or written by the host: it is reserved without access. The bytes are at another address
 * (the alias), which only the double uses. So a host that reads through a device pointer dies, as it would. */
struct place { char *alias; struct range *range; bool on_device; uint64_t offset; };
enum range_kind { RANGE_ALLOCATION, RANGE_IMPORT, RANGE_RESERVATION };
struct piece { uint64_t offset, bytes, file_offset; uint32_t slot; int descriptor; void *handle; struct piece *next; };
struct range {
    enum range_kind kind;
    char *base, *alias;
    uint64_t bytes, requested;
    int card;
    int busy;                  /* tasks that are under way on it */
    uint64_t page;             /* an allocation's */
    struct piece *pieces;      /* what is mapped into it, by offset; one piece unless a reservation */
    uint64_t key;              /* an import's: serial of the key, its owner, how often it is open, is its name forgotten */
    int exporter, exporter_end, opened;
    bool forgotten;
};
void memory_lock(void);
void memory_unlock(void);
struct range *range_create(enum range_kind kind, uint64_t bytes, uint64_t alignment, int card);   /* no memory yet */
int range_map(struct range *range, uint64_t offset, uint64_t bytes, int descriptor, uint32_t slot, void *handle);
void range_unmap(struct range *range, struct piece *piece);
void range_destroy(struct range *range);      /* its addresses are never used again */
struct range *range_at(const void *address);  /* with the memory locked */
struct range *import_of(uint64_t key_serial);
struct piece *piece_at(struct range *range, uint64_t offset);
bool was_device_memory(const void *address);
/* Whether the exporter closed the key, freed the memory or died: the driver then unmaps it here, whatever uses it. */
bool place_is_dead(const struct place *place);

/* Where the bytes of [address, address + bytes) are. Checks that it is all mapped, of one card, alive. */
int locate(const char *what, const void *address, uint64_t bytes, int card, struct place *place);
void place_hold(const struct place *place);      /* as long as a task works on it */
void place_release(const struct place *place);
/* A card has large pages and no page faults. What is shared gets the host's large pages, where it has some: otherwise each
 * process that maps it would spend longer on faults than on copying. */
void large_pages(const struct place *place, uint64_t bytes);
int memory_available(int card, uint64_t bytes);  /* capacity and the out-of-memory fault */
int card_memory(uint64_t bytes);                 /* a new memfd, or -1 */

/* ---- hazards.c: asynchronous writes that no host thread has waited for ---- */
void hazard_write(uint64_t stream, uint64_t sequence, const void *address, uint64_t bytes);
void hazard_read(uint64_t stream, uint64_t sequence, const void *address, uint64_t bytes);
void hazard_task_done(uint64_t stream, uint64_t sequence);         /* its reads are over */
void hazard_synchronised(uint64_t stream, uint64_t sequence);      /* the host has waited for it */
void hazard_joined(uint64_t stream, uint64_t sequence, uint64_t other, uint64_t other_sequence);
int hazard_check_read(const char *what, const void *address, uint64_t bytes);
int hazard_check_write(const char *what, const void *address, uint64_t bytes);

/* ---- handles.c: opaque handles that are known to be dead after their destruction ---- */
enum handle_kind { HANDLE_STREAM = 1, HANDLE_EVENT, HANDLE_NOTIFY, HANDLE_COMMUNICATOR, HANDLE_PHYSICAL, HANDLE_CONTEXT };
void *handle_create(enum handle_kind kind, void *object);
void *handle_object(enum handle_kind kind, const void *handle);   /* NULL and a violation if it is not alive */
void *handle_destroy(enum handle_kind kind, const void *handle);

/* ---- streams.c ---- */
struct stream;
struct task;
typedef int task_function(struct stream *stream, struct task *task);
enum { TASK_PLACES = 2 };
struct task {
    task_function *run;
    void (*discard)(struct task *task);   /* gives up `subject`; run or not */
    void *subject, *argument;
    struct place places[TASK_PLACES];     /* held while the task waits and runs; unused ones are not on a device */
    uint64_t bytes, sequence;
    struct task *next;
};
int stream_card(const struct stream *stream);
uint64_t stream_id(const struct stream *stream);
bool stream_is_stopping(const struct stream *stream);
uint64_t stream_report_thread(const struct stream *stream);
struct stream *stream_of(const void *handle);
/* Takes the task. `reads` and `writes`: user addresses for hazards.c, NULL if none. */
int stream_put(struct stream *stream, struct task task, const void *reads, const void *writes);
uint64_t stream_last_sequence(struct stream *stream);

/* ---- memcpy.c ---- */
int copy_places(const struct place *to, const struct place *from, uint64_t bytes);

#endif
