/* Events and notifies. An event may be destroyed while its record waits in a stream, so tasks share its ownership. */
#include "double.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

struct event {
    int owners;
    bool is_set;             /* a notify's flag */
    uint64_t wanted, got;    /* records that were put, and the last one that ran */
    uint64_t stream, sequence;   /* where the last record is */
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static int create(enum handle_kind kind, enum counter counter, void **handle)
{
    int code = enter(NULL);
    if (code) return code;
    struct event *event = calloc(1, sizeof *event);
    event->owners = 1;
    pthread_mutex_init(&event->lock, NULL);
    pthread_cond_init(&event->changed, NULL);
    *handle = handle_create(kind, event);
    count(counter, 1);
    return ACL_SUCCESS;
}

static void give_up(struct event *event)
{
    if (!__atomic_sub_fetch(&event->owners, 1, __ATOMIC_ACQ_REL)) free(event);
}

static int destroy(enum handle_kind kind, enum counter counter, void *handle)
{
    struct event *event = handle_destroy(kind, handle);
    if (!event) return ACL_ERROR_RT_INVALID_HANDLE;
    give_up(event);
    count(counter, -1);
    return ACL_SUCCESS;
}

static void discard(struct task *task) { give_up(task->subject); }

static int put(enum handle_kind kind, void *handle, void *stream_handle, task_function *function)
{
    int code = enter(NULL);
    if (code) return code;
    struct event *event = handle_object(kind, handle);
    struct stream *stream = event ? stream_of(stream_handle) : NULL;
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    __atomic_fetch_add(&event->owners, 1, __ATOMIC_ACQ_REL);
    return stream_put(stream, (struct task){ .run = function, .discard = discard, .subject = event }, NULL, NULL);
}

static void wait_a_little(struct event *event)
{
    struct timespec deadline = deadline_after_ms(100);
    pthread_cond_timedwait(&event->changed, &event->lock, &deadline);
}

/* ---- events ---- */
API int aclrtCreateEvent(void **event) { return create(HANDLE_EVENT, COUNT_EVENTS, event); }
API int aclrtCreateEventWithFlag(void **event, uint32_t flag)
{
    (void)flag;
    return aclrtCreateEvent(event);
}
API int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }
API int aclrtDestroyEvent(void *event) { return destroy(HANDLE_EVENT, COUNT_EVENTS, event); }

static int run_record(struct stream *stream, struct task *task)
{
    struct event *event = task->subject;
    (void)stream;
    pthread_mutex_lock(&event->lock);
    event->got++;
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
    return ACL_SUCCESS;
}

API int aclrtRecordEvent(void *handle, void *stream_handle)
{
    struct event *event = handle_object(HANDLE_EVENT, handle);
    struct stream *stream = event ? stream_of(stream_handle) : NULL;
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    pthread_mutex_lock(&event->lock);
    event->wanted++;
    event->stream = stream_id(stream);
    event->sequence = stream_last_sequence(stream) + 1;
    pthread_mutex_unlock(&event->lock);
    return put(HANDLE_EVENT, handle, stream_handle, run_record);
}

/* Returns whether all records have run within the time; the host then knows what they were recorded after. */
static bool wait_for(struct event *event, int64_t milliseconds)
{
    struct timespec deadline = deadline_after_ms(milliseconds < 0 ? 0 : milliseconds);
    int waited = 0;
    pthread_mutex_lock(&event->lock);
    while (event->got < event->wanted && waited != ETIMEDOUT)
        waited = milliseconds < 0 ? pthread_cond_wait(&event->changed, &event->lock)
                                  : pthread_cond_timedwait(&event->changed, &event->lock, &deadline);
    bool done = event->got >= event->wanted;
    uint64_t stream = event->stream, sequence = event->sequence;
    pthread_mutex_unlock(&event->lock);
    if (done) hazard_synchronised(stream, sequence);
    return done;
}

API int aclrtQueryEventStatus(void *handle, int32_t *status)
{
    struct event *event = handle_object(HANDLE_EVENT, handle);
    if (!event) return ACL_ERROR_RT_INVALID_HANDLE;
    *status = wait_for(event, 0) && event->wanted ? 1 /* ACL_EVENT_RECORDED_STATUS_COMPLETE */ : 0;
    return ACL_SUCCESS;
}

API int aclrtSynchronizeEventWithTimeout(void *handle, int32_t milliseconds)
{
    int code = enter(NULL);
    if (code) return code;
    struct event *event = handle_object(HANDLE_EVENT, handle);
    if (!event) return ACL_ERROR_RT_INVALID_HANDLE;
    if (wait_for(event, milliseconds)) return ACL_SUCCESS;
    return refuse(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, "an event has not happened in %d ms", milliseconds);
}
API int aclrtSynchronizeEvent(void *handle) { return aclrtSynchronizeEventWithTimeout(handle, -1); }

static int run_wait(struct stream *stream, struct task *task)
{
    struct event *event = task->subject;
    pthread_mutex_lock(&event->lock);
    while (event->got < (uint64_t)task->argument && !stream_is_stopping(stream)) wait_a_little(event);
    pthread_mutex_unlock(&event->lock);
    return ACL_SUCCESS;
}

API int aclrtStreamWaitEvent(void *stream_handle, void *handle)
{
    int code = enter(NULL);
    if (code) return code;
    struct event *event = handle_object(HANDLE_EVENT, handle);
    struct stream *stream = event ? stream_of(stream_handle) : NULL;
    if (!stream) return ACL_ERROR_RT_INVALID_HANDLE;
    pthread_mutex_lock(&event->lock);
    uint64_t wanted = event->wanted, other = event->stream, sequence = event->sequence;
    pthread_mutex_unlock(&event->lock);
    __atomic_fetch_add(&event->owners, 1, __ATOMIC_ACQ_REL);
    hazard_joined(stream_id(stream), stream_last_sequence(stream) + 1, other, sequence);
    return stream_put(
        stream, (struct task){ .run = run_wait, .discard = discard, .subject = event, .argument = (void *)wanted }, NULL, NULL);
}

/* ---- notifies: a flag that one task sets and one task waits for and clears ---- */
API int rtNotifyCreate(int32_t device, void **notify)
{
    (void)device;
    return create(HANDLE_NOTIFY, COUNT_NOTIFIES, notify);
}
API int rtNotifyDestroy(void *notify) { return destroy(HANDLE_NOTIFY, COUNT_NOTIFIES, notify); }

static int run_notify_record(struct stream *stream, struct task *task)
{
    struct event *notify = task->subject;
    (void)stream;
    pthread_mutex_lock(&notify->lock);
    notify->is_set = true;
    pthread_cond_broadcast(&notify->changed);
    pthread_mutex_unlock(&notify->lock);
    return ACL_SUCCESS;
}

static int run_notify_wait(struct stream *stream, struct task *task)
{
    struct event *notify = task->subject;
    pthread_mutex_lock(&notify->lock);
    while (!notify->is_set && !stream_is_stopping(stream)) wait_a_little(notify);
    notify->is_set = false;
    pthread_mutex_unlock(&notify->lock);
    return ACL_SUCCESS;
}

API int rtNotifyRecord(void *notify, void *stream) { return put(HANDLE_NOTIFY, notify, stream, run_notify_record); }
API int rtNotifyWait(void *notify, void *stream) { return put(HANDLE_NOTIFY, notify, stream, run_notify_wait); }
