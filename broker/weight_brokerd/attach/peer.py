"""The process at the other end of a unix socket, as the kernel names it, and its pidfd."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from weight_broker.errors import BrokerError, BrokerUnavailable, NotAttached
from weight_brokerd.core.model import Process
from weight_brokerd.processes.start_time import start_time

# Missing from the socket module of Python 3.11; the numbers are those of asm-generic/socket.h.
SO_PEERGROUPS = 59
SO_PEERPIDFD = 77

OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What the kernel says to a broker that may open no more files."""

_CREDENTIALS = struct.Struct("iII")
_INTEGER = struct.Struct("i")
_GROUP_BYTES = 4
# The most that getsockopt of Python reads. A process in more groups than fit counts as a member of none.
_LONGEST_OPTION = 1024


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """The process that connected. Fixed at connect(2): a later setuid or fork does not change it."""

    pid: int
    """In the broker's pid namespace; 0 if the process is not visible there."""
    uid: int
    gid: int
    groups: frozenset[int]
    """All groups: `gid` and the supplementary ones."""


def credentials(connection: socket.socket) -> PeerCredentials:
    """The peer of a connected unix socket."""
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return PeerCredentials(pid, uid, gid, frozenset({gid, *_supplementary_groups(connection)}))


def process_of(connection: socket.socket) -> Process:
    """Whom a connection is counted for: the connection alone where the broker cannot see the process."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Process(uid, str(pid) if pid > 0 else f"connection {os.fstat(connection.fileno()).st_ino}")


def is_pid_seen(process: Process) -> bool:
    """False for a process of `process_of` that stands for one connection."""
    return process.name.isdigit()


def open_pidfd(connection: socket.socket, peer: PeerCredentials) -> int:
    """A pidfd of the peer; the caller closes it. Raises `NotAttached` if there is none or the peer has ended,
    `BrokerUnavailable` if the broker has no descriptor left for it."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, _INTEGER.size)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise _unseen(peer, error) from error
        return _open_pidfd_by_number(connection, peer)
    pidfd: int = _INTEGER.unpack(raw)[0]
    return pidfd


def _supplementary_groups(connection: socket.socket) -> tuple[int, ...]:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _LONGEST_OPTION)
    except OSError:
        return ()
    return struct.unpack(f"{len(raw) // _GROUP_BYTES}I", raw)


def _open_pidfd_by_number(connection: socket.socket, peer: PeerCredentials) -> int:
    """For kernels before 6.5. The kernel may have reused the pid since connect(2), so the process is checked twice."""
    try:
        before = start_time(peer.pid)
        pidfd = os.pidfd_open(peer.pid)
    except (OSError, ValueError) as error:
        raise _unseen(peer, error) from error
    try:
        same_process = before == start_time(peer.pid) and os.stat(f"/proc/{peer.pid}").st_uid == peer.uid
        # While the peer lives its end of the connection is open; after its end the kernel may reuse the pid.
        if not same_process or _ended(pidfd) or _hung_up(connection):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    except (OSError, ValueError) as error:
        os.close(pidfd)
        raise _unseen(peer, error) from error
    return pidfd


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _unseen(peer: PeerCredentials, error: Exception) -> BrokerError:
    number = error.errno if isinstance(error, OSError) else None
    why = os.strerror(number) if number else str(error)
    if number in OUT_OF_FILES:
        return BrokerUnavailable(f"the broker can open no file ({why}): raise its limit (LimitNOFILE)")
    return NotAttached(
        f"the broker cannot watch process {peer.pid} ({why}). If it runs in a container, the broker needs the host's "
        "pid namespace (hostPID: true) or Linux 6.5"
    )
