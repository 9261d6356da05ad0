/* The ports on which HCCL listens, one of each kind for each process and card: on the card's own network interface 16666,
 * on the host's, in its network namespace, 60000 and the card's number. Whoever comes second fails, unless
 * HCCL_NPU_SOCKET_PORT_RANGE and HCCL_HOST_SOCKET_PORT_RANGE say `auto` or a range with a free port.
 * [hccl docs hccl_env/HCCL_NPU_SOCKET_PORT_RANGE.md, HCCL_HOST_SOCKET_PORT_RANGE.md; users: EJ0003, EI0019] A port is kept
 * until the process ends: when HCCL gives it back is unknown. */
#include "double.h"
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ON_CARD, ON_HOST, KINDS, CARD_PORT = 16666, HOST_PORT = 60000, HOST_PORTS = 32 };
static const char *const variables[KINDS] = { "HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_HOST_SOCKET_PORT_RANGE" };
static bool listening[KINDS][CARDS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t network_namespace(void)
{
    struct stat status;
    return stat("/proc/self/ns/net", &status) ? 0 : (uint64_t)status.st_ino;
}

/* A lock of this process on a file, which is kept open: the kernel gives it back at the process's end. */
static bool take(int kind, int card, int port)
{
    char path[512];
    if (kind == ON_CARD)
        snprintf(path, sizeof path, "%s/port-card%d-%d", state_directory(), card, port);
    else
        snprintf(path, sizeof path, "%s/port-host%lu-%d", state_directory(), network_namespace(), port);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    if (file >= 0 && !fcntl(file, F_SETLK, &whole)) return true;
    if (file >= 0) close(file);
    return false;
}

/* "50000-50010,50020" */
static bool take_one_of(int kind, int card, const char *ranges)
{
    for (const char *at = ranges; at; at = strchr(at, ','), at = at ? at + 1 : NULL) {
        int first, last;
        int parts = sscanf(at, "%d-%d", &first, &last);
        for (int port = first; parts >= 1 && port <= (parts == 2 ? last : first); port++)
            if (take(kind, card, port)) return true;
    }
    return false;
}

static bool listen_on(int kind, int card)
{
    const char *ranges = setting(variables[kind], NULL);
    if (ranges && !strcmp(ranges, "auto")) return true;
    if (ranges) return take_one_of(kind, card, ranges);
    return take(kind, card, kind == ON_CARD ? CARD_PORT : HOST_PORT + card % HOST_PORTS);
}

static bool listens(int kind, int card)
{
    pthread_mutex_lock(&lock);
    bool done = listening[kind][card] || (listening[kind][card] = listen_on(kind, card));
    pthread_mutex_unlock(&lock);
    return done;
}

int listen_on_card(int card)
{
    if (listens(ON_CARD, card)) return HCCL_SUCCESS;
    refuse(HCCL_E_UNAVAIL, "EI0019: the port of card %d, %d by default, is in use by another process; set %s", card, CARD_PORT,
           variables[ON_CARD]);
    return HCCL_E_UNAVAIL;
}

int listen_on_host(int card)
{
    if (listens(ON_HOST, card)) return HCCL_SUCCESS;
    refuse(HCCL_E_TCP_CONNECT, "EJ0003: Failed to bind the IP port. Reason: the port of card %d, %d by default, is in use; set %s",
           card, HOST_PORT + card % HOST_PORTS, variables[ON_HOST]);
    return HCCL_E_TCP_CONNECT;
}
