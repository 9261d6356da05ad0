"""Bounds the gRPC connections of each process. gRPC accepts every connection and does not say whose it is; the kernel
does, for every descriptor of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections import Counter
from pathlib import Path

import structlog

from weight_brokerd.core.conduct.connections import too_many
from weight_brokerd.core.model import Process

INTERVAL_SECONDS = 1.0
_CONNECTED = b"03"
_CREDENTIALS = struct.Struct("iII")
_DESCRIPTORS = Path("/proc/self/fd")

log = structlog.get_logger("weight_brokerd.daemon.connections")


class Connections:
    """The accepted connections of one socket of this process."""

    def __init__(self, path: Path, *, per_process: int, total: int) -> None:
        self._path = os.fsencode(path)
        self._per_process = per_process
        self._total = total

    async def watch(self) -> None:
        """Close what is too many, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            for process, count in (await asyncio.to_thread(self.close_excess)).items():
                log.warning("connections_closed", pid=process.name, uid=process.uid, count=count)

    def close_excess(self) -> Counter[Process]:
        """Close connections; returns how many of which process. Called in a thread."""
        inodes = self._accepted()
        if len(inodes) <= min(self._per_process, self._total):
            return Counter()
        found = _descriptors_of(inodes)
        try:
            owners = {inode: _peer(connection, inode) for inode, connection in found.items()}
            excess = too_many(owners, per_process=self._per_process, total=self._total)
            for inode in excess:
                with contextlib.suppress(OSError):  # the peer was faster
                    found[inode].shutdown(socket.SHUT_RDWR)
            return Counter(owners[inode] for inode in excess)
        finally:
            for connection in found.values():
                connection.close()

    def _accepted(self) -> set[int]:
        """The inodes, which the kernel gives out in rising order."""
        inodes = set()
        with open("/proc/net/unix", "rb") as table:
            for line in table:
                fields = line.split(maxsplit=7)
                if len(fields) == 8 and fields[7].rstrip(b"\n") == self._path and fields[5] == _CONNECTED:
                    inodes.add(int(fields[6]))
        return inodes


def _descriptors_of(inodes: set[int]) -> dict[int, socket.socket]:
    """Duplicates of this process's descriptors of the sockets: gRPC may close its own meanwhile."""
    found: dict[int, socket.socket] = {}
    for entry in os.listdir(_DESCRIPTORS):
        with contextlib.suppress(OSError, ValueError):
            target = os.readlink(_DESCRIPTORS / entry)
            if not target.startswith("socket:[") or int(target[8:-1]) not in inodes:
                continue
            duplicate = os.dup(int(entry))
            inode = os.fstat(duplicate).st_ino  # the number may be of another file by now
            if inode not in inodes or inode in found:
                os.close(duplicate)
                continue
            found[inode] = socket.socket(fileno=duplicate)
    return found


def _peer(connection: socket.socket, inode: int) -> Process:
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Process(uid, str(pid) if pid > 0 else f"connection {inode}")
