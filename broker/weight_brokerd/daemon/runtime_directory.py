"""The runtime directory on the broker's side: created, protected, and emptied of sockets at the end."""

from __future__ import annotations

import contextlib
import grp
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from weight_broker.runtime_directory import (
    ATTACH_SOCKET,
    GRPC_SOCKET,
    MAXIMUM_SOCKET_PATH_BYTES,
    is_shared,
    runtime_directory,
)
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.settings import BrokerSettings

_READABLE_BY_OTHERS = 0o006
_OWNER_ONLY = 0o700
_SERVER_SOCKET = "inner.sock"
"""Not longer than the others."""


class RuntimeDirectory:
    """The directory of this broker's sockets."""

    def __init__(self, settings: BrokerSettings) -> None:
        configured = settings.runtime_directory
        self.path = Path(configured) if configured else runtime_directory(serving=True)
        self.grpc_socket = self.path / GRPC_SOCKET
        self.attach_socket = self.path / ATTACH_SOCKET
        self.server_socket = self.path / _SERVER_SOCKET
        """Of the gRPC server behind `grpc_socket`, while the broker starts."""
        self._permissions = settings.socket_permissions
        self._group = grp.getgrnam(settings.socket_group).gr_gid if settings.socket_group else None
        self._shared = bool(configured)

    def prepare(self) -> None:
        """Create the directory if it is missing; raises `StartError`, also if another user could change it."""
        longest = max(len(os.fsencode(self.grpc_socket)), len(os.fsencode(self.attach_socket)))
        if longest > MAXIMUM_SOCKET_PATH_BYTES:
            raise StartError(
                f"{self.path} is too long for sockets in it: their paths have {longest} bytes, the kernel takes "
                f"{MAXIMUM_SOCKET_PATH_BYTES}. Set broker.runtime_directory to a shorter one"
            )
        try:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
                self.path.chmod(self._directory_permissions())
            self._refuse_foreign()
            if self._group is not None and self.path.stat().st_gid != self._group:
                os.chown(self.path, -1, self._group)
        except OSError as error:
            raise StartError(
                f"{self.path} cannot be made ready: {error.strerror}. Make it for uid {os.geteuid()}, or set "
                "broker.runtime_directory"
            ) from error

    def _refuse_foreign(self) -> None:
        found, user = self.path.stat(), os.geteuid()
        if not stat.S_ISDIR(found.st_mode):
            raise StartError(f"{self.path} is no directory. Remove it, or set broker.runtime_directory")
        if found.st_uid not in (0, user):
            raise StartError(
                f"{self.path} belongs to uid {found.st_uid}, who could stand in for this broker of uid {user}. Run "
                f"`chown {user} {self.path}`, run the broker as uid {found.st_uid}, or set broker.runtime_directory"
            )
        if is_shared(found):
            raise StartError(
                f"users beside its owner may write {self.path} ({stat.filemode(found.st_mode)}), and so stand in for "
                f"the broker. Run `chmod go-w {self.path}`, or set broker.runtime_directory to a directory inside it: "
                "the broker makes it"
            )

    @contextlib.contextmanager
    def binding(self, path: Path) -> Iterator[None]:
        """Bind the socket `path` within this block: at no time can a user connect whom the configuration excludes."""
        # Before chown the socket belongs to the broker's own group, whose members may be excluded.
        first = self._permissions if self._group is None else self._permissions & _OWNER_ONLY
        before = os.umask(0o777 & ~first)
        try:
            yield
        finally:
            os.umask(before)
        if self._group is not None:
            os.chown(path, -1, self._group)
            path.chmod(self._permissions)

    @contextlib.contextmanager
    def binding_hidden(self) -> Iterator[None]:
        """Bind a socket within this block that only this user can connect to."""
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)

    def remove_sockets(self) -> None:
        """Remove the sockets; only for the holder of the lock. The directory and the lock file stay."""
        for path in (self.grpc_socket, self.attach_socket, self.server_socket):
            path.unlink(missing_ok=True)

    def _directory_permissions(self) -> int:
        if not self._shared:  # a directory of this user: below $XDG_RUNTIME_DIR or /tmp
            return 0o700
        return 0o755 if self._permissions & _READABLE_BY_OTHERS else 0o750
