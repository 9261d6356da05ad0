/* Host callbacks in stream order: a task leaves a report, the thread that subscribed runs it in aclrtProcessReport. */
#include "double.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

struct callback { void (*function)(void *); void *data; bool blocks; };
struct report {
    uint64_t thread, stream, sequence;
    struct callback callback;
    bool done, orphaned;       /* a blocking task waits for `done`, unless its stream was torn down */
    struct report *next;
};
static struct report *reports;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static int run_callback(struct stream *stream, struct task *task)
{
    struct callback *callback = task->subject;
    struct report *report = malloc(sizeof *report), **place = &reports;
    *report = (struct report){ .thread = stream_report_thread(stream), .stream = stream_id(stream),
                               .sequence = task->sequence, .callback = *callback };
    pthread_mutex_lock(&lock);
    while (*place) place = &(*place)->next;
    *place = report;
    pthread_cond_broadcast(&changed);
    while (callback->blocks && !report->done) {
        struct timespec deadline = deadline_after_ms(100);
        pthread_cond_timedwait(&changed, &lock, &deadline);
        if (!stream_is_stopping(stream)) continue;
        report->orphaned = true;
        break;
    }
    bool finished = callback->blocks && report->done;
    pthread_mutex_unlock(&lock);
    if (finished) free(report);
    return ACL_SUCCESS;
}

static void discard(struct task *task) { free(task->subject); }

API int aclrtLaunchCallback(void (*function)(void *), void *data, int32_t block, void *stream_handle)
{
    int code = enter(NULL);
    if (code) return code;
    struct stream *stream = stream_of(stream_handle);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    if (!stream_report_thread(stream))
        return violation(ACL_ERROR_RT_THREAD_SUBSCRIBE, "aclrtLaunchCallback: no thread takes this stream's reports");
    struct callback *callback = malloc(sizeof *callback);
    *callback = (struct callback){ function, data, block == 1 /* ACL_CALLBACK_BLOCK */ };
    return stream_put(stream, (struct task){ .run = run_callback, .discard = discard, .subject = callback }, NULL, NULL);
}

static struct report *take_report(uint64_t thread)
{
    for (struct report **place = &reports; *place; place = &(*place)->next)
        if ((*place)->thread == thread) {
            struct report *report = *place;
            *place = report->next;
            return report;
        }
    return NULL;
}

API int aclrtProcessReport(int32_t milliseconds)
{
    struct timespec deadline = deadline_after_ms(milliseconds < 0 ? 0 : milliseconds);
    struct report *report;
    int waited = 0;
    pthread_mutex_lock(&lock);
    while (!(report = take_report((uint64_t)pthread_self())) && waited != ETIMEDOUT)
        waited = milliseconds < 0 ? pthread_cond_wait(&changed, &lock) : pthread_cond_timedwait(&changed, &lock, &deadline);
    pthread_mutex_unlock(&lock);
    if (!report) return ACL_ERROR_RT_WAIT_TIMEOUT;
    hazard_synchronised(report->stream, report->sequence);
    report->callback.function(report->callback.data);
    pthread_mutex_lock(&lock);
    bool mine = !report->callback.blocks || report->orphaned;
    report->done = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    if (mine) free(report);
    return ACL_SUCCESS;
}
