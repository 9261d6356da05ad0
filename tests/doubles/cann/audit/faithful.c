/* Three functions of the driver as its sources have them, written without the double and put in front of it: each says
 * what the source says, asks the double, and writes down whether that says the same.
 * [rt 8.5.0 aclrtGetLogicDevIdByUserDevId: the user-th visible device; aclrtMallocPhysical: memory attributes of the host
 * are no attributes of a card's memory; drv 9.0.0 svm_master_mem_share.c:148: no whitelist after it was waived] */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
enum { HANDLES = 65536, FIRST_HBM_ATTRIBUTE = 4, INVALID_PARAM = 100000 };
struct properties { uint32_t handle_type, allocation_type, memory_attribute, id, location_type; uint64_t reserved; };
typedef int logical_function(int32_t, int32_t *);
typedef int chunk_function(void **, size_t, const struct properties *, uint64_t);
typedef int share_function(void *, int32_t, uint64_t, uint64_t *);
typedef int admit_function(uint64_t, int32_t *, size_t);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t waived[HANDLES];
static int waived_number;

static void *real(const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) abort();
    return function;
}

static void note(const char *name, bool same)
{
    char line[128];
    int length = snprintf(line, sizeof line, "%s %s\n", name, same ? "same" : "different");
    int file = open(getenv("FAITHFUL_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (file < 0 || write(file, line, (size_t)length) != length) abort();
    close(file);
}

static int32_t visible_at(int32_t user)
{
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!list) return user;
    for (; user > 0 && list; user--) list = strchr(list, ','), list = list ? list + 1 : NULL;
    return list ? (int32_t)strtol(list, NULL, 10) : -1;
}

API int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logical)
{
    int code = ((logical_function *)real(__func__))(user, logical);
    int32_t faithful = visible_at(user);
    note(__func__, code ? faithful < 0 : *logical == faithful);
    if (!code) *logical = faithful;
    return code;
}

API int aclrtMallocPhysical(void **handle, size_t size, const struct properties *properties, uint64_t flags)
{
    int code = ((chunk_function *)real(__func__))(handle, size, properties, flags);
    bool refused = properties->memory_attribute < FIRST_HBM_ATTRIBUTE;
    note(__func__, !refused || code == INVALID_PARAM);
    return refused ? INVALID_PARAM : code;
}

API int aclrtMemExportToShareableHandle(void *handle, int32_t type, uint64_t flags, uint64_t *shareable)
{
    int code = ((share_function *)real(__func__))(handle, type, flags, shareable);
    pthread_mutex_lock(&lock);
    if (!code && flags & 1 && waived_number < HANDLES) waived[waived_number++] = *shareable;
    pthread_mutex_unlock(&lock);
    return code;
}

API int aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t *pids, size_t number)
{
    int code = ((admit_function *)real(__func__))(shareable, pids, number);
    bool refused = false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < waived_number; i++) refused |= waived[i] == shareable;
    pthread_mutex_unlock(&lock);
    note(__func__, !refused || code);
    return refused && !code ? INVALID_PARAM : code;
}
