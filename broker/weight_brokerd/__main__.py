"""`weight-brokerd`: the broker of this host."""

from __future__ import annotations

import argparse
import asyncio
import enum
import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from weight_broker.errors import BrokerError
from weight_brokerd import __version__
from weight_brokerd.config import loading as config
from weight_brokerd.config.errors import StartError
from weight_brokerd.daemon.lock import AlreadyRunningError, RuntimeLock
from weight_brokerd.daemon.runtime_directory import RuntimeDirectory
from weight_brokerd.daemon.standard_files import allow_many_files, open_standard_streams

try:
    from weight_brokerd.telemetry import log
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"weight-brokerd: the package {missing.name} is not installed. Install the daemon's packages: "
        "pip install 'weight-broker[broker]'"
    ) from None


class ExitCode(enum.IntEnum):
    STOPPED = 0
    """A signal stopped the broker."""
    FAILED = 1
    """The broker could not start; the message says why."""
    WRONG_CONFIGURATION = 2
    """A setting or an argument is wrong."""
    ALREADY_RUNNING = 3
    """Another broker has the runtime directory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the broker; returns its exit code."""
    parser = argparse.ArgumentParser(prog="weight-brokerd", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (TOML); WEIGHT_BROKER_SECTION_KEY variables win over it"
    )
    parser.add_argument("--version", action="version", version=f"weight-brokerd {__version__}")
    options = parser.parse_args(arguments)
    open_standard_streams()
    log.take_over_stderr()
    try:
        return _run(options.config)
    finally:
        log.close()


def _run(path: Path | None) -> ExitCode:
    try:
        settings = config.load(path)
    except config.ConfigError as error:
        return _give_up(str(error), ExitCode.WRONG_CONFIGURATION)
    log.configure(settings.log.level, settings.log.format)
    faulthandler.enable(file=log.STDERR)
    allow_many_files()
    try:
        directory = RuntimeDirectory(settings.broker)
        directory.prepare()
        with _lock(directory) as lock:
            asyncio.run(_serve(settings, path, directory, lock), debug=False)
    except AlreadyRunningError as error:
        return _give_up(str(error), ExitCode.ALREADY_RUNNING)
    except (BrokerError, OSError, StartError) as error:
        return _give_up(str(error), ExitCode.FAILED)
    return ExitCode.STOPPED


def _lock(directory: RuntimeDirectory) -> RuntimeLock:
    try:
        return RuntimeLock.take(directory.path)
    except OSError as error:
        raise StartError(
            f"no lock file can be made in {directory.path}: {error.strerror}. It has to be a directory, "
            f"with room in it, that uid {os.geteuid()} can write; or set broker.runtime_directory"
        ) from error


async def _serve(settings: config.Config, path: Path | None, directory: RuntimeDirectory, lock: RuntimeLock) -> None:
    # Set before the import: gRPC's core otherwise writes its own lines to stderr, into the middle of the log, and waits
    # for their reader.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from weight_brokerd.daemon.application import Application

    await Application(settings, directory, lock, reload=lambda: _reload_log_level(path)).run()


def _reload_log_level(path: Path | None) -> None:
    try:
        level = config.load(path).log.level
    except config.ConfigError as error:
        log.logger.error("reload_refused", problems=[str(problem) for problem in error.problems])
        return
    log.set_level(level)
    log.logger.info("reloaded", log_level=level)


def _give_up(message: str, code: ExitCode) -> ExitCode:
    for line in message.splitlines():
        print(f"weight-brokerd: {line}", file=sys.stderr)  # noqa: T201 - people read this, also where the log is JSON
    return code


if __name__ == "__main__":
    sys.exit(main())
