/* Counters of one process, in a file that outlives it: STATE/processes/PID. Layout: the magic, the number of counters,
 * then for each its name (24 bytes) and its value (int64). What was done wrong is in STATE/processes/PID.violations. */
#include "double.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *const names[COUNTERS] = {
    [COUNT_ALLOCATIONS] = "allocations",
    [COUNT_ALLOCATED_BYTES] = "allocated_bytes",
    [COUNT_HOST_ALLOCATIONS] = "host_allocations",
    [COUNT_PHYSICAL_HANDLES] = "physical_handles",
    [COUNT_RESERVATIONS] = "reservations",
    [COUNT_MAPPINGS] = "mappings",
    [COUNT_EXPORTS] = "exports",
    [COUNT_IMPORTS] = "imports",
    [COUNT_STREAMS] = "streams",
    [COUNT_EVENTS] = "events",
    [COUNT_NOTIFIES] = "notifies",
    [COUNT_COMMUNICATORS] = "communicators",
    [COUNT_PENDING_TASKS] = "pending_tasks",
    [COUNT_TASKS_RUN] = "tasks_run",
    [COUNT_BYTES_SENT] = "bytes_sent",
    [COUNT_BYTES_RECEIVED] = "bytes_received",
    [COUNT_VIOLATIONS] = "violations",
};
struct entry { char name[24]; int64_t value; };
struct sheet { char magic[8]; uint64_t entries; struct entry entry[COUNTERS]; };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct sheet *sheet;
static int violations_file = -1;
static __thread char recent[1024];

static void open_sheet(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/processes/%d", state_directory(), getpid());
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof *sheet)) {
        say("%s: %s", path, strerror(errno));
        abort();
    }
    sheet = mmap(NULL, sizeof *sheet, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (sheet == MAP_FAILED) abort();
    for (int i = 0; i < COUNTERS; i++) snprintf(sheet->entry[i].name, sizeof sheet->entry[i].name, "%s", names[i]);
    sheet->entries = COUNTERS;
    memcpy(sheet->magic, "CANNDBL1", sizeof sheet->magic);
    strncat(path, ".violations", sizeof path - strlen(path) - 1);
    violations_file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
}

void count(enum counter counter, int64_t by)
{
    pthread_once(&once, open_sheet);
    __atomic_fetch_add(&sheet->entry[counter].value, by, __ATOMIC_RELAXED);
}

static void write_line(int file, const char *prefix, const char *text)
{
    char line[1200];
    int length = snprintf(line, sizeof line, "%s%s\n", prefix, text);
    if (write(file, line, (size_t)length) < 0) return;
}

void say(const char *format, ...)
{
    char prefix[64], text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(prefix, sizeof prefix, "[cann double %d/%ld] ", getpid(), syscall(SYS_gettid));
    write_line(2, prefix, text);
}

int refuse(int code, const char *format, ...)
{
    char text[960];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(recent, sizeof recent, "%s (error %d)", text, code);
    if (setting_integer("CANN_DOUBLE_LOG", 0)) say("%s", recent);
    return code;
}

int violation(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(recent, sizeof recent, format, arguments);
    va_end(arguments);
    count(COUNT_VIOLATIONS, 1);
    write_line(violations_file, "", recent);
    say("VIOLATION: %s", recent);
    return strict() ? code : ACL_SUCCESS;
}

API const char *aclGetRecentErrMsg(void)
{
    static __thread char given[sizeof recent];
    if (!*recent || !runtime_is_initialised()) return NULL;   /* aclInit sets up what has the words [hardware-truth A8] */
    memcpy(given, recent, sizeof given);
    *recent = 0;
    return given;
}
