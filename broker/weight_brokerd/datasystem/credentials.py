"""What the broker's clients of the datasystem prove themselves with. It goes to child processes over their sockets,
never onto a command line, into a variable or into the log."""

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
    """Arguments of the constructors of HeteroClient and KVClient; only those that are set. The files are read now.
    Raises StartError if one cannot be used any more. A file that others may read is told in the log."""
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
