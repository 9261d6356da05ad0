"""Domain values as messages of the wire."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from weight_broker.digest import DigestCoverage
from weight_broker.kinds import TRAITS
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2 as pb
from weight_broker.v1 import weight_broker_service_pb2 as service
from weight_broker.v1.weight_set_pb2 import DeviceKind, LoadGroup
from weight_broker.wire import coverage_to_wire, key_to_wire
from weight_brokerd.cards.health import CardHealth, CardState
from weight_brokerd.control.control import Control
from weight_brokerd.core.answers import Explanation, Outcome
from weight_brokerd.core.model import (
    Arrival,
    ColdLoadLease,
    DataPlane,
    Instance,
    InstanceState,
    RankOfGroup,
    TransferPath,
)
from weight_brokerd.core.publications import Publication, PublicationState
from weight_brokerd.core.selection import Candidate
from weight_brokerd.core.sources import Refusal
from weight_brokerd.core.transfers import Transfer, TransferRecord, TransferState
from weight_brokerd.core.weight_sets import WeightSetRecord
from weight_brokerd.kinds.kind import WorkerHealth

PATHS = {
    TransferPath.COPY: pb.TRANSFER_PATH_COPY,
    TransferPath.ZERO_COPY: pb.TRANSFER_PATH_ZERO_COPY,
    TransferPath.STAGED: pb.TRANSFER_PATH_STAGED,
}
DATA_PLANES = {
    DataPlane.UNKNOWN: pb.DATA_PLANE_UNSPECIFIED,
    DataPlane.LOCAL: pb.DATA_PLANE_LOCAL,
    DataPlane.PEER_COPY: pb.DATA_PLANE_PEER_COPY,
    DataPlane.DATASYSTEM: pb.DATA_PLANE_DATASYSTEM,
}
_CARD_STATES = {
    CardState.READY: pb.Card.STATE_READY,
    CardState.DEGRADED: pb.Card.STATE_DEGRADED,
    CardState.FAILED: pb.Card.STATE_FAILED,
}
PHASES = {
    name.removeprefix("PHASE_").lower(): value for name, value in pb.Phase.items() if value != pb.PHASE_UNSPECIFIED
}
PHASE_NAMES = {value: name for name, value in PHASES.items()}
_INSTANCE_STATES = {
    InstanceState.ATTACHED: pb.Instance.STATE_ATTACHED,
    InstanceState.DISCONNECTED: pb.Instance.STATE_DISCONNECTED,
}
_PUBLICATION_STATES = {
    PublicationState.REGISTERING: pb.Publication.STATE_REGISTERING,
    PublicationState.RESIDENT: pb.Publication.STATE_RESIDENT,
    PublicationState.RETRACTING: pb.Publication.STATE_RETRACTING,
    PublicationState.GONE: pb.Publication.STATE_GONE,
    PublicationState.QUARANTINED: pb.Publication.STATE_QUARANTINED,
}
_TRANSFER_STATES = {
    TransferState.RUNNING: pb.Transfer.STATE_RUNNING,
    TransferState.SUCCEEDED: pb.Transfer.STATE_SUCCEEDED,
    TransferState.FAILED: pb.Transfer.STATE_FAILED,
}
_REFUSALS = {
    Refusal.LAYOUT_DIFFERS: inspection.Candidate.REFUSAL_LAYOUT_DIFFERS,
    Refusal.NOT_RESIDENT: inspection.Candidate.REFUSAL_NOT_RESIDENT,
    Refusal.QUARANTINED: inspection.Candidate.REFUSAL_QUARANTINED,
    Refusal.BUSY: inspection.Candidate.REFUSAL_BUSY,
    Refusal.HOST_UNREACHABLE: inspection.Candidate.REFUSAL_HOST_UNREACHABLE,
    Refusal.ALREADY_FAILED: inspection.Candidate.REFUSAL_ALREADY_FAILED,
    Refusal.DEVICE_KIND: inspection.Candidate.REFUSAL_DEVICE_KIND,
}
_OUTCOMES = {
    Outcome.TRANSFER: inspection.ExplainResponse.OUTCOME_TRANSFER,
    Outcome.COLD_LOAD: inspection.ExplainResponse.OUTCOME_COLD_LOAD,
    Outcome.WAIT_FOR_COLD_LOAD: inspection.ExplainResponse.OUTCOME_WAIT_FOR_COLD_LOAD,
    Outcome.WAIT_FOR_SOURCE: inspection.ExplainResponse.OUTCOME_WAIT_FOR_SOURCE,
    Outcome.LAYOUT_MISMATCH: inspection.ExplainResponse.OUTCOME_LAYOUT_MISMATCH,
    Outcome.DRAINING: inspection.ExplainResponse.OUTCOME_DRAINING,
    Outcome.UNPUBLISHABLE: inspection.ExplainResponse.OUTCOME_UNPUBLISHABLE,
}


class Messages:
    """Builds messages; converts the broker's clock to the time of day."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def time(self, clock_time: float) -> Timestamp:
        """The time of day of a reading of the broker's clock."""
        timestamp = Timestamp()
        timestamp.FromNanoseconds(int((clock_time + self._control.wall_offset) * 1e9))
        return timestamp

    def since(self, clock_time: float) -> Duration:
        """The time since a reading of the broker's clock."""
        return _duration(self._control.loop.now() - clock_time)

    def instance(self, instance: Instance) -> pb.Instance:
        damage = self._control.coordinator.damage
        return pb.Instance(
            instance_id=instance.instance_id,
            host_id=self._control.coordinator.host_id,
            name=instance.name,
            pid=instance.pid,
            uid=instance.uid,
            gid=instance.gid,
            state=_INSTANCE_STATES[instance.state],
            attach_time=self.time(instance.attached_at),
            publication_count=self._control.coordinator.publications.count_of_instance(instance.instance_id),
            age=self.since(instance.attached_at),
            false_damage_reports=damage.false_reports(instance.process),
            suspect=damage.is_suspect(instance.process),
        )

    def publication(self, publication: Publication) -> pb.Publication:
        return pb.Publication(
            publication_id=publication.publication_id,
            weight_set_id=publication.weight_set_id,
            generation=publication.generation,
            state=_PUBLICATION_STATES[publication.state],
            instance_id=publication.instance_id,
            instance_name=publication.holder.name,
            host_id=publication.holder.host_id,
            device_kind=_device_kind(publication.device_kind),
            device_id=publication.device_id,
            layout_fingerprint=publication.layout.fingerprint,
            tensor_count=len(publication.layout),
            size_bytes=publication.layout.content_bytes,
            publish_time=self.time(publication.published_at),
            reader_count=len(publication.readers),
            reader_limit=publication.reader_limit,
            served_count=publication.served_count,
            quarantine_reason=publication.quarantine_reason,
            load_group=_load_group(publication.rank) if publication.rank is not None else None,
            is_staged=publication.is_staged,
            age=self.since(publication.published_at),
            being_checked=self._control.coordinator.damage.is_being_checked(publication),
        )

    def lease(self, lease: ColdLoadLease) -> pb.ColdLoadLease:
        return pb.ColdLoadLease(
            weight_set_id=lease.weight_set_id,
            fencing_token=lease.fencing_token,
            instance_id=lease.holder.instance_id,
            instance_name=lease.holder.name,
            host_id=lease.holder.host_id,
            acquire_time=self.time(lease.acquired_at),
            expire_time=self.time(lease.expires_at),
            age=self.since(lease.acquired_at),
            remaining=_duration(max(lease.expires_at - self._control.loop.now(), 0.0)),
        )

    def weight_set(self, record: WeightSetRecord) -> pb.WeightSet:
        publications = self._control.coordinator.publications.of_weight_set(record.key.id)
        return pb.WeightSet(
            weight_set_id=record.key.id,
            key=key_to_wire(record.key),
            publications=[self.publication(publication) for publication in publications],
            cold_load_lease=self.lease(record.lease) if record.lease is not None else None,
            waiting_count=len(record.waiting),
            unpublishable_reason=record.unpublishable,
        )

    def transfer(self, record: TransferRecord) -> pb.Transfer:
        ended = record.state is not TransferState.RUNNING
        return pb.Transfer(
            transfer_id=record.transfer_id,
            acquisition_id=record.acquisition_id,
            weight_set_id=record.weight_set_id,
            source_publication_id=record.publication_id,
            source_generation=record.generation,
            source_instance_id=record.source_instance_id,
            receiver_instance_id=record.receiver_instance_id,
            data_plane=DATA_PLANES[record.data_plane],
            path=PATHS[record.path],
            state=_TRANSFER_STATES[record.state],
            size_bytes=record.size_bytes,
            start_time=self.time(record.started_at),
            end_time=self.time(record.ended_at) if ended else None,
            failure=record.failure,
            elapsed=_duration((record.ended_at if ended else self._control.loop.now()) - record.started_at),
        )

    def moved(self, transfer: Transfer, seconds: Mapping[str, float]) -> service.Moved:
        """The broker's part of a transfer."""
        return service.Moved(
            transfer_id=transfer.transfer_id,
            size_bytes=transfer.publication.layout.content_bytes,
            phase_times=[pb.PhaseTime(phase=PHASES[name], duration=_duration(took)) for name, took in seconds.items()],
        )

    def worker(self, health: WorkerHealth) -> pb.DatasystemWorker:
        return pb.DatasystemWorker(
            address=health.address,
            reachable=health.is_reachable,
            managed=health.is_managed,
            problem=health.problem,
        )

    def card(self, kind: str, health: CardHealth) -> pb.Card:
        return pb.Card(
            device_id=health.identity,
            device_kind=_device_kind(kind),
            device_index=health.device_index,
            soc=health.soc,
            state=_CARD_STATES[health.state],
            problem=health.problem,
            sender_pid=health.sender_pid,
            retiring_pids=health.retiring_pids,
            receiver_pids=health.receiver_pids,
            region_count=health.regions,
            offer_count=health.offers,
            fetch_count=health.fetches,
        )

    def report(self, transfer: Transfer, arrival: Arrival) -> pb.TransferReport:
        """The receiver's report of a transfer."""
        source = transfer.publication
        return pb.TransferReport(
            transfer_id=transfer.transfer_id,
            source=self.publication(source),
            data_plane=DATA_PLANES[transfer.data_plane],
            path=PATHS[transfer.path],
            size_bytes=arrival.size_bytes,
            tensor_count=len(source.layout),
            phase_times=[
                pb.PhaseTime(phase=PHASES[name], duration=_duration(seconds)) for name, seconds in arrival.phase_seconds
            ],
            verified=coverage_to_wire(DigestCoverage(arrival.verified)),
        )

    def explanation(self, explanation: Explanation) -> inspection.ExplainResponse:
        return inspection.ExplainResponse(
            weight_set_id=explanation.weight_set_id,
            key=key_to_wire(explanation.key) if explanation.key is not None else None,
            outcome=_OUTCOMES[explanation.outcome],
            summary=explanation.summary,
            candidates=[self._candidate(candidate, explanation) for candidate in explanation.selection.candidates],
            cold_load_lease=self.lease(explanation.lease) if explanation.lease is not None else None,
            waiting_count=explanation.waiting_count,
            near_misses=[
                inspection.NearMiss(weight_set_id=miss.weight_set_id, differing_fields=miss.differing_fields)
                for miss in explanation.near_misses
            ],
        )

    def _candidate(self, candidate: Candidate[Publication], explanation: Explanation) -> inspection.Candidate:
        refusal = candidate.refusal
        return inspection.Candidate(
            publication=self.publication(candidate.source),
            refusal=_REFUSALS[refusal] if refusal is not None else inspection.Candidate.REFUSAL_UNSPECIFIED,
            detail=candidate.detail,
            chosen=candidate.source is explanation.selection.chosen,
        )


def _device_kind(kind: str) -> DeviceKind.ValueType:
    return DeviceKind.ValueType(TRAITS[kind].wire_number)


def _load_group(rank: RankOfGroup) -> LoadGroup:
    return LoadGroup(group_id=rank.group_id, member=rank.member, size=rank.size)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
