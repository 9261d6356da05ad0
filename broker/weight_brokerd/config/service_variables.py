"""The variables that Kubernetes (and Docker's links) set for a service: `WEIGHT_BROKER_METRICS_PORT=tcp://10.0.0.7:9400`.

A service named weight-broker-... gets names that begin as the settings' do. They are no settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_ADDRESS = r"(?:tcp|udp|sctp)://.*"
_NUMBER = r"\d{1,5}"
_FORMS = (
    (r".*_SERVICE_HOST", r".*"),
    (r".*_SERVICE_PORT(?:_[A-Z0-9_]+)?", _NUMBER),
    (r".*_PORT", _ADDRESS),
    (r".*_PORT_\d+_(?:TCP|UDP|SCTP)", _ADDRESS),
    (r".*_PORT_\d+_(?:TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
    (r".*_PORT_\d+_(?:TCP|UDP|SCTP)_PORT", _NUMBER),
    (r".*_PORT_\d+_(?:TCP|UDP|SCTP)_ADDR", r".*"),
)


def without_service_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without them."""
    return {name: value for name, value in environment.items() if not _is_of_a_service(name, value)}


def _is_of_a_service(name: str, value: str) -> bool:
    return any(re.fullmatch(form, name) and re.fullmatch(content, value) for form, content in _FORMS)
