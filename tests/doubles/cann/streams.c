/* A stream is a thread that runs its tasks one after the other. A failed stream runs nothing more, as on the device. */
#include "double.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

struct stream {
    uint64_t id, put, done, report_thread;
    int card, error, waiters;   /* threads that wait for it keep it from being freed */
    bool stopping, ending;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct task *first, *last;
    struct stream *next;
};
static struct stream *streams;
static uint64_t last_id;
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;   /* also: handles of streams, waiters */
static pthread_cond_t waiter_left = PTHREAD_COND_INITIALIZER;

int stream_card(const struct stream *stream) { return stream->card; }
uint64_t stream_id(const struct stream *stream) { return stream->id; }
uint64_t stream_report_thread(const struct stream *stream) { return stream->report_thread; }
bool stream_is_stopping(const struct stream *stream) { return __atomic_load_n(&stream->stopping, __ATOMIC_ACQUIRE); }
struct stream *stream_of(const void *handle) { return handle_object(HANDLE_STREAM, handle); }

uint64_t stream_last_sequence(struct stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    uint64_t sequence = stream->put;
    pthread_mutex_unlock(&stream->lock);
    return sequence;
}

static int run(struct stream *stream, struct task *task)
{
    if (card_is_lost(stream->card)) return ACL_ERROR_RT_DRV_INTERNAL_ERROR;
    if (fault_strikes(FAULT_ASYNC_ERROR, stream->card)) return ACL_ERROR_RT_AICPU_EXCEPTION;
    count(COUNT_TASKS_RUN, 1);
    return task->run(stream, task);
}

static void finish(struct stream *stream, struct task *task)
{
    hazard_task_done(stream->id, task->sequence);
    for (int i = 0; i < TASK_PLACES; i++) place_release(&task->places[i]);
    if (task->discard) task->discard(task);
    free(task);
    count(COUNT_PENDING_TASKS, -1);
}

static void *work(void *argument)
{
    struct stream *stream = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (!stream->first && !stream->ending) pthread_cond_wait(&stream->changed, &stream->lock);
        struct task *task = stream->first;
        if (!task) break;
        if (!(stream->first = task->next)) stream->last = NULL;
        bool skip = stream_is_stopping(stream) || stream->error;
        pthread_mutex_unlock(&stream->lock);
        int error = skip ? ACL_SUCCESS : run(stream, task);
        finish(stream, task);
        pthread_mutex_lock(&stream->lock);
        if (error) {
            stream->error = error;
            say("stream %lu on card %d: a task failed with %d", stream->id, stream->card, error);
        }
        stream->done++;
        pthread_cond_broadcast(&stream->changed);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

int stream_put(struct stream *stream, struct task task, const void *reads, const void *writes)
{
    struct task *queued = malloc(sizeof *queued);
    *queued = task;
    queued->next = NULL;
    for (int i = 0; i < TASK_PLACES; i++) place_hold(&queued->places[i]);
    count(COUNT_PENDING_TASKS, 1);
    pthread_mutex_lock(&stream->lock);
    queued->sequence = ++stream->put;
    if (reads) hazard_read(stream->id, queued->sequence, reads, task.bytes);
    if (writes) hazard_write(stream->id, queued->sequence, writes, task.bytes);
    if (stream->last)
        stream->last->next = queued;
    else
        stream->first = queued;
    stream->last = queued;
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    return ACL_SUCCESS;
}

API int aclrtCreateStream(void **handle)
{
    int card, code = enter(&card);
    if (code) return code;
    struct stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    stream->card = card;
    if (pthread_create(&stream->thread, NULL, work, stream)) {
        free(stream);
        return refuse(ACL_ERROR_RT_INTERNAL_ERROR, "no thread for a stream");
    }
    pthread_mutex_lock(&list_lock);
    stream->id = ++last_id;
    stream->next = streams;
    streams = stream;
    pthread_mutex_unlock(&list_lock);
    *handle = handle_create(HANDLE_STREAM, stream);
    count(COUNT_STREAMS, 1);
    return ACL_SUCCESS;
}

API int aclrtCreateStreamWithConfig(void **handle, uint32_t priority, uint32_t flag)
{
    (void)priority;
    (void)flag;
    return aclrtCreateStream(handle);
}

static int wait_until_done(struct stream *stream, int64_t milliseconds)
{
    struct timespec deadline = deadline_after_ms(milliseconds < 0 ? 0 : milliseconds);
    int waited = 0;
    pthread_mutex_lock(&stream->lock);
    uint64_t upto = stream->put;
    while (stream->done < upto && !stream->error && waited != ETIMEDOUT)
        waited = milliseconds < 0 ? pthread_cond_wait(&stream->changed, &stream->lock)
                                  : pthread_cond_timedwait(&stream->changed, &stream->lock, &deadline);
    int error = stream->error;
    bool late = stream->done < upto;
    pthread_mutex_unlock(&stream->lock);
    if (error) return refuse(error, "stream %lu on card %d has failed", stream->id, stream->card);
    if (late) return refuse(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "stream %lu is not done in %ld ms", stream->id, milliseconds);
    hazard_synchronised(stream->id, upto);
    return ACL_SUCCESS;
}

/* With the list locked, and again when it returns. */
static int wait_for(struct stream *stream, int64_t milliseconds)
{
    stream->waiters++;
    pthread_mutex_unlock(&list_lock);
    int code = wait_until_done(stream, milliseconds);
    pthread_mutex_lock(&list_lock);
    stream->waiters--;
    pthread_cond_broadcast(&waiter_left);
    return code;
}

API int aclrtSynchronizeStreamWithTimeout(void *handle, int32_t milliseconds)
{
    int code = enter(NULL);
    if (code) return code;
    pthread_mutex_lock(&list_lock);
    struct stream *stream = stream_of(handle);
    code = stream ? wait_for(stream, milliseconds) : ACL_ERROR_RT_INVALID_HANDLE;
    pthread_mutex_unlock(&list_lock);
    return code;
}
API int aclrtSynchronizeStream(void *handle) { return aclrtSynchronizeStreamWithTimeout(handle, -1); }

/* Streams are listed by age, newest first, so that the next one can be found by its number after the list was unlocked. */
static struct stream *next_on_card(int card, uint64_t before)
{
    struct stream *stream = streams;
    while (stream && (stream->card != card || stream->id >= before)) stream = stream->next;
    return stream;
}

API int aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds)
{
    int card, code = enter(&card);
    if (code) return code;
    uint64_t before = UINT64_MAX;
    pthread_mutex_lock(&list_lock);
    for (struct stream *stream; !code && (stream = next_on_card(card, before));) {
        before = stream->id;
        code = wait_for(stream, milliseconds);
    }
    pthread_mutex_unlock(&list_lock);
    return code;
}
API int aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(-1); }

API int aclrtStreamQuery(void *handle, int32_t *status)
{
    struct stream *stream = stream_of(handle);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    pthread_mutex_lock(&stream->lock);
    *status = stream->done == stream->put ? 0 /* complete */ : 1;
    uint64_t done = stream->done;
    pthread_mutex_unlock(&stream->lock);
    hazard_synchronised(stream->id, done);
    return ACL_SUCCESS;
}

static int destroy(void *handle, bool at_once)
{
    int code = attach_process();
    if (code) return code;
    pthread_mutex_lock(&list_lock);
    struct stream *stream = handle_destroy(HANDLE_STREAM, handle), **place = &streams;
    while (stream && *place != stream) place = &(*place)->next;
    if (stream) *place = stream->next;
    pthread_mutex_unlock(&list_lock);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    pthread_mutex_lock(&stream->lock);
    stream->ending = true;
    if (at_once) __atomic_store_n(&stream->stopping, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    pthread_join(stream->thread, NULL);
    pthread_mutex_lock(&list_lock);
    while (stream->waiters) pthread_cond_wait(&waiter_left, &list_lock);
    pthread_mutex_unlock(&list_lock);
    hazard_synchronised(stream->id, UINT64_MAX);
    free(stream);
    count(COUNT_STREAMS, -1);
    return ACL_SUCCESS;
}

API int aclrtDestroyStream(void *handle) { return destroy(handle, false); }
API int aclrtDestroyStreamForce(void *handle) { return destroy(handle, true); }

API int aclrtSubscribeReport(uint64_t thread, void *handle)
{
    struct stream *stream = stream_of(handle);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    stream->report_thread = thread;
    return ACL_SUCCESS;
}

API int aclrtUnSubscribeReport(uint64_t thread, void *handle)
{
    struct stream *stream = stream_of(handle);
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    if (stream->report_thread != thread)
        return refuse(ACL_ERROR_RT_THREAD_SUBSCRIBE, "thread %lu does not take this stream's reports", thread);
    stream->report_thread = 0;
    return ACL_SUCCESS;
}
