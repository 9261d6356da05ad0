"""The directory of the broker's sockets, by a rule that both sides follow.

The first of these: `$WEIGHT_BROKER_RUNTIME_DIRECTORY`; the first entry of `$RUNTIME_DIRECTORY` (systemd);
/run/weight-broker if it can be entered; `$XDG_RUNTIME_DIR/weight-broker`; /tmp/weight-broker-<uid>.
"""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

from weight_broker.errors import BrokerUnavailable

ENVIRONMENT_VARIABLE = "WEIGHT_BROKER_RUNTIME_DIRECTORY"
GRPC_SOCKET = "broker.sock"
ATTACH_SOCKET = "attach.sock"
LOCK_FILE = "lock"
MAXIMUM_SOCKET_PATH_BYTES = 107
"""The kernel's limit for the path of a unix socket, without the terminating zero."""

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
        raise _not_admitted(_SYSTEM_DIRECTORY)
    return directory


def _not_admitted(directory: Path) -> BrokerUnavailable:
    found = directory.stat()
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = f"gid {found.st_gid}"
    return BrokerUnavailable(
        f"the host's broker is in {directory}, which uid {os.geteuid()} may not enter. Add the user to group {group} "
        "and start the process again (see `id` and `ls -ld`)",
        metadata={"path": str(directory), "group": group},
    )


def _refuse_foreign(directory: Path) -> None:
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BrokerUnavailable(
            f"{directory} is not a directory that only uid {os.geteuid()} can write (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}). Remove it, or set {ENVIRONMENT_VARIABLE}",
            metadata={"path": str(directory)},
        )
