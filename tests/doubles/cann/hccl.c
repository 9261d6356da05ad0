/* Point to point between two ranks. The sender offers its memory piece by piece, as descriptors; the receiver copies it
 * and says when it is done. So a sender's memory has to stay as it is until its task is done, as with RDMA.
 * On hardware the cards end both tasks between them, in microseconds. Here a thread of the sender's has to run first, so
 * that the receiver's task waits for it: who knows that the bytes have arrived may free the memory that they came from. */
#include "double.h"
#include "hccl.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

struct communicator { int card, peer, owners, error; uint32_t rank; };
struct offer { uint64_t total, offset, bytes; };
enum { DONE = 'd', MISMATCH = 'm', ENDED = 'e', ENDED_WITHIN_MS = 10000, CHUNK_BYTES = 8 << 20, SLOW_CHUNK_BYTES = 1 << 18 };

void attach_descriptor(struct msghdr *message, char *control, size_t control_bytes, int descriptor)
{
    message->msg_control = control;
    message->msg_controllen = control_bytes;
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof descriptor);
    memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
}

ssize_t receive_with_descriptor(int socket, void *content, size_t bytes, int *descriptor)
{
    char control[CMSG_SPACE(sizeof *descriptor)] = { 0 };
    struct iovec into = { content, bytes };
    struct msghdr message = { .msg_iov = &into, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = received > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    *descriptor = -1;
    if (header) memcpy(descriptor, CMSG_DATA(header), sizeof *descriptor);
    return received;
}

int communicator_create(int card, uint32_t rank, int peer, void **handle)
{
    struct communicator *communicator = malloc(sizeof *communicator);
    *communicator = (struct communicator){ .card = card, .rank = rank, .peer = peer, .owners = 1 };
    *handle = handle_create(HANDLE_COMMUNICATOR, communicator);
    count(COUNT_COMMUNICATORS, 1);
    return HCCL_SUCCESS;
}

static void give_up(struct communicator *communicator)
{
    if (__atomic_sub_fetch(&communicator->owners, 1, __ATOMIC_ACQ_REL)) return;
    close(communicator->peer);
    free(communicator);
}

/* The engine asks and destroys without looking whether it ever had a communicator: with a peer that died while they met it
   had none. That is an error, as in HCCL, and no violation. */
API int HcclCommDestroy(void *handle)
{
    if (!handle) return HCCL_E_PTR;
    struct communicator *communicator = handle_destroy(HANDLE_COMMUNICATOR, handle);
    if (!communicator) return HCCL_E_PTR;
    shutdown(communicator->peer, SHUT_RDWR);
    give_up(communicator);
    count(COUNT_COMMUNICATORS, -1);
    return HCCL_SUCCESS;
}

API int HcclGetCommAsyncError(void *handle, int32_t *error)
{
    if (!handle) return HCCL_E_PTR;
    struct communicator *communicator = handle_object(HANDLE_COMMUNICATOR, handle);
    if (!communicator) return HCCL_E_PTR;
    *error = __atomic_load_n(&communicator->error, __ATOMIC_ACQUIRE);
    return HCCL_SUCCESS;
}

static int fail(struct communicator *communicator, int error)
{
    __atomic_store_n(&communicator->error, error, __ATOMIC_RELEASE);
    return ACL_ERROR_RT_COPY_DATA;
}

/* A dead peer is not noticed by the device: the task hangs until HCCL_EXEC_TIMEOUT, unless errors were asked for. */
static int lost(struct stream *stream, struct communicator *communicator, const char *what)
{
    bool hangs = !fault_strikes(FAULT_PEER_LOSS_ERROR, communicator->card);
    double until = seconds_now() + (double)setting_integer("HCCL_EXEC_TIMEOUT", 1836);
    say("HCCL %s on card %d: the peer is lost (%s)", what, communicator->card, hangs ? "hanging" : "error");
    while (hangs && !stream_is_stopping(stream) && seconds_now() < until) usleep(20000);
    return fail(communicator, HCCL_E_REMOTE);
}

/* The device copies through buffers of the communicator: memory that is taken away meanwhile faults. */
static int fault(struct communicator *communicator)
{
    say("HCCL on card %d: a page fault: the exporter of the memory is gone", communicator->card);
    card_break(communicator->card);
    shutdown(communicator->peer, SHUT_RDWR);   /* nothing more comes out of it: the other side waits as for a lost peer */
    return fail(communicator, HCCL_E_INTERNAL);
}

enum arrival { ARRIVED, LOST, STOPPED, FAULT };
static enum arrival wait_for_peer(struct stream *stream, struct communicator *communicator, const struct place *place)
{
    struct pollfd readable = { communicator->peer, POLLIN, 0 };
    while (!stream_is_stopping(stream)) {
        if (place_is_dead(place)) return FAULT;
        if (fault_strikes(FAULT_PEER_LOST, communicator->card)) return LOST;
        int ready = poll(&readable, 1, 50);
        if (ready == 1) return readable.revents & POLLIN ? ARRIVED : LOST;
        if (ready < 0 && errno != EINTR) return LOST;
    }
    return STOPPED;
}

static bool peer_is_there(struct communicator *communicator)
{
    struct pollfd state = { communicator->peer, 0, 0 };
    return !fault_strikes(FAULT_PEER_LOST, communicator->card) && poll(&state, 1, 0) == 0;
}

static bool offer_piece(int peer, const struct offer *offer, int descriptor)
{
    char control[CMSG_SPACE(sizeof descriptor)] = { 0 };
    struct iovec content = { (void *)offer, sizeof *offer };
    struct msghdr message = { .msg_iov = &content, .msg_iovlen = 1 };
    attach_descriptor(&message, control, sizeof control, descriptor);
    return sendmsg(peer, &message, MSG_NOSIGNAL) == sizeof *offer;
}

static bool offer_all(struct communicator *communicator, const struct task *task)
{
    const struct place *place = &task->places[0];
    for (uint64_t at = 0; at < task->bytes;) {
        memory_lock();
        struct piece *piece = piece_at(place->range, place->offset + at);
        struct offer offer = { task->bytes, piece->file_offset + place->offset + at - piece->offset, piece->offset + piece->bytes - place->offset - at };
        int descriptor = piece->descriptor;
        memory_unlock();
        if (offer.bytes > task->bytes - at) offer.bytes = task->bytes - at;
        if (!offer_piece(communicator->peer, &offer, descriptor)) return false;
        at += offer.bytes;
    }
    return true;
}

static void discard(struct task *task) { give_up(task->subject); }

static void discard_sent(struct task *task)
{
    struct communicator *communicator = task->subject;
    send(communicator->peer, (char[]){ ENDED }, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    discard(task);
}

static int run_send(struct stream *stream, struct task *task)
{
    struct communicator *communicator = task->subject;
    char reply = 0;
    if (!offer_all(communicator, task)) return lost(stream, communicator, "send");
    enum arrival arrival = wait_for_peer(stream, communicator, &task->places[0]);
    if (arrival == STOPPED) return ACL_SUCCESS;
    if (arrival == FAULT) return fault(communicator);
    if (arrival == LOST || recv(communicator->peer, &reply, 1, 0) != 1) return lost(stream, communicator, "send");
    if (reply != DONE) return fail(communicator, HCCL_E_INTERNAL);
    count(COUNT_BYTES_SENT, (int64_t)task->bytes);
    task->discard = discard_sent;
    return ACL_SUCCESS;
}

static enum arrival copy_piece(struct stream *stream, struct communicator *communicator, const struct place *place, uint64_t done,
                               const struct offer *offer, int descriptor)
{
    char *to = place->alias + done;
    double begun = seconds_now();
    for (uint64_t at = 0; at < offer->bytes;) {
        double limit = fault_value(FAULT_SLOW_LINK, communicator->card, 0);   /* may change meanwhile */
        uint64_t chunk = limit > 0 ? SLOW_CHUNK_BYTES : CHUNK_BYTES;
        if (chunk > offer->bytes - at) chunk = offer->bytes - at;
        if (stream_is_stopping(stream)) return STOPPED;
        if (place_is_dead(place)) return FAULT;
        if (!peer_is_there(communicator)) return LOST;
        ssize_t copied = pread(descriptor, to + at, chunk, (off_t)(offer->offset + at));
        if (copied <= 0) return LOST;
        at += (uint64_t)copied;
        double early = limit > 0 ? (double)at / limit - (seconds_now() - begun) : 0;
        if (early > 0) usleep((useconds_t)((early < 1 ? early : 1) * 1e6));
    }
    return ARRIVED;
}

/* Not for ever: a sender whose process is stopped has sent all the same. What comes later is skipped by the next task. */
static void wait_for_end_of_send(struct stream *stream, struct communicator *communicator)
{
    struct pollfd readable = { communicator->peer, POLLIN, 0 };
    for (int waited = 0; waited < ENDED_WITHIN_MS && !stream_is_stopping(stream); waited += 50)
        if (poll(&readable, 1, 50) == 1) {
            char word;
            recv(communicator->peer, &word, 1, MSG_DONTWAIT);
            return;
        }
}

static int run_receive(struct stream *stream, struct task *task)
{
    struct communicator *communicator = task->subject;
    for (uint64_t at = 0; at < task->bytes;) {
        struct offer offer;
        int descriptor = -1;
        enum arrival arrival = wait_for_peer(stream, communicator, &task->places[0]);
        ssize_t received = arrival == ARRIVED ? receive_with_descriptor(communicator->peer, &offer, sizeof offer, &descriptor) : 0;
        if (received == 1 && *(char *)&offer == ENDED) continue;
        if (arrival == ARRIVED && received != sizeof offer) arrival = LOST;
        if (arrival == ARRIVED && offer.total != task->bytes) {
            say("HCCL: a send of %lu bytes met a receive of %lu bytes", offer.total, task->bytes);
            send(communicator->peer, (char[]){ MISMATCH }, 1, MSG_NOSIGNAL);
            close(descriptor);
            return fail(communicator, HCCL_E_INTERNAL);
        }
        if (arrival == ARRIVED)
            arrival = copy_piece(stream, communicator, &task->places[0], at, &offer, descriptor);
        if (descriptor >= 0) close(descriptor);
        if (arrival == STOPPED) return ACL_SUCCESS;
        if (arrival == FAULT) return fault(communicator);
        if (arrival == LOST) return lost(stream, communicator, "receive");
        at += offer.bytes;
    }
    if (fault_strikes(FAULT_CORRUPT_LINK, communicator->card)) task->places[0].alias[task->bytes / 2] ^= 1;
    count(COUNT_BYTES_RECEIVED, (int64_t)task->bytes);
    if (send(communicator->peer, (char[]){ DONE }, 1, MSG_NOSIGNAL) != 1) return lost(stream, communicator, "receive");
    wait_for_end_of_send(stream, communicator);
    return ACL_SUCCESS;
}

static uint64_t bytes_of(uint64_t elements, int32_t type)
{
    static const uint8_t width[] = { 1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16 };   /* HcclDataType, from int8 to bfp16, int128 */
    return type >= 0 && type < (int32_t)sizeof width ? elements * width[type] : 0;
}

static int put(const char *what, void *buffer, uint64_t bytes, uint32_t peer, void *handle, void *stream_handle,
               task_function *function)
{
    if (enter(NULL)) return HCCL_E_INTERNAL;
    struct communicator *communicator = handle_object(HANDLE_COMMUNICATOR, handle);
    struct stream *stream = communicator ? stream_of(stream_handle) : NULL;
    if (!stream || peer > 1 || peer == communicator->rank || !bytes) return HCCL_E_PARA;
    if (stream_card(stream) != communicator->card &&
        violation(HCCL_E_PARA, "%s: stream of card %d, communicator of card %d", what, stream_card(stream), communicator->card))
        return HCCL_E_PARA;
    struct task task = { .run = function, .discard = discard, .subject = communicator, .bytes = bytes };
    if (locate(what, buffer, bytes, communicator->card, &task.places[0])) return HCCL_E_PARA;
    if (!task.places[0].on_device) {
        violation(0, "%s: %p is not device memory", what, buffer);
        return HCCL_E_PARA;
    }
    __atomic_fetch_add(&communicator->owners, 1, __ATOMIC_ACQ_REL);
    bool sends = function == run_send;
    stream_put(stream, task, sends ? buffer : NULL, sends ? NULL : buffer);
    return HCCL_SUCCESS;
}

API int HcclSend(void *buffer, uint64_t elements, int32_t type, uint32_t peer, void *communicator, void *stream)
{
    return put("HcclSend", buffer, bytes_of(elements, type), peer, communicator, stream, run_send);
}

API int HcclRecv(void *buffer, uint64_t elements, int32_t type, uint32_t peer, void *communicator, void *stream)
{
    return put("HcclRecv", buffer, bytes_of(elements, type), peer, communicator, stream, run_receive);
}
