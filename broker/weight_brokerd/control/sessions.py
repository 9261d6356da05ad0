"""Sessions: the processes behind the instances, and what they hand over on the attach socket."""

from __future__ import annotations

import itertools
import secrets
import socket

from weight_broker.errors import BrokerError, NotAttached
from weight_brokerd.attach.server import PeerCredentials, Session
from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.control.loop import Loop
from weight_brokerd.core.conduct.quota import Quota
from weight_brokerd.core.decisions import Decisions
from weight_brokerd.core.model import Instance, Process
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.telemetry.audit import audit

DESCRIPTORS_PER_INSTANCE = 4
"""Its attach connection, its pidfd, its stage connection and its gRPC socket."""


class Sessions:
    """Takes the events of the attach socket (`weight_brokerd.attach.conversation.Attendance`)."""

    def __init__(
        self, loop: Loop, regions: RegionTable, staging: StagingConnections, descriptors: Quota | None = None
    ) -> None:
        """`descriptors`: the file descriptors that the broker has for instances and regions; unbounded if None."""
        self._descriptors = descriptors
        self._loop = loop
        self._regions = regions
        self._staging = staging
        self._instance_numbers = itertools.count(1)
        self._sessions: dict[bytes, Session] = {}
        self._tokens: dict[str, bytes] = {}

    def attach(self, peer: PeerCredentials, name: str, client_version: str) -> Session:
        """A process attached; its token is its identity from now on."""
        instance_id = f"instance-{next(self._instance_numbers)}"
        instance = Instance(
            instance_id, name or f"pid-{peer.pid}", peer.pid, peer.uid, peer.gid, attached_at=self._loop.now()
        )
        decisions = self._attach(instance)
        session = Session(instance_id=instance_id, token=secrets.token_bytes(32), peer=peer)
        self._sessions[session.token] = session
        self._tokens[instance_id] = session.token
        audit("attach", **self._loop.author(instance_id), name=name, client_version=client_version)
        self._loop.carry_out(decisions)
        return session

    def disconnected(self, instance_id: str) -> None:
        """The attach socket closed; the process may live on."""
        self._loop.carry_out(self._loop.coordinator.disconnect(instance_id))

    def departed(self, instance_id: str, reason: str) -> None:
        """The process died or said goodbye."""
        token = self._tokens.pop(instance_id, None)
        if token is None:
            return
        del self._sessions[token]
        audit("depart", instance_id=instance_id, reason=reason)
        self._staging.drop(instance_id)
        instance = self._loop.coordinator.instances[instance_id]
        self._loop.carry_out(self._loop.coordinator.depart(instance_id, self._loop.now()))
        if self._descriptors is not None:
            self._descriptors.give_back(instance.process, DESCRIPTORS_PER_INSTANCE)
        self._regions.drop_instance(instance_id)

    def offer_region(self, instance_id: str, region_id: str, size_bytes: int, fd: int) -> None:
        """An instance hands a memfd over. `fd` belongs to the broker from here on, also after an error."""
        process = self._loop.coordinator.instances[instance_id].process
        self._regions.offer(instance_id, region_id, size_bytes, fd, process)
        audit("offer_region", instance_id=instance_id, region_id=region_id, size_bytes=size_bytes)

    def withdraw_region(self, instance_id: str, region_id: str) -> None:
        """An instance ends its offer of a region."""
        self._regions.withdraw(instance_id, region_id)
        audit("withdraw_region", instance_id=instance_id, region_id=region_id)

    def claim_region(self, instance_id: str, transfer_id: str, region_index: int) -> int:
        """The file descriptor of a region of a running transfer's source, to be passed to the receiver."""
        self._loop.coordinator.transfers.of_receiver(transfer_id, instance_id)
        return self._regions.descriptor(transfer_id, region_index)

    def stage_owner(self, token: bytes, peer: PeerCredentials) -> str:
        """The instance that serves on a stage connection; raises `NotAttached`."""
        session = self.session(token)
        if (session.peer.pid, session.peer.uid) != (peer.pid, peer.uid):
            raise NotAttached("the session token belongs to another process; attach from this process first")
        return session.instance_id

    def stage_connected(self, instance_id: str, connection: socket.socket) -> None:
        """Takes the instance's stage connection over."""
        if instance_id not in self._tokens:
            connection.close()
            return
        audit("serve_stage", instance_id=instance_id)
        self._staging.connected(instance_id, connection)

    def _attach(self, instance: Instance) -> Decisions:
        if self._descriptors is None:
            return self._loop.coordinator.attach(instance)
        self._descriptors.take(instance.process, DESCRIPTORS_PER_INSTANCE)
        try:
            return self._loop.coordinator.attach(instance)
        except BrokerError:
            self._descriptors.give_back(instance.process, DESCRIPTORS_PER_INSTANCE)
            raise

    def process(self, token: bytes) -> Process | None:
        """The process of a token; None if the token is not valid."""
        session = self._sessions.get(token)
        instance = self._loop.coordinator.instances.get(session.instance_id) if session is not None else None
        return instance.process if instance is not None else None

    def session(self, token: bytes) -> Session:
        """The session of a token; raises `NotAttached`."""
        session = self._sessions.get(token)
        if session is None:
            raise NotAttached("this call needs the token of an attached process; attach to attach.sock first")
        return session
