"""The log: one JSON object a line on stderr, or text for people.

Every line has the variables of the calling context (`structlog.contextvars`). Records of other libraries look the same.
Under systemd each line begins with its priority, as in sd-daemon(3); journald removes the prefix.
A line waits for its reader in a queue (`weight_brokerd.telemetry.log_output`): the log stops nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

import structlog
from structlog.typing import Processor

from weight_brokerd.telemetry.log_output import LogOutput, LogStream, encoded

STDERR = 2
# syslog(3): 3 error, 4 warning, 6 informational, 7 debug.
logger = structlog.get_logger("weight_brokerd")
AUDIT_LOGGER = "weight_brokerd.audit"
"""Its records are logged at every level."""

_output = LogOutput(STDERR, lambda count: encoded(f"weight-brokerd: {count} lines dropped: standard error was full"))
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def take_over_stderr() -> None:
    """From now on nothing that Python prints to standard error waits for its reader."""
    sys.stderr = cast(TextIO, LogStream(_output))
    logging.captureWarnings(True)


def lines_dropped() -> int:
    """Lines that are lost: standard error took them too slowly, or not at all."""
    return _output.dropped


def close() -> None:
    """Write what is queued, for at most a second. What is printed later, a last traceback, is written directly."""
    if _output.close():
        sys.stderr = sys.__stderr__


def configure(level: str, form: str, *, environment: Mapping[str, str] = os.environ) -> None:
    """Sets the log up. `level` is debug, info, warning or error; `form` is json or console."""
    of_the_line: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    shared: list[Processor] = [structlog.contextvars.merge_contextvars, *of_the_line]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    renderers: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=os.isatty(STDERR), exception_formatter=structlog.dev.plain_traceback)]
        if form == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(sort_keys=False)]
    )
    handler = _Handler(_output)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )
    handler.setFormatter(_WithPriority(formatter) if _journal_reads_stderr(environment) else formatter)
    handler.addFilter(_is_no_caller_that_left)
    _output.describe_gap = lambda count: encoded(handler.format(_gap(count, of_the_line)))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger(AUDIT_LOGGER).setLevel(logging.INFO)
    set_level(level)


def set_level(level: str) -> None:
    """Change the lowest level that is logged."""
    logging.getLogger().setLevel(level.upper())


class _Handler(logging.Handler):
    """Queues each record's line. `logging` closes it when the process ends."""

    def __init__(self, output: LogOutput) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = encoded(self.format(record))
        except Exception:  # noqa: BLE001 - a record that cannot be formatted, of any library, is shown as that
            self.handleError(record)
        else:
            self._output.write(line)

    def close(self) -> None:
        self._output.close()
        super().close()


def _gap(count: int, processors: Sequence[Processor]) -> logging.LogRecord:
    """The record in the place of so many dropped lines."""
    author = logging.getLogger("weight_brokerd")
    event: Any = {"event": "log_lines_dropped", "count": count}
    for process in processors:
        event = process(author, "warning", event)
    record = logging.LogRecord(author.name, logging.WARNING, "", 0, event, (), None)
    record.__dict__.update(_logger=author, _name="warning")  # as structlog's own records
    return record


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
        found = os.fstat(STDERR)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))
