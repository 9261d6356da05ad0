"""How the wheel's datasystem_worker is called: as the wheel's own tool does it, without running that tool."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weight_broker.drivers.ascend_requirements import wheel_hindrance
from weight_brokerd.config.settings import DatasystemSettings
from weight_brokerd.datasystem import launch

DISTRIBUTION = "openyuanrong-datasystem"
HOST = "127.0.0.1"
"""Where a managed worker listens: nobody but this host needs it."""
MAXIMUM_SOCKET_DIRECTORY_BYTES = 80
"""What the worker takes as unix_domain_socket_dir."""

_PACKAGE = "yr.datasystem"
_PROGRAM = "datasystem_worker"
_DEFAULTS = "worker_config.json"
_OURS = {
    # The metadata of one worker alone is worth nothing to the next one. On the disk it would take 300 MB.
    "rocksdb_write_mode": "none",
    # What a client had is given back when the client died; two minutes are the default.
    "client_dead_timeout_s": "30",
    # MB, of each log; five files of 400 are the default.
    "max_log_size": "50",
    "max_log_file_num": "3",
}
_TEMPORARY = ("rocksdb", "uds", "probe")
_HANDED_DOWN = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "HOME")


class NoWheelError(Exception):
    """The datasystem's wheel is not here or not usable; the text says what to do."""


@dataclass(frozen=True, slots=True)
class WorkerFiles:
    """The files of a managed worker, all in one directory."""

    directory: Path

    @property
    def sockets(self) -> Path:
        """Where the worker's sockets are."""
        return self.directory / "uds"

    @property
    def ready(self) -> Path:
        """Made by the worker when it serves."""
        return self.directory / "probe" / "ready"

    @property
    def logs(self) -> Path:
        """The worker's logs."""
        return self.directory / "logs"

    @property
    def output(self) -> Path:
        """What the worker writes to its standard output and error."""
        return self.directory / "output"

    @property
    def temporary(self) -> list[Path]:
        """What a worker leaves behind and the next one does not want."""
        return [self.directory / name for name in _TEMPORARY]


def wheel() -> Path:
    """The directory of the installed wheel's files. Nothing of it is loaded. Raises NoWheelError."""
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(_PACKAGE)
    except ImportError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise NoWheelError(
            f"the package {DISTRIBUTION} is not installed in {sys.prefix}: run pip install {DISTRIBUTION} there (there "
            "are wheels for Python 3.9 to 3.11, and 3.12 on x86_64), or set datasystem.managed = false"
            + (f". {hindrance}" if (hindrance := wheel_hindrance()) else "")
        )
    return Path(spec.submodule_search_locations[0])


def command(
    root: Path, settings: DatasystemSettings, files: WorkerFiles, *, port: int, metastore_port: int
) -> list[str]:
    """The command line of a worker of the wheel in `root`, which ends with this process. Raises NoWheelError."""
    program = root / _PROGRAM
    if not os.access(program, os.X_OK):
        raise NoWheelError(f"{program} is not there or cannot be executed: install {DISTRIBUTION} again")
    given = {
        **_defaults(root, files),
        **_OURS,
        **dict(argument.removeprefix("--").split("=", 1) for argument in settings.extra_arguments),
        "worker_address": f"{HOST}:{port}",
        "metastore_address": f"{HOST}:{metastore_port}",
        "start_metastore_service": "true",
        "shared_memory_size_mb": str(settings.shared_memory_mb),
    }
    flags = [f"--{name}={value}" for name, value in given.items() if value]
    libraries = root / "lib"
    return [sys.executable, "-I", launch.__file__, str(os.getpid()), str(libraries), str(program), *flags]


def environment() -> dict[str, str]:
    """Little: a worker has no device, wants no preload, and none of it is about the service manager."""
    return {name: os.environ[name] for name in _HANDED_DOWN if name in os.environ}


def _defaults(root: Path, files: WorkerFiles) -> Mapping[str, str]:
    """The wheel's own, with its paths below our directory."""
    try:
        document = json.loads((root / _DEFAULTS).read_text())
        values = {name: one.get("value") for name, one in document.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise NoWheelError(f"{root / _DEFAULTS} cannot be used: {error}. Install {DISTRIBUTION} again") from error
    return {
        name: str(files.directory / str(value).removeprefix("./datasystem/"))
        if str(value).startswith("./")
        else str(value).strip()
        for name, value in values.items()
        if value is not None
    }
