/* The only part that has to be preloaded: datasystem looks for the device nodes with glob(3), and would find none.
 * In a library of its own, so that a process with this preload has nothing else of the double in it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <glob.h>
#include <string.h>

typedef int glob_function(const char *, int, int (*)(const char *, int), glob_t *);

__attribute__((visibility("default"))) int glob(const char *pattern, int flags, int (*on_error)(const char *, int), glob_t *found)
{
    static const char nodes[] = "/dev/davinci";
    static glob_function *real;
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "glob");
    return real(strncmp(pattern, nodes, sizeof nodes - 1) ? pattern : "/dev/null", flags, on_error, found);
}
