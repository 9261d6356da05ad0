/* Faults on demand: rules on the board, which control.py writes while processes run, and for a process from its start
 * the variable CANN_DOUBLE_FAULTS: "slow_link=30e6;peer_loss_error". */
#include "double.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const names[FAULT_KINDS] = {
    [FAULT_PEER_LOSS_ERROR] = "peer_loss_error",
    [FAULT_PEER_LOST] = "peer_lost",
    [FAULT_SLOW_LINK] = "slow_link",
    [FAULT_CORRUPT_LINK] = "corrupt_link",
    [FAULT_IMPORT_REFUSED] = "import_refused",
    [FAULT_EXPORT_REFUSED] = "export_refused",
    [FAULT_OUT_OF_MEMORY] = "out_of_memory",
    [FAULT_ASYNC_ERROR] = "async_error",
    [FAULT_DEVICE_RESET] = "device_reset",
    [FAULT_CARD_UNAVAILABLE] = "card_unavailable",
    [FAULT_SLOW_COMMUNICATOR] = "slow_communicator",
    [FAULT_NO_PEER_ACCESS] = "no_peer_access",
};

static bool in_environment(enum fault kind, double *value)
{
    size_t length = strlen(names[kind]);
    for (const char *item = setting("CANN_DOUBLE_FAULTS", NULL); item; item = strchr(item, ';')) {
        if (*item == ';') item++;
        if (strncmp(item, names[kind], length)) continue;
        if (item[length] && item[length] != ';' && item[length] != '=') continue;
        if (value && item[length] == '=') *value = strtod(item + length + 1, NULL);
        return true;
    }
    return false;
}

static struct fault_rule *rule_for(enum fault kind, int card)
{
    struct fault_rule *rules = board_faults();
    for (int i = 0; i < FAULTS; i++) {
        struct fault_rule *rule = &rules[i];
        if (__atomic_load_n(&rule->kind, __ATOMIC_ACQUIRE) != (int)kind || !rule->times) continue;
        if (rule->pid && rule->pid != getpid()) continue;
        if (rule->card >= 0 && card >= 0 && rule->card != card) continue;
        return rule;
    }
    return NULL;
}

bool fault_strikes(enum fault kind, int card)
{
    struct fault_rule *rule = rule_for(kind, card);
    if (!rule) return in_environment(kind, NULL);
    int32_t left = __atomic_load_n(&rule->times, __ATOMIC_RELAXED);
    while (left > 0 && !__atomic_compare_exchange_n(&rule->times, &left, left - 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
    return left != 0;
}

double fault_value(enum fault kind, int card, double otherwise)
{
    struct fault_rule *rule = rule_for(kind, card);
    if (rule) return rule->value;
    double value = otherwise;
    in_environment(kind, &value);
    return value;
}
