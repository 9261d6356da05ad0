"""Credentials of the broker's datasystem clients. They reach child processes over sockets, never by a command line, an
environment variable or the log."""

from __future__ import annotations

import os
import stat

import structlog

from weight_brokerd.config.errors import StartError
from weight_brokerd.config.rules import UnfitValueError, read_secret
from weight_brokerd.config.settings import DatasystemSettings

log = structlog.get_logger()
_FILES = (
    "client_public_key",
    "client_private_key",
    "server_public_key",
    "access_key",
    "secret_key",
    "token",
)
"""Arguments of the client whose settings name a file."""
_PUBLIC = {"client_public_key", "server_public_key"}
_READABLE_BY_OTHERS = 0o044


def credentials(settings: DatasystemSettings) -> dict[str, str]:
    """Arguments for the constructor of HeteroClient; only configured ones. Reads the files now. Raises StartError if a
    file has become unusable. Logs a warning about a secret that others may read."""
    arguments = {"tenant_id": settings.tenant_id} if settings.tenant_id else {}
    for argument in _FILES:
        path = getattr(settings, f"{argument}_file")
        if not path:
            continue
        try:
            arguments[argument] = read_secret(path)
            mode = os.stat(path).st_mode
        except (OSError, UnfitValueError) as error:
            raise StartError(f"datasystem.{argument}_file: {path} cannot be used any more: {error}") from error
        if argument not in _PUBLIC and mode & _READABLE_BY_OTHERS:
            log.warning(
                "secret_readable_by_others",
                setting=f"datasystem.{argument}_file",
                path=path,
                mode=stat.filemode(mode),
                fix=f"chmod go= {path}",
            )
    return arguments
