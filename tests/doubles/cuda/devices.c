/* Which devices there are, in which order, and how they are named.
 *
 * The order of the bus and that of the driver differ, so that an index of one that is used as an index of the other
 * shows. Sources: CUDA C++ programming guide, "CUDA environment variables" (CUDA_VISIBLE_DEVICES takes indexes in the
 * order of CUDA_DEVICE_ORDER, beginnings of "GPU-" UUIDs, and "MIG-" UUIDs; what follows a name that is wrong is
 * hidden; the default order is FASTEST_FIRST); MIG user guide, "CUDA visible devices" (a process sees one instance).
 */
#include "double.h"

static const int fastest_first[CARDS] = {2, 0, 3, 1};

bool initialized;
int visible_count;
struct device visible[CARDS * INSTANCES];

bool is_partitioned(int card) {
    char name[32];
    snprintf(name, sizeof name, "partitioned-%d", card);
    return fault(name) >= 0;
}

static void uuid_of(struct device device, unsigned char *uuid) {
    int first = 0x10 * (device.card + 1) + (device.instance < 0 ? 0 : 0x80 + device.instance);
    for (int index = 0; index < UUID_BYTES; index++) uuid[index] = (unsigned char)(first + index);
}

/* As nvidia-smi -L writes it. */
static void name_of(struct device device, char *name) {
    static const char dashes[] = {4, 6, 8, 10};
    unsigned char uuid[UUID_BYTES];
    uuid_of(device, uuid);
    name += sprintf(name, "%s-", device.instance < 0 ? "GPU" : "MIG");
    for (int index = 0; index < UUID_BYTES; index++) {
        if (memchr(dashes, index, sizeof dashes)) *name++ = '-';
        name += sprintf(name, "%02x", uuid[index]);
    }
}

/* All devices in the order of the driver: of a partitioned card its instances. */
static int enumerate(struct device *devices) {
    const char *order = getenv("CUDA_DEVICE_ORDER");
    bool by_bus = order && !strcmp(order, "PCI_BUS_ID");
    int count = 0;
    for (int index = 0; index < CARDS; index++) {
        int card = by_bus ? index : fastest_first[index];
        if (!is_partitioned(card)) devices[count++] = (struct device){card, -1};
        for (int instance = 0; is_partitioned(card) && instance < INSTANCES; instance++)
            devices[count++] = (struct device){card, instance};
    }
    return count;
}

/* The index in `devices` of what a part of CUDA_VISIBLE_DEVICES names; -1 if it names nothing, or more than one. */
static int named(const char *part, const struct device *devices, int count) {
    char *end, name[64];
    long number = strtol(part, &end, 10);
    if (end != part && !*end) return number >= 0 && number < count ? (int)number : -1;
    bool is_instance = !strncmp(part, "MIG-", 4), is_card = !strncmp(part, "GPU-", 4) && part[4];
    int found = -1;
    for (int index = 0; (is_card || is_instance) && index < count; index++) {
        name_of(devices[index], name);
        if (is_instance ? strcmp(name, part) : strncmp(name, part, strlen(part))) continue;
        if (found >= 0) return -1;
        found = index;
    }
    return found;
}

static bool show(struct device device) {
    for (int index = 0; index < visible_count; index++)
        if (!memcmp(&visible[index], &device, sizeof device)) return false;
    visible[visible_count++] = device;
    return true;
}

static void find_visible(void) {
    struct device devices[CARDS * INSTANCES];
    int count = enumerate(devices), chosen;
    const char *variable = getenv("CUDA_VISIBLE_DEVICES");
    if (!variable) {
        for (int index = 0; index < count; index++) show(devices[index]);
    } else {
        char copy[512], *rest = copy, *part;
        snprintf(copy, sizeof copy, "%s", variable);
        while ((part = strsep(&rest, ",")) && (chosen = named(part, devices, count)) >= 0)
            if (!show(devices[chosen])) { visible_count = 0; return; }  /* named twice: unknown, the worse is assumed */
    }
    for (int index = 0; index < visible_count; index++) {
        if (visible[index].instance < 0) continue;
        visible[0] = visible[index];  /* an instance is seen alone */
        visible_count = 1;
    }
}

API int cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    if (!initialized) find_visible();
    initialized = visible_count > 0;
    pthread_mutex_unlock(&lock);
    return visible_count ? SUCCESS : NO_DEVICE;
}

static const struct { int code; const char *name, *text; } errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {MAP_FAILED_, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {PEER_ACCESS_UNSUPPORTED, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
};

/* cuda.h: a code that the driver does not know is INVALID_VALUE, and the text is NULL. */
static int words(int code, const char **text, bool is_name) {
    for (size_t index = 0; index < sizeof errors / sizeof *errors; index++)
        if (errors[index].code == code) {
            *text = is_name ? errors[index].name : errors[index].text;
            return SUCCESS;
        }
    *text = NULL;
    return INVALID_VALUE;
}

API int cuGetErrorName(int code, const char **text) { return words(code, text, true); }
API int cuGetErrorString(int code, const char **text) { return words(code, text, false); }

static int check(int device) {
    if (!initialized) return NOT_INITIALIZED;
    return device >= 0 && device < visible_count ? SUCCESS : INVALID_DEVICE;
}

API int cuDeviceGetCount(int *count) {
    if (!initialized) return NOT_INITIALIZED;
    *count = visible_count;
    return SUCCESS;
}

API int cuDeviceGet(int *device, int index) {
    int code = check(index);
    if (!code) *device = index;
    return code;
}

/* A partitioned card has its profile in its name: nvidia-smi -L, torch.cuda.get_device_name. */
API int cuDeviceGetName(char *name, int size, int device) {
    int code = check(device);
    if (!code) snprintf(name, (size_t)size, "Double of a GPU%s", visible[device].instance < 0 ? "" : " MIG 1g.5gb");
    return code;
}

/* cuda.h: of an instance it is the instance's own. */
API int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    int code = check(device);
    if (!code) uuid_of(visible[device], uuid);
    return code;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int code = check(device);
    if (code || attribute != 20) return code ? code : INVALID_VALUE;  /* CU_DEVICE_ATTRIBUTE_COMPUTE_MODE */
    *value = fault("exclusive-process") >= 0 ? 3 : 0;                 /* CU_COMPUTEMODE_EXCLUSIVE_PROCESS */
    return SUCCESS;
}

API int cuDeviceCanAccessPeer(int *can, int device, int peer) {
    int code = check(device) ? check(device) : check(peer);
    if (!code) *can = device != peer && fault("no-peer-access") < 0;
    return code;
}

API int cuDriverGetVersion(int *version) {
    *version = 12090;
    return SUCCESS;
}
