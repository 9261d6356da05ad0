"""The doctor's checks of the host: what sharing and copying host memory needs."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import resource
from pathlib import Path

from weight_broker.cli.doctor.findings import Finding, ok, problem, warning
from weight_broker.cli.inspector import State
from weight_broker.memory.host.streaming import streaming_copy

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_ENOUGH_FILES = 4096
_ADD_SEALS, _GET_SEALS, _ALL_SEALS = 1033, 1034, 0xF


def findings(state: State | None, huge_pages: Path = _HUGE_PAGES) -> list[Finding]:
    """`huge_pages`: where the kernel tells about them."""
    found = [_memfd(), *_huge(huge_pages), _open_files(), _xxhash(), _compiled_copy(), *_protobuf()]
    if state is not None:
        found += _broker_files(state)
    return found


def _memfd() -> Finding:
    try:
        descriptor = os.memfd_create("weight-broker-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return problem("memfd", f"memfd_create: {error.strerror}", "a newer kernel, or a seccomp filter that allows it")
    try:
        os.truncate(descriptor, 4096)
        fcntl.fcntl(descriptor, _ADD_SEALS, _ALL_SEALS)
        if fcntl.fcntl(descriptor, _GET_SEALS) & _ALL_SEALS != _ALL_SEALS:
            return problem("memfd", "the kernel does not keep seals", "weights cannot be shared on this kernel")
    except OSError as error:
        return problem("memfd", f"sealing: {error.strerror}", "a newer kernel, or a seccomp filter that allows it")
    finally:
        os.close(descriptor)
    return ok("memfd", "memory can be shared and sealed")


def _huge(directory: Path) -> list[Finding]:
    fix = "copies are slower without: `echo {word} > {path}` as root, and in the host's boot configuration"
    found = []
    for name, check, bad, word in (
        ("shmem_enabled", "huge pages, shared", ("deny",), "advise"),
        ("enabled", "huge pages, private", ("never",), "madvise"),
    ):
        path = directory / name
        try:
            chosen = re.search(r"\[(\w+)\]", path.read_text())
        except OSError:
            chosen = None
        if chosen is None:
            found.append(warning(check, f"{path} cannot be read", "the kernel has no transparent huge pages"))
        elif chosen[1] in bad:
            found.append(warning(check, f"{path} is {chosen[1]!r}", fix.format(word=word, path=path)))
        else:
            found.append(ok(check, f"{path} is {chosen[1]!r}"))
    return found


def _open_files() -> Finding:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard != resource.RLIM_INFINITY and hard < _ENOUGH_FILES:
        return warning(
            "open files", f"the hard limit here is {shown}", "a broker started from here needs LimitNOFILE=65536"
        )
    return ok("open files", f"the hard limit here is {shown}")


def _broker_files(state: State) -> list[Finding]:
    """The broker needs two descriptors for each instance and one for each region."""
    host, check = state.host, "broker's open files"
    try:
        limits = Path(f"/proc/{host.pid}/limits").read_text()
        used = len(os.listdir(f"/proc/{host.pid}/fd"))
    except OSError:
        return []  # another user's, or in another pid namespace
    found = re.search(r"^Max open files\s+(\d+)", limits, re.MULTILINE)
    if found is None:
        return []
    limit = int(found[1])
    if used > 0.8 * limit:
        return [problem(check, f"{used} of {limit}", "raise LimitNOFILE= of its unit and restart it")]
    if limit < _ENOUGH_FILES:
        return [warning(check, f"{used} of {limit}", "raise LimitNOFILE= of its unit (65536) and restart it")]
    return [ok(check, f"{used} of {limit}")]


def _xxhash() -> Finding:
    if importlib.util.find_spec("xxhash") is None:
        return warning(
            "xxhash", "not installed here: only a sample of host memory is verified", "pip install xxhash, here too"
        )
    return ok("xxhash", "every byte of host memory can be verified")


def _compiled_copy() -> Finding:
    if streaming_copy() is None:
        return warning(
            "compiled copy",
            "not in this installation: copying host memory and verifying it takes up to twice as long",
            "install the client where there is a C compiler (gcc and libc6-dev)",
        )
    return ok("compiled copy", "host memory is copied past the caches")


def _protobuf() -> list[Finding]:
    name = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
    if os.environ.get(name) != "python":
        return []
    return [warning("protobuf", f"{name}=python makes every message a hundred times slower", "unset it")]
