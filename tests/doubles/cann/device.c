/* Cards and contexts. A device index counts what ASCEND_RT_VISIBLE_DEVICES shows to this process; a card is physical. */
#include "double.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static __thread int thread_card = -1;
static bool lost[CARDS];

static int cards(void)
{
    int64_t number = setting_integer("CANN_DOUBLE_CARDS", 8);
    return number < 0 || number > CARDS ? CARDS : (int)number;
}

static int visible(int list[CARDS])
{
    const char *text = setting("ASCEND_RT_VISIBLE_DEVICES", NULL);
    int number = 0;
    if (!text)
        for (; number < cards(); number++) list[number] = number;
    while (text && *text && number < CARDS) {
        char *end;
        long card = strtol(text, &end, 10);
        if (end == text || card < 0 || card >= cards()) break;   /* as the driver: the list ends at its first wrong entry */
        list[number++] = (int)card;
        text = *end == ',' ? end + 1 : end;
    }
    return number;
}

int current_card(void) { return thread_card; }

int card_of_device(int device)
{
    int list[CARDS], number = visible(list);
    return device >= 0 && device < number ? list[device] : -1;
}

int device_of_card(int card)
{
    int list[CARDS], number = visible(list);
    for (int device = 0; device < number; device++)
        if (list[device] == card) return device;
    return -1;
}

bool card_is_lost(int card)
{
    if (card >= 0 && !lost[card] && fault_strikes(FAULT_DEVICE_RESET, card)) lost[card] = true;
    return card >= 0 && lost[card];
}

int enter(int *card)
{
    int code = attach_process();
    if (code) return code;
    if (thread_card < 0) return refuse(ACL_ERROR_RT_CONTEXT_NULL, "this thread has not called aclrtSetDevice");
    if (card_is_lost(thread_card))
        return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "card %d was reset: what this process had on it is gone", thread_card);
    if (card) *card = thread_card;
    return ACL_SUCCESS;
}

API int aclInit(const char *configuration)
{
    (void)configuration;
    return attach_process();
}
API int aclFinalize(void) { return ACL_SUCCESS; }

API int aclrtSetDevice(int32_t device)
{
    int code = attach_process(), card = card_of_device(device);
    if (code) return code;
    if (card < 0) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device);
    if (fault_strikes(FAULT_CARD_UNAVAILABLE, card))
        return refuse(ACL_ERROR_RT_DEV_SETUP_ERROR, "card %d does not start: device setup failed", card);
    if (card_is_lost(card)) return refuse(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "card %d was reset", card);
    thread_card = card;
    return ACL_SUCCESS;
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

API int aclrtGetDeviceCount(uint32_t *number)
{
    int list[CARDS];
    *number = (uint32_t)visible(list);
    return ACL_SUCCESS;
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

API int aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical)
{
    *logical = user;
    return card_of_device(user) < 0 ? refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", user) : ACL_SUCCESS;
}

API int aclrtGetPhyDevIdByLogicDevId(const int32_t logical, int32_t *const physical)
{
    *physical = card_of_device(logical);
    return *physical < 0 ? refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", logical) : ACL_SUCCESS;
}

API int aclrtDeviceGetBareTgid(int32_t *pid)
{
    *pid = bare_tgid();
    return ACL_SUCCESS;
}

API const char *aclrtGetSocName(void) { return setting("CANN_DOUBLE_SOC", "Ascend910B4"); }

API int aclrtDeviceEnablePeerAccess(int32_t device, uint32_t flags)
{
    (void)flags;
    int code = enter(NULL);
    if (code) return code;
    return card_of_device(device) < 0 ? refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device) : ACL_SUCCESS;
}
API int aclrtDeviceDisablePeerAccess(int32_t device) { return aclrtDeviceEnablePeerAccess(device, 0); }

API int rtGetDeviceInfo(uint32_t device, int32_t module, int32_t information, int64_t *value)
{
    (void)module;
    (void)information;
    *value = device;
    return ACL_SUCCESS;
}
