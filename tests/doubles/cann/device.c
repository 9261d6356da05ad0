/* Contexts: a thread's current card, and what ends a process's use of a card for good. */
#include "double.h"

#include <unistd.h>

enum { HEALTHY, RESET, FAULTED };
static __thread int thread_card = -1;
static int state_of[CARDS];

int current_card(void) { return thread_card; }

bool card_is_lost(int card)
{
    if (card < 0) return false;
    if (state_of[card] == HEALTHY && fault_strikes(FAULT_DEVICE_RESET, card)) state_of[card] = RESET;
    return state_of[card] != HEALTHY;
}

/* What a page fault on the device does to the process's context is not in the public sources: the worse is assumed, that
 * the process can do nothing more with the card. [hardware-truth B1; rows P7, P8] */
void card_break(int card) { state_of[card] = FAULTED; }

int card_lost_code(int card, const char *what)
{
    if (state_of[card] == RESET)
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "%s: card %d was reset: what this process had on it is gone", what, card);
    return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR,
                  "%s: a page fault on card %d: memory was used that its exporter no longer shares; this process can do nothing more with the card",
                  what, card);
}

int enter(int *card)
{
    int code = use_runtime("a call of the runtime");
    if (code) return code;
    if (thread_card < 0) return refuse(ACL_ERROR_RT_CONTEXT_NULL, "this thread has not called aclrtSetDevice");
    if (card_is_lost(thread_card)) return card_lost_code(thread_card, "a call of the runtime");
    if (card) *card = thread_card;
    return ACL_SUCCESS;
}

API int aclrtSetDevice(int32_t device)
{
    int code = use_runtime("aclrtSetDevice"), card = card_of_device(device);
    if (code) return code;
    if (card < 0) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device);
    if (fault_strikes(FAULT_CARD_UNAVAILABLE, card))
        return refuse(ACL_ERROR_RT_DEV_SETUP_ERROR, "card %d does not start: device setup failed", card);
    if (card_is_lost(card)) return card_lost_code(card, "aclrtSetDevice");
    board_lock();
    code = card_occupy(card);
    board_unlock();
    if (!code) thread_card = card;
    return code;
}

API int aclrtResetDevice(int32_t device)
{
    if (card_of_device(device) < 0) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device);
    if (thread_card == card_of_device(device)) thread_card = -1;
    return ACL_SUCCESS;
}
API int aclrtResetDeviceForce(int32_t device) { return aclrtResetDevice(device); }

API int aclrtGetDevice(int32_t *device)
{
    int code = enter(NULL);
    if (!code) *device = device_of_card(thread_card);
    return code;
}

API int aclrtQueryDeviceStatus(int32_t device, int32_t *status)
{
    if (card_of_device(device) < 0) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device);
    *status = card_is_lost(card_of_device(device)) ? 1 : 0;
    return ACL_SUCCESS;
}

/* A context is its card; the handle only has to be told from a device index. */
static void *context_of(int card) { return (void *)(0x43L << 32 | (card + 1)); }

API int aclrtGetCurrentContext(void **context)
{
    int code = enter(NULL);
    if (!code) *context = context_of(thread_card);
    return code;
}

API int aclrtSetCurrentContext(void *context)
{
    int code = attach_process(), card = (int)((intptr_t)context & 0xffff) - 1;
    if (code) return code;
    if (card < 0 || context != context_of(card)) return violation(ACL_ERROR_RT_CONTEXT_NULL, "%p is not a context", context);
    thread_card = card;
    return ACL_SUCCESS;
}

API int aclrtCreateContext(void **context, int32_t device)
{
    int code = aclrtSetDevice(device);
    if (!code) *context = context_of(thread_card);
    return code;
}
API int aclrtDestroyContext(void *context)
{
    (void)context;
    return ACL_SUCCESS;
}

API int aclrtDeviceGetBareTgid(int32_t *pid)
{
    *pid = bare_tgid(getpid());
    return ACL_SUCCESS;
}

API const char *aclrtGetSocName(void) { return setting("CANN_DOUBLE_SOC", "Ascend910B4"); }

/* Of the current card to another one: in one direction, in this process. A card is no peer of its own.
 * [rt 8.5.0 to 9.2.0 aclrt_impl/memory.cpp] */
static _Atomic uint64_t peers_of[CARDS];

bool reaches_peer(int card, int peer)
{
    return (peers_of[card] >> peer & 1) && !fault_strikes(FAULT_NO_PEER_ACCESS, card);
}

static int not_a_peer(int32_t device)
{
    return refuse(ACL_ERROR_INVALID_PARAM, "device %d is asked for peer access to itself", device);
}

static int find_peer(int32_t device, int *card, int *peer)
{
    int code = enter(card);
    *peer = card_of_device(device);
    if (code) return code;
    if (*peer < 0) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device);
    return *card == *peer ? not_a_peer(device) : ACL_SUCCESS;
}

API int aclrtDeviceEnablePeerAccess(int32_t device, uint32_t flags)
{
    if (flags) return refuse(ACL_ERROR_FEATURE_UNSUPPORTED, "aclrtDeviceEnablePeerAccess: flags %u", flags);
    int card, peer, code = find_peer(device, &card, &peer);
    if (code) return code;
    if (fault_strikes(FAULT_NO_PEER_ACCESS, card))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "card %d has no peer access to card %d", card, peer);
    peers_of[card] |= 1ULL << peer;
    return ACL_SUCCESS;
}

API int aclrtDeviceDisablePeerAccess(int32_t device)
{
    int card, peer, code = find_peer(device, &card, &peer);
    if (!code) peers_of[card] &= ~(1ULL << peer);
    return code;
}
API int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer)
{
    if (device == peer) return not_a_peer(device);
    if (card_of_device(device) < 0 || card_of_device(peer) < 0)
        return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d or %d", device, peer);
    *can = 1;
    return ACL_SUCCESS;
}

API int rtGetDeviceInfo(uint32_t device, int32_t module, int32_t information, int64_t *value)
{
    (void)module;
    (void)information;
    *value = device;
    return ACL_SUCCESS;
}
