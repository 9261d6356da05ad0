"""Weight broker: an inference instance's weights, filled from a running peer instead of from disk.

Importing this package, and creating a `BrokerClient`, is cheap: gRPC, protobuf and tensor libraries are imported when
they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from weight_broker._version import __version__ as __version__

if TYPE_CHECKING:
    from weight_broker.client import BrokerClient
    from weight_broker.digest import DigestCoverage
    from weight_broker.errors import (
        AcquireTimeout,
        BrokerError,
        BrokerUnavailable,
        DrainTimeout,
        IntegrityError,
        InvalidArgument,
        LayoutMismatch,
        LeaseLost,
        LoadGroupFailed,
        NotAdministrator,
        NotAttached,
        PublicationNotFound,
        PublishRefused,
        Reason,
        RetractTimeout,
        TransferFailed,
        WeightsNotFound,
    )
    from weight_broker.key import ParallelRank, Role, Stage, WeightSetKey
    from weight_broker.layout import Layout, MemoryFormat, TensorSpec
    from weight_broker.load_group import LoadGroup
    from weight_broker.transfers.lease import ColdLoadLease
    from weight_broker.transfers.publication import Publication
    from weight_broker.transfers.report import AcquireReport, AttachedTensors, LoadReport


_HOMES = {
    "client": ("BrokerClient",),
    "digest": ("DigestCoverage",),
    "errors": (
        "AcquireTimeout",
        "BrokerError",
        "BrokerUnavailable",
        "DrainTimeout",
        "IntegrityError",
        "InvalidArgument",
        "LayoutMismatch",
        "LeaseLost",
        "LoadGroupFailed",
        "NotAdministrator",
        "NotAttached",
        "PublicationNotFound",
        "PublishRefused",
        "Reason",
        "RetractTimeout",
        "TransferFailed",
        "WeightsNotFound",
    ),
    "key": ("ParallelRank", "Role", "Stage", "WeightSetKey"),
    "layout": ("Layout", "MemoryFormat", "TensorSpec"),
    "transfers.lease": ("ColdLoadLease",),
    "load_group": ("LoadGroup",),
    "transfers.publication": ("Publication",),
    "transfers.report": ("AcquireReport", "AttachedTensors", "LoadReport"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AcquireReport",
    "AcquireTimeout",
    "AttachedTensors",
    "BrokerClient",
    "BrokerError",
    "BrokerUnavailable",
    "ColdLoadLease",
    "DigestCoverage",
    "DrainTimeout",
    "IntegrityError",
    "InvalidArgument",
    "Layout",
    "LayoutMismatch",
    "LeaseLost",
    "LoadGroup",
    "LoadGroupFailed",
    "LoadReport",
    "MemoryFormat",
    "NotAdministrator",
    "NotAttached",
    "ParallelRank",
    "Publication",
    "PublicationNotFound",
    "PublishRefused",
    "Reason",
    "RetractTimeout",
    "Role",
    "Stage",
    "TensorSpec",
    "TransferFailed",
    "WeightSetKey",
    "WeightsNotFound",
]


def __getattr__(name: str) -> object:
    """Imports a public name's module on first use."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
