/* Export keys: each opens a part of a plain allocation; an allocation may have many. A key ends when its exporter closes
 * it or dies, at once and in every process that has opened it. Lists of processes, for keys and for chunks. */
#include "double.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

bool holders_add(struct holder *holders, int pid, int descriptor)
{
    struct holder *free_place = NULL;
    for (int i = 0; i < HOLDERS; i++) {
        struct holder *holder = &holders[i];
        if (holder->handles && holder->pid == pid) {
            holder->handles++;
            return true;
        }
        if (!free_place && (!holder->handles || !process_is_alive(holder->pid))) free_place = holder;
    }
    if (!free_place) return false;
    *free_place = (struct holder){ pid, 1, descriptor };
    return true;
}

void holders_remove(struct holder *holders, int pid)
{
    for (int i = 0; i < HOLDERS; i++)
        if (holders[i].handles && holders[i].pid == pid) holders[i].handles--;
}

int holders_alive(const struct holder *holders, int but)
{
    int alive = 0;
    for (int i = 0; i < HOLDERS; i++)
        if (holders[i].handles && holders[i].pid != but && process_is_alive(holders[i].pid)) alive++;
    return alive;
}

/* Process 0 and the exporter itself are passed over. [drv 9.0.0 svm_shmem_node.c devmm_ipc_node_set_pids_check] */
int whitelist_add(int32_t *whitelist, const int32_t *pids, size_t number)
{
    for (size_t i = 0; i < number; i++) {
        if (!pids[i] || pids[i] == bare_tgid(getpid())) continue;
        int place = 0;
        while (place < HOLDERS && whitelist[place] && whitelist[place] != pids[i]) place++;
        if (place == HOLDERS) return refuse(ACL_ERROR_RT_PARAM_INVALID, "the whitelist has room for %d processes", HOLDERS);
        whitelist[place] = pids[i];
    }
    return ACL_SUCCESS;
}

/* Another card's memory: the runtime documents the flag of aclrtIpcMemImportByKey and aclrtDeviceEnablePeerAccess as two
 * ways to the same; whether one of them is enough in another process than the memory's is not known, so both are needed.
 * [rt 9.0.0 api_impl.cc IpcOpenMemory, raw_device.cc EnableP2PWithOtherDevice; row P6.peer] */
static int may_reach(int card, int here, bool peer_flag)
{
    if (card == here || (peer_flag && reaches_peer(here, card))) return ACL_SUCCESS;
    return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "memory of card %d can only be imported there, not on card %d: no peer access",
                  card, here);
}

int may_import(const int32_t *whitelist, bool any_pid, int exporter, int card, int here, bool peer_flag)
{
    if (fault_strikes(FAULT_IMPORT_REFUSED, here))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "the driver refuses this import");
    if (exporter == getpid())
        return refuse(ACL_ERROR_RT_PARAM_INVALID, "one process may not export and import the same memory");
    int code = may_reach(card, here, peer_flag);
    if (code) return code;
    bool allowed = any_pid;
    for (int i = 0; i < HOLDERS; i++) allowed |= whitelist[i] == bare_tgid(getpid());
    if (!allowed)
        return refuse(ACL_ERROR_RT_NO_PERMISSION, "the bare TGID %d is not on the exporter's whitelist", bare_tgid(getpid()));
    return ACL_SUCCESS;
}

static bool is_open(const struct key *key)
{
    return key->serial && segment_at(key->slot)->serial == key->segment && process_is_alive(key->owner);
}

struct key *key_create(struct segment *segment, uint64_t offset, uint64_t bytes, bool any_pid)
{
    for (int tried = 0; tried < KEYS; tried++) {
        uint64_t serial = board_next_key();
        struct key *key = &board_keys()[serial % KEYS];
        if (is_open(key)) continue;
        *key = (struct key){ .serial = serial, .segment = segment->serial, .offset = offset, .bytes = bytes, .slot = segment_slot(segment),
                             .owner = getpid(), .any_pid = any_pid };
        segment->keys++;
        return key;
    }
    return NULL;
}

bool key_is_closed(uint64_t serial)
{
    const struct key *key = &board_keys()[serial % KEYS];
    return __atomic_load_n(&key->serial, __ATOMIC_ACQUIRE) != serial ||
           __atomic_load_n(&segment_at(key->slot)->serial, __ATOMIC_ACQUIRE) != key->segment;
}

struct key *key_with_serial(uint64_t serial)
{
    struct key *key = &board_keys()[serial % KEYS];
    return key->serial == serial && is_open(key) ? key : NULL;
}

/* TGID, serial, physical card, and two fields that are zero on one machine. [drv 9.0.0 svm_shmem_interprocess.c
 * _devmm_ipc_mem_name_create] */
void key_name(const struct key *key, char name[KEY_BYTES])
{
    snprintf(name, KEY_BYTES, "%08x%016lx%02x%02x%08x", bare_tgid(key->owner), key->serial, segment_at(key->slot)->card, 0, 0);
}

struct key *key_named(const char *name)
{
    unsigned long serial;
    char right[KEY_BYTES];
    if (strnlen(name, KEY_BYTES) != 36 || sscanf(name + 8, "%16lx", &serial) != 1) return NULL;
    struct key *key = key_with_serial(serial);
    if (key) key_name(key, right);
    return key && !strcmp(right, name) ? key : NULL;
}

void key_close(struct key *key)
{
    segment_at(key->slot)->keys--;
    key->serial = 0;
}
