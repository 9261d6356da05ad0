"""Imports what a first acquire or publish imports, so that its time is spent on weights.

A bare `BrokerClient` imports these modules on use, because a process without a broker does without them. An
integration belongs to a process that loads a model: its import imports this module.
"""

from __future__ import annotations

import importlib

import weight_broker.connection.channel
import weight_broker.memory.from_host
import weight_broker.memory.host.destination
import weight_broker.memory.tensors
import weight_broker.transfers.acquisition
import weight_broker.transfers.load
import weight_broker.v1.attach_pb2
import weight_broker.v1.weight_broker_service_pb2_grpc  # noqa: F401
from weight_broker.memory.kind import MODULES

for _kind in MODULES.values():
    importlib.import_module(_kind)
