"""The doctor's checks of the broker: can this process reach it, and how is it?"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import stat
from pathlib import Path

from weight_broker._version import __version__
from weight_broker.cli import status
from weight_broker.cli.doctor.findings import Finding, ok, problem, warning
from weight_broker.cli.inspector import Inspector, State
from weight_broker.errors import BrokerError
from weight_broker.runtime_directory import (
    ATTACH_SOCKET,
    ENVIRONMENT_VARIABLE,
    GRPC_SOCKET,
    refuse_shared,
    runtime_directory,
)

_START = "start one: `systemctl start weight-broker`, or `weight-brokerd &`"


def findings(given: Path | None, timeout: float) -> tuple[list[Finding], State | None]:
    """What was found, and the broker's state if it answers."""
    try:
        directory = given if given is not None else runtime_directory()
    except BrokerError as error:
        return [problem("runtime directory", error.message, f"follow that, or set {ENVIRONMENT_VARIABLE}")], None
    found = [_directory(directory)]
    if found[0].fix:
        return found, None
    found += [_socket(directory / name) for name in (GRPC_SOCKET, ATTACH_SOCKET)]
    if any(entry.fix for entry in found):
        return found, None
    found.append(_attach(directory, timeout))
    try:
        with Inspector(directory, timeout) as inspector:
            state = inspector.state(transfer_limit=1)
    except BrokerError as error:
        found.append(problem("broker", f"it does not answer: {error.message}", "see its log; then restart it"))
        return found, None
    return [*found, *_broker(state)], state


def _directory(directory: Path) -> Finding:
    name = "runtime directory"
    other = f"or set {ENVIRONMENT_VARIABLE} to the directory of the broker that is meant"
    try:
        found = directory.stat()
    except FileNotFoundError:
        return problem(name, f"{directory} does not exist: no broker has run there", f"{_START}; {other}")
    except PermissionError:
        return problem(name, f"{directory} cannot be looked at by uid {os.geteuid()}", f"see `ls -ld`; {other}")
    if not stat.S_ISDIR(found.st_mode):
        return problem(name, f"{directory} is not a directory", f"remove it; {other}")
    if not os.access(directory, os.X_OK):
        return problem(name, f"uid {os.geteuid()} may not enter {_described(directory)}", _join(found.st_gid))
    try:
        refuse_shared(directory)
    except BrokerError as error:
        return problem(name, error.message, f"follow that; {other}")
    return ok(name, _described(directory))


def _socket(path: Path) -> Finding:
    name = "gRPC socket" if path.name == GRPC_SOCKET else "attach socket"
    if not path.is_socket():
        return problem(name, f"{path} is not there: no broker runs in this directory", _START)
    if not os.access(path, os.W_OK):
        return problem(name, f"uid {os.geteuid()} may not use {_described(path)}", _join(path.stat().st_gid))
    kind = socket.SOCK_STREAM if path.name == GRPC_SOCKET else socket.SOCK_SEQPACKET
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return problem(name, f"nobody listens at {path}: a broker that was killed left it behind", _START)
        except OSError as error:
            return problem(name, f"{path}: {error.strerror}", "see `ls -l` and the broker's log")
    return ok(name, _described(path))


def _attach(directory: Path, timeout: float) -> Finding:
    """Whether the broker takes this process for an instance; it is one for a moment."""
    from weight_broker.connection.attach import AttachConnection

    connection = AttachConnection(directory / ATTACH_SOCKET, "weight-broker doctor")
    try:
        connection.connect(timeout)
        connection.goodbye()
    except BrokerError as error:
        return problem("attach", f"{error.message} ({error.reason})", "see docs/ERRORS.md for the reason")
    finally:
        connection.close()
    return ok("attach", f"the broker attaches processes of uid {os.geteuid()}")


def _broker(state: State) -> list[Finding]:
    host = state.host
    found = [ok("broker", status.host_line(host))]
    if host.version != __version__:
        found.append(
            warning(
                "version",
                f"the broker is {host.version}, this client {__version__}",
                "upgrade the older one and restart; both go on working where neither needs what the other has not",
            )
        )
    else:
        found.append(ok("version", f"broker and client are {__version__}"))
    if host.draining:
        found.append(
            warning("draining", "the broker grants no new work; loaders read the disk", "restart it to end the drain")
        )
    if host.waiting_acquisition_count and not host.cold_load_lease_count:
        found.append(
            warning(
                "waiting",
                f"{host.waiting_acquisition_count} acquisitions wait although nobody loads",
                "all reader slots are taken; see `weight-broker status`, and limits.readers_per_publication",
            )
        )
    quarantined = [
        entry
        for weight_set in state.weight_sets
        for entry in weight_set.publications
        if entry.state == entry.STATE_QUARANTINED
    ]
    if quarantined:
        found.append(
            warning(
                "quarantine",
                f"{len(quarantined)} publications are set aside, the first: {quarantined[0].quarantine_reason}",
                "find out why (bad memory?) and restart their instances; see `weight-broker status`",
            )
        )
    return found


def _described(path: Path) -> str:
    found = path.stat()
    owner, group = _name(found.st_uid, user=True), _name(found.st_gid, user=False)
    return f"{path} ({stat.filemode(found.st_mode)}, {owner}:{group})"


def _join(gid: int) -> str:
    return f"add the user to group {_name(gid, user=False)} and start the process anew (see `id`)"


def _name(number: int, *, user: bool) -> str:
    try:
        return pwd.getpwuid(number).pw_name if user else grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
