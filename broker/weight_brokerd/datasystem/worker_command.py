"""The command line of the wheel's datasystem_worker, as the wheel's own tool builds it, without that tool."""

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
"""A managed worker listens here: only this host needs it."""
MAXIMUM_SOCKET_DIRECTORY_BYTES = 80
"""The longest unix_domain_socket_dir that the worker takes."""

_PACKAGE = "yr.datasystem"
_PROGRAM = "datasystem_worker"
_DEFAULTS = "worker_config.json"
_OURS = {
    # A later worker has no use for the metadata, which would take 300 MB of disk.
    "rocksdb_write_mode": "none",
    # Memory of a dead client is freed after this time; the default is two minutes.
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
        """Directory of the worker's sockets."""
        return self.directory / "uds"

    @property
    def ready(self) -> Path:
        """File that the worker creates when it serves."""
        return self.directory / "probe" / "ready"

    @property
    def logs(self) -> Path:
        """The worker's logs."""
        return self.directory / "logs"

    @property
    def output(self) -> Path:
        """File of the worker's standard output and error."""
        return self.directory / "output"

    @property
    def temporary(self) -> list[Path]:
        """Files of an earlier worker that must not reach the next one."""
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
    values = {
        **_defaults(root, files),
        **_OURS,
        **dict(argument.removeprefix("--").split("=", 1) for argument in settings.extra_arguments),
        "worker_address": f"{HOST}:{port}",
        "metastore_address": f"{HOST}:{metastore_port}",
        "start_metastore_service": "true",
        "shared_memory_size_mb": str(settings.shared_memory_mb),
    }
    flags = [f"--{name}={value}" for name, value in values.items() if value]
    libraries = root / "lib"
    return [sys.executable, "-I", launch.__file__, str(os.getpid()), str(libraries), str(program), *flags]


def environment() -> dict[str, str]:
    """A minimal environment, without preloads, device settings and variables of the service manager."""
    return {name: os.environ[name] for name in _HANDED_DOWN if name in os.environ}


def _defaults(root: Path, files: WorkerFiles) -> Mapping[str, str]:
    """The wheel's default flags, with paths below the worker's directory."""
    try:
        document = json.loads((root / _DEFAULTS).read_text())
        values = {name: flag.get("value") for name, flag in document.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise NoWheelError(f"{root / _DEFAULTS} cannot be used: {error}. Install {DISTRIBUTION} again") from error
    return {
        name: str(files.directory / str(value).removeprefix("./datasystem/"))
        if str(value).startswith("./")
        else str(value).strip()
        for name, value in values.items()
        if value is not None
    }
