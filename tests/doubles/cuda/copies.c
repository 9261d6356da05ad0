/* Copies: what is in a stream happens when somebody waits for it, and not before */
#include "double.h"
#include <time.h>

struct operation { uint64_t destination, source, size; struct operation *next; };
struct stream { void *context; struct operation *first, **last; };

static struct stream default_stream = {.last = &default_stream.first};

static char *inside(uint64_t address, uint64_t size) {
    struct allocation *one = find(address);
    return one && address + size <= one->base + one->size ? one->memory + (address - one->base) : NULL;
}

static void wait_for(double seconds) {
    struct timespec time = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&time, NULL);
}

static int run(struct stream *stream) {
    int code = SUCCESS;
    double rate = fault("slow-copy");
    while (stream->first && fault("copy-hangs") >= 0) wait_for(0.05);
    for (struct operation *one; (one = stream->first);) {
        stream->first = one->next;
        if (rate > 0) wait_for((double)one->size / rate);
        if (fault("copy-fails") >= 0) code = ILLEGAL_ADDRESS;
        pthread_mutex_lock(&lock);
        char *destination = inside(one->destination, one->size), *source = inside(one->source, one->size);
        if (!destination || !source)
            code = violation(ILLEGAL_ADDRESS, "a copy of %lu bytes from %#lx to %#lx is not within memory",
                             (unsigned long)one->size, (unsigned long)one->source, (unsigned long)one->destination);
        else if (code == SUCCESS)
            memcpy(destination, source, one->size);
        pthread_mutex_unlock(&lock);
        free(one);
    }
    stream->last = &stream->first;
    return code;
}

API int cuMemcpyAsync(uint64_t destination, uint64_t source, size_t size, struct stream *stream) {
    struct operation *one = calloc(1, sizeof *one);
    if (!stream) stream = &default_stream;
    if (current() < 0) { free(one); return INVALID_CONTEXT; }
    if (stream->context && stream->context != current_context()) {
        free(one);
        return violation(INVALID_HANDLE, "a stream is used in another context");
    }
    *one = (struct operation){destination, source, size, NULL};
    *stream->last = one;
    stream->last = &one->next;
    return SUCCESS;
}

API int cuStreamCreate(struct stream **out, unsigned flags) {
    if (current() < 0 || flags > 1) return INVALID_CONTEXT;
    *out = calloc(1, sizeof **out);
    (*out)->context = current_context();
    (*out)->last = &(*out)->first;
    return SUCCESS;
}

API int cuStreamSynchronize(struct stream *stream) { return run(stream ? stream : &default_stream); }

API int cuStreamDestroy_v2(struct stream *stream) {
    int code = stream->first ? violation(INVALID_HANDLE, "a stream is destroyed with work in it") : SUCCESS;
    free(stream);
    return code;
}

API int cuCtxSynchronize(void) { return current() < 0 ? INVALID_CONTEXT : run(&default_stream); }

static int copy_host(void *host, uint64_t address, size_t size, bool to_host) {
    int code = current() < 0 ? INVALID_CONTEXT : run(&default_stream);
    if (code) return code;
    pthread_mutex_lock(&lock);
    char *memory = inside(address, size);
    if (memory) memcpy(to_host ? host : memory, to_host ? memory : host, size);
    pthread_mutex_unlock(&lock);
    return memory ? SUCCESS : violation(INVALID_VALUE, "%lu bytes at %#lx are not memory", (unsigned long)size,
                                        (unsigned long)address);
}

API int cuMemcpyDtoH_v2(void *host, uint64_t source, size_t size) { return copy_host(host, source, size, true); }
API int cuMemcpyHtoD_v2(uint64_t destination, const void *host, size_t size) {
    return copy_host((void *)host, destination, size, false);
}
