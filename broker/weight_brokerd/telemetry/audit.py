"""Audit events: one line in the log for everything that changes what the broker holds, and who did it.

They are told apart by the logger's name, `weight_brokerd.audit`, and logged whatever `log.level` says.
"""

from __future__ import annotations

import structlog

from weight_brokerd.telemetry.log import AUDIT_LOGGER

_log = structlog.get_logger(AUDIT_LOGGER)


def audit(action: str, **details: object) -> None:
    """Records that `action` was done; `details` say by whom and to what (`instance_id`, `publication_id`, ...)."""
    _log.info(action, **details)
