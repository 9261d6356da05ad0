/* Three ways to count cards. Physical: the host's. Logical: the container's, which is given some of the host's cards
 * (CANN_DOUBLE_DEVICES="6,3"; without it, all of CANN_DOUBLE_CARDS). Device: what the process sees of those
 * (ASCEND_RT_VISIBLE_DEVICES, a list of logical numbers). */
#include "double.h"

#include <stdlib.h>

/* The numbers below `limit` that a text lists, up to its first wrong entry. */
static int listed(const char *text, long limit, int list[CARDS])
{
    int number = 0;
    while (text && *text && number < CARDS) {
        char *end;
        long entry = strtol(text, &end, 10);
        if (end == text || entry < 0 || entry >= limit) break;
        list[number++] = (int)entry;
        text = *end == ',' ? end + 1 : end;
    }
    return number;
}

static int container(int cards[CARDS])
{
    const char *text = setting("CANN_DOUBLE_DEVICES", NULL);
    if (text) return listed(text, CARDS, cards);
    int64_t number = setting_integer("CANN_DOUBLE_CARDS", 8);
    if (number < 0 || number > CARDS) number = CARDS;
    for (int card = 0; card < number; card++) cards[card] = card;
    return (int)number;
}

/* The list has to ascend without a number twice, or the process sees no device at all.
 * [rt 8.5.0 runtime.cc GetVisibleDevices: RT_ALL_ORDER_ERROR, RT_ALL_DUPLICATED_ERROR] */
static int visible(int logicals[CARDS])
{
    int cards[CARDS], present = container(cards), number;
    const char *text = setting("ASCEND_RT_VISIBLE_DEVICES", NULL);
    if (!text) {
        for (int logical = 0; logical < present; logical++) logicals[logical] = logical;
        return present;
    }
    number = listed(text, present, logicals);
    for (int i = 1; i < number; i++)
        if (logicals[i] <= logicals[i - 1]) return 0;
    return number;
}

int devices_visible(int cards[CARDS])
{
    int physical[CARDS], logicals[CARDS], number = visible(logicals);
    container(physical);
    for (int device = 0; device < number; device++) cards[device] = physical[logicals[device]];
    return number;
}

int card_of_device(int device)
{
    int cards[CARDS], number = devices_visible(cards);
    return device >= 0 && device < number ? cards[device] : -1;
}

int device_of_card(int card)
{
    int cards[CARDS], number = devices_visible(cards);
    for (int device = 0; device < number; device++)
        if (cards[device] == card) return device;
    return -1;
}

int card_of_logical(int logical)
{
    int cards[CARDS], number = container(cards);
    return logical >= 0 && logical < number ? cards[logical] : -1;
}

int logical_of_card(int card)
{
    int cards[CARDS], number = container(cards);
    for (int logical = 0; logical < number; logical++)
        if (cards[logical] == card) return logical;
    return -1;
}

API int aclrtGetDeviceCount(uint32_t *number)
{
    int cards[CARDS];
    *number = (uint32_t)devices_visible(cards);
    return ACL_SUCCESS;
}

static int no_device(int device) { return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device %d", device); }

API int aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical)
{
    int card = card_of_device(user);
    if (card < 0) return no_device(user);
    *logical = logical_of_card(card);
    return ACL_SUCCESS;
}

/* In spite of its name it takes the process's own number, and its inverse gives that one.
 * [rt 8.5.0 to 9.2.0 api_error.cc: ChgUserDevIdToDeviceId comes first] */
API int aclrtGetPhyDevIdByLogicDevId(const int32_t user, int32_t *const physical)
{
    int card = card_of_device(user);
    if (card < 0) return no_device(user);
    *physical = card;
    return ACL_SUCCESS;
}

API int aclrtGetLogicDevIdByPhyDevId(const int32_t physical, int32_t *const user)
{
    int device = device_of_card(physical);
    if (device < 0) return no_device(physical);
    *user = device;
    return ACL_SUCCESS;
}
