"""The log: one JSON object a line on stderr, or text for people.

Every line has the variables of the calling context (`structlog.contextvars`). Records of other libraries look the same.
Under systemd each line begins with its priority, as in sd-daemon(3); journald removes the prefix.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping

import structlog
from structlog.typing import Processor

# syslog(3): 3 error, 4 warning, 6 informational, 7 debug.
logger = structlog.get_logger("weight_brokerd")
AUDIT_LOGGER = "weight_brokerd.audit"
"""Its records are logged at every level."""

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def configure(level: str, form: str, *, environment: Mapping[str, str] = os.environ) -> None:
    """Sets the log up. `level` is debug, info, warning or error; `form` is json or console."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    renderers: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if form == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(sort_keys=False)]
    )
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )
    handler.setFormatter(_WithPriority(formatter) if _journal_reads_stderr(environment) else formatter)
    handler.addFilter(_is_no_caller_that_left)
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger(AUDIT_LOGGER).setLevel(logging.INFO)
    set_level(level)


def set_level(level: str) -> None:
    """Change the lowest level that is logged."""
    logging.getLogger().setLevel(level.upper())


def _is_no_caller_that_left(record: logging.LogRecord) -> bool:
    """False for gRPC's traceback about a caller that goes away during its answer."""
    kind = record.exc_info[0] if record.exc_info else None
    return not (record.name.startswith("grpc.") and kind is not None and kind.__name__ == "ExecuteBatchError")


class _WithPriority(logging.Formatter):
    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        # A record of several lines (a traceback on the console) is several entries of the journal.
        return "\n".join(prefix + line for line in self._formatter.format(record).splitlines())


def _journal_reads_stderr(environment: Mapping[str, str]) -> bool:
    """Whether stderr is the stream that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))
