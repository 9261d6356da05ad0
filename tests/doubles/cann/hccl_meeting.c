/* How two ranks find each other: the process that makes the root info listens on a socket in the state directory, both
 * ranks say who they are, and each gets one end of a socket pair. A path reaches other network namespaces too. */
#include "double.h"
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { ROOT_INFO_BYTES = 4108, ROOT_MAGIC_BYTES = 8 };
struct hello { uint32_t ranks, rank; int32_t card; dev_t host_device; ino_t host_inode; };
struct listener { int socket; char path[108]; };

static int64_t connect_ms(void) { return setting_integer("HCCL_CONNECT_TIMEOUT", 120) * 1000; }

/* Sends `answer` and, if it is not negative, a descriptor. */
static void answer(int socket, char answer, int descriptor)
{
    char control[CMSG_SPACE(sizeof descriptor)] = { 0 };
    struct iovec content = { &answer, 1 };
    struct msghdr message = { .msg_iov = &content, .msg_iovlen = 1 };
    if (descriptor >= 0) attach_descriptor(&message, control, sizeof control, descriptor);
    sendmsg(socket, &message, MSG_NOSIGNAL);
}

static bool same_card(const struct hello *one, const struct hello *other)
{
    return one->card == other->card && one->host_device == other->host_device && one->host_inode == other->host_inode;
}

static void introduce(const int sockets[2], const struct hello hellos[2])
{
    int pair[2];
    if (hellos[0].rank == hellos[1].rank || same_card(&hellos[0], &hellos[1])) {
        say("HCCL refuses ranks %u and %u on cards %d and %d: the same rank, or the same card", hellos[0].rank,
            hellos[1].rank, hellos[0].card, hellos[1].card);
        for (int i = 0; i < 2; i++) answer(sockets[i], 'r', -1);
    } else if (!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
        for (int i = 0; i < 2; i++) {
            answer(sockets[i], 'c', pair[i]);
            close(pair[i]);
        }
    }
}

static void *meet(void *argument)
{
    struct listener *listener = argument;
    int sockets[2], met = 0;
    struct hello hellos[2];
    struct pollfd readable = { listener->socket, POLLIN, 0 };
    while (met < 2 && poll(&readable, 1, (int)connect_ms()) == 1) {
        sockets[met] = accept4(listener->socket, NULL, NULL, SOCK_CLOEXEC);
        if (sockets[met] < 0) break;
        if (recv(sockets[met], &hellos[met], sizeof *hellos, 0) == sizeof *hellos)
            met++;
        else
            close(sockets[met]);
    }
    if (met == 2) introduce(sockets, hellos);
    while (met--) close(sockets[met]);
    close(listener->socket);
    unlink(listener->path);
    free(listener);
    return NULL;
}

static int address_of(const char *path, struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){ .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof address->sun_path) return -1;
    memcpy(address->sun_path, path, strlen(path));
    return 0;
}

API int HcclGetRootInfo(char *root)
{
    static int number;
    int card;
    if (enter(&card)) return HCCL_E_PARA;
    int code = listen_on_host(card);
    if (code) return code;
    struct listener *listener = calloc(1, sizeof *listener);
    struct sockaddr_un address;
    char path[512];
    snprintf(path, sizeof path, "%s/h%d.%d", state_directory(), getpid(), __atomic_fetch_add(&number, 1, __ATOMIC_RELAXED));
    listener->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (address_of(path, &address) || bind(listener->socket, (struct sockaddr *)&address, sizeof address) ||
        listen(listener->socket, 4)) {
        say("HCCL cannot listen on %s: %s", path, strerror(errno));
        close(listener->socket);
        free(listener);
        return HCCL_E_NETWORK;
    }
    memcpy(listener->path, path, strlen(path) + 1);
    memset(root, 0, ROOT_INFO_BYTES);
    memcpy(root, "cannroot", ROOT_MAGIC_BYTES);
    memcpy(root + ROOT_MAGIC_BYTES, path, strlen(path));
    pthread_t thread;
    if (pthread_create(&thread, NULL, meet, listener)) return HCCL_E_INTERNAL;
    pthread_detach(thread);
    return HCCL_SUCCESS;
}

static int greet(int socket, uint32_t rank, int card, int *peer)
{
    struct stat host;
    if (stat(state_directory(), &host)) return HCCL_E_INTERNAL;
    struct hello hello = { 2, rank, card, host.st_dev, host.st_ino };
    if (send(socket, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello) return HCCL_E_NETWORK;
    struct pollfd readable = { socket, POLLIN, 0 };
    if (poll(&readable, 1, (int)connect_ms()) != 1) return HCCL_E_TIMEOUT;
    char reply = 0;
    if (receive_with_descriptor(socket, &reply, 1, peer) != 1) return HCCL_E_TIMEOUT;
    return reply == 'c' && *peer >= 0 ? HCCL_SUCCESS : HCCL_E_PARA;
}

API int HcclCommInitRootInfoConfig(uint32_t ranks, const char *root, uint32_t rank, const void *configuration, void **handle)
{
    (void)configuration;
    int card, peer = -1;
    if (enter(&card) || ranks != 2 || rank > 1 || memcmp(root, "cannroot", ROOT_MAGIC_BYTES)) return HCCL_E_PARA;
    double pause = fault_value(FAULT_SLOW_COMMUNICATOR, card, 0);
    if (pause > 0) usleep((useconds_t)(pause * 1e6));
    int code = listen_on_card(card);
    if (code) return code;
    struct sockaddr_un address;
    int meeting = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    code = HCCL_E_NETWORK;
    if (!address_of(root + ROOT_MAGIC_BYTES, &address) && !connect(meeting, (struct sockaddr *)&address, sizeof address))
        code = greet(meeting, rank, card, &peer);
    close(meeting);
    return code ? code : communicator_create(card, rank, peer, handle);
}

API int HcclCommInitRootInfo(uint32_t ranks, const char *root, uint32_t rank, void **handle)
{
    return HcclCommInitRootInfoConfig(ranks, root, rank, NULL, handle);
}
