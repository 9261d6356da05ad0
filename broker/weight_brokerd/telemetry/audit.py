"""Audit events: one line in the log for every change of what the broker holds, with its author.

Their logger is `weight_brokerd.audit`. They are logged at every `log.level`.
"""

from __future__ import annotations

import structlog

from weight_brokerd.telemetry.log import AUDIT_LOGGER

_log = structlog.get_logger(AUDIT_LOGGER)


def audit(action: str, **details: object) -> None:
    """Record an action; `details` name its author and its object (`instance_id`, `publication_id`, ...)."""
    _log.info(action, **details)
