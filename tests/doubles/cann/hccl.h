/* What hccl.c and hccl_meeting.c share. */
#ifndef CANN_DOUBLE_HCCL_H
#define CANN_DOUBLE_HCCL_H

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* The ports of this process on a card, taken once. HCCL_SUCCESS, or what HCCL says of a port that is in use. */
int listen_on_card(int card);
int listen_on_host(int card);
int communicator_create(int card, uint32_t rank, int peer, void **handle);
void attach_descriptor(struct msghdr *message, char *control, size_t control_bytes, int descriptor);
/* Like recv; *descriptor is what came along, or -1. */
ssize_t receive_with_descriptor(int socket, void *content, size_t bytes, int *descriptor);

#endif
