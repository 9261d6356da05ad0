/* Settings from the environment, each read when it is used. */
#include "double.h"

#include <stdlib.h>
#include <string.h>

const char *setting(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

int64_t setting_integer(const char *name, int64_t otherwise)
{
    const char *value = setting(name, NULL);
    return value ? strtoll(value, NULL, 0) : otherwise;
}

bool release_is_below(int release)
{
    return strtod(setting("CANN_DOUBLE_RELEASE", "8.5"), NULL) * 100 < release - 0.5;
}

bool strict(void) { return setting_integer("CANN_DOUBLE_STRICT", 1) != 0; }

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

struct timespec deadline_after_ms(int64_t milliseconds)
{
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    int64_t nanoseconds = deadline.tv_nsec + milliseconds % 1000 * 1000000;
    deadline.tv_sec += milliseconds / 1000 + nanoseconds / 1000000000;
    deadline.tv_nsec = nanoseconds % 1000000000;
    return deadline;
}
