/* The state directory: faults, and what callers did wrong. */
#include "double.h"
#include <stdarg.h>

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *state(void) {
    const char *directory = getenv("CUDA_DOUBLE_STATE");
    return directory ? directory : "/tmp";
}

void path_of(char *path, size_t size, const char *format, ...) {
    va_list arguments;
    int length = snprintf(path, size, "%s/", state());
    va_start(arguments, format);
    vsnprintf(path + length, size - length, format, arguments);
    va_end(arguments);
}

/* A caller's bug: it is written down, and the call fails. */
int violation(int code, const char *format, ...) {
    char path[512], text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    path_of(path, sizeof path, "violations");
    FILE *file = fopen(path, "a");
    if (file) { fprintf(file, "%d: %s\n", getpid(), text); fclose(file); }
    return code;
}

/* The value of a fault, -1 if it is not set: a file of that name. */
double fault(const char *name) {
    char path[512];
    double value = 0;
    path_of(path, sizeof path, "fault-%s", name);
    FILE *file = fopen(path, "r");
    if (!file) return -1;
    if (fscanf(file, "%lf", &value) != 1) value = 0;
    fclose(file);
    return value;
}
