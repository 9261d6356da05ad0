"""How the broker may reach tensors of a device: map their memory, have this process copy them, or both."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING

from weight_broker.connection.stage_server import StagingServer
from weight_broker.errors import PublishRefused
from weight_broker.memory.device.access import CopiedTensors, DeviceAccess, Exported
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.policy import StagingPolicy

if TYPE_CHECKING:
    from weight_broker.connection.session import Session
    from weight_broker.v1 import weight_set_pb2 as pb

_logger = logging.getLogger("weight_broker")


class Offer:
    """Keeps the tensors alive. The broker picks one of the open ways."""

    def __init__(self, tensors: DescribedDeviceTensors, access: DeviceAccess, policy: StagingPolicy) -> None:
        self.tensors = tensors
        self._access = access
        self._policy = policy
        self._exported: Exported | None = None
        self._copied: CopiedTensors | None = None
        self._stage_id = uuid.uuid4().hex
        self._server: StagingServer | None = None

    @property
    def is_exported(self) -> bool:
        """Whether the broker may map the memory."""
        return self._exported is not None

    @property
    def is_staged(self) -> bool:
        """Whether this process copies for the broker."""
        return self._copied is not None

    @property
    def is_served(self) -> bool:
        """Whether the broker can ask this process to copy."""
        return self._server is not None and self._server.serves(self._stage_id)

    @property
    def regions(self) -> tuple[pb.Region, ...]:
        """The exported memory; the same in every offer of it."""
        return self._exported.regions if self._exported is not None else ()

    @property
    def placements(self) -> tuple[tuple[int, int], ...]:
        """(region index, offset in bytes) of each tensor in the exported memory."""
        return self._exported.placements if self._exported is not None else ()

    @property
    def device_id(self) -> str:
        """The device's name on the wire."""
        return self._access.identity(self.tensors)

    def open(self) -> None:
        """Open the ways that the policy allows, once. Raises `PublishRefused` if no way can be opened."""
        if self.is_exported or self.is_staged:
            return
        may_stage = self._policy.allows_staging(self._access.name)
        if self._policy.allows_direct:
            try:
                self._exported = self._access.export(self.tensors)
            except PublishRefused as error:
                if not may_stage:
                    raise
                _logger.warning("using a staged transfer: %s", error)
        try:
            if may_stage:
                self._copied = self._access.copied(self.tensors)
        except BaseException:
            self.close()
            raise

    def wait_for_device(self) -> None:
        """Wait for the caller's work on the tensors. Raises `PublishRefused`."""
        if self._copied is not None:
            self._copied.synchronize()

    def serve(self, session: Session, timeout: float) -> str:
        """The broker may ask for copies in this session. Returns the tensors' name there. The broker answers within
        `timeout` seconds, or this raises `BrokerUnavailable`."""
        if self._copied is None:
            raise AssertionError("these tensors are not staged")
        if self._server is not None and self._server is not session.staging:
            self._server.remove(self._stage_id)
        self._server = session.staging
        self._server.add(self._stage_id, self._copied, timeout)
        return self._stage_id

    def stop_serving(self) -> None:
        """Returns when this process copies no more."""
        server, self._server = self._server, None
        if server is not None:
            server.remove(self._stage_id)

    def close(self) -> None:
        """Returns when this process copies no more and the export has ended. Idempotent. Raises `RetractTimeout` while
        the memory is still mapped: call again."""
        self.stop_serving()
        self._copied = None
        if self._exported is not None:
            self._exported.close()
        self._exported = None

    def abandon(self) -> Exported | None:
        """Returns when this process copies no more: the export, which keeps no tensor alive. The caller closes it."""
        self.stop_serving()
        self._copied = None
        exported, self._exported = self._exported, None
        return exported
