"""The directory of the broker's sockets, by a rule that both sides follow.

The first of these: `$WEIGHT_BROKER_RUNTIME_DIRECTORY`; the first entry of `$RUNTIME_DIRECTORY` (systemd);
/run/weight-broker if it can be entered; `$XDG_RUNTIME_DIR/weight-broker`; /tmp/weight-broker-<uid>.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

from weight_broker.errors import BrokerUnavailable

ENVIRONMENT_VARIABLE = "WEIGHT_BROKER_RUNTIME_DIRECTORY"
GRPC_SOCKET = "broker.sock"
ATTACH_SOCKET = "attach.sock"
LOCK_FILE = "lock"
MAXIMUM_SOCKET_PATH_BYTES = 107
"""The kernel's limit for the path of a unix socket, without the terminating zero."""

DENIED_METADATA = "denied"
"""In an error: the file or directory that this process has no permission for."""

_SYSTEM_DIRECTORY = Path("/run/weight-broker")
_TEMPORARY_DIRECTORY = Path("/tmp")


def runtime_directory(*, serving: bool = False) -> Path:
    """The directory with the broker's sockets; it need not exist.

    `serving` is True in the broker. An instance may itself be a systemd service with its own `$RUNTIME_DIRECTORY`, so
    there the variable counts only if a broker's socket is in the directory. Raises `BrokerUnavailable` if another user
    owns the directory below /tmp: the owner could stand in for the broker.
    """
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen)
    if service_directory := os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        directory = Path(service_directory)
        if serving or (directory / ATTACH_SOCKET).exists():
            return directory
    if os.access(_SYSTEM_DIRECTORY, os.X_OK):
        return _SYSTEM_DIRECTORY
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        directory = Path(session) / "weight-broker"
    else:
        directory = _TEMPORARY_DIRECTORY / f"weight-broker-{os.geteuid()}"
        _refuse_foreign(directory)
    if not serving and _SYSTEM_DIRECTORY.exists() and not (directory / ATTACH_SOCKET).exists():
        raise not_admitted(_SYSTEM_DIRECTORY)
    return directory


def refuse_shared(directory: Path) -> None:
    """Raises `BrokerUnavailable` if users beside the directory's owner may write it: they could put their own socket in
    the place of the broker's, and get tokens and memory."""
    try:
        found = directory.stat()
    except OSError:
        return  # the socket in it cannot be reached either, and that says why
    if is_shared(found):
        raise BrokerUnavailable(
            f"users beside its owner may write {directory} ({stat.filemode(found.st_mode)}), and so stand in for the "
            f"broker. Run `chmod go-w {directory}`, or let broker and instances use a directory inside it: the broker "
            f"makes the one that {ENVIRONMENT_VARIABLE} names",
            metadata={"path": str(directory)},
        )


def is_shared(found: os.stat_result) -> bool:
    """Whether the permissions let others than the owner write. An access list shows in those of the group."""
    return bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def not_admitted(path: Path) -> BrokerUnavailable:
    """The error for a socket or directory that this process has no permission for: which group has it, and how to get
    into the group."""
    parents = reversed(path.parents)
    denied = next((parent for parent in parents if not os.access(parent, os.X_OK, effective_ids=True)), path)
    found = denied.stat()
    owner, group, user = _user(found.st_uid), _group(found.st_gid), _user(os.geteuid())
    what = f"no permission for the broker's {denied} ({stat.filemode(found.st_mode)}, {owner}:{group})"
    if found.st_mode & (stat.S_IXGRP if stat.S_ISDIR(found.st_mode) else stat.S_IWGRP):
        advice = f"run `sudo usermod -aG {group} {user}`, log in again (`id` shows the groups) and start it again"
    else:
        advice = f"only {owner} has it; use another runtime directory, or broker.socket_mode of the broker"
    return BrokerUnavailable(f"{what}: {advice}", metadata={DENIED_METADATA: str(denied), "group": group})


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid-{uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid-{gid}"


def _refuse_foreign(directory: Path) -> None:
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or is_shared(found):
        raise BrokerUnavailable(
            f"{directory} is not a directory that only uid {os.geteuid()} can write (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}). Remove it, or set {ENVIRONMENT_VARIABLE}",
            metadata={"path": str(directory)},
        )
