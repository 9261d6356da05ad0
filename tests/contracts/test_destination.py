"""Everything that an acquisition can fill: the same suite for host memory that is copied into, mappings, and device
memory that the broker fills where it is or through staging buffers. The drivers are objects."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from support.device_driver import Acl, Memory
from support.scripted_broker import granted as granted_message
from support.scripted_stage import open_memfds
from weight_broker.connection.session import Session
from weight_broker.drivers import acl as acl_module
from weight_broker.errors import AcquireTimeout, BrokerError, IntegrityError, TransferFailed
from weight_broker.memory import HostRegion, describe, export
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host.destination import TensorMapper
from weight_broker.memory.kind import Destination, Received, Terms, kind_of
from weight_broker.memory.policy import StagingPolicy
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import digests_to_wire

SIZE_BYTES = 4096
PUBLISHED, DAMAGED = 5, 6
NPU = "npu"


class Case(ABC):
    """A destination, and a source whose bytes are `PUBLISHED` by its digests."""

    path: resources_pb2.TransferPath.ValueType
    touches = True
    destination: Destination

    @abstractmethod
    def bring(self, value: int, deadline: float) -> Received:
        """Bytes of `value` arrive."""

    @abstractmethod
    def holds(self, received: Received, value: int) -> bool:
        """Whether the tensors hold them now."""

    @abstractmethod
    def is_clean(self) -> bool:
        """Whether nothing of the destination's is open."""

    def close(self) -> None:
        """At the end of the test."""
        self.destination.close()


class OnHost(Case):
    """The source is a sealed memfd."""

    def __init__(self) -> None:
        self.array = np.zeros(SIZE_BYTES, np.uint8)
        self.described = describe({"w": self.array})
        self.regions = {value: _region(value) for value in (PUBLISHED, DAMAGED)}
        self.baseline = open_memfds()

    def bring(self, value: int, deadline: float) -> Received:
        region = self.regions[value]
        message = granted_message("transfer-1", self.described, region).granted
        del message.digests[:]
        message.digests.extend(map(digests_to_wire, self.regions[PUBLISHED].digests))
        received = self.destination.take(message, lambda _index: os.dup(region.fd), deadline)
        assert received is not None
        return received

    def is_clean(self) -> bool:
        return open_memfds() == self.baseline

    def close(self) -> None:
        super().close()
        for region in self.regions.values():
            region.close()


class Filler(OnHost):
    path = resources_pb2.TRANSFER_PATH_COPY

    def __init__(self) -> None:
        super().__init__()
        self.destination = kind_of(self.described.device_kind).destination(self.described, Terms(DigestMode.FULL))

    def holds(self, received: Received, value: int) -> bool:
        return bool((self.array == value).all())


class Mapper(OnHost):
    path = resources_pb2.TRANSFER_PATH_ZERO_COPY
    touches = False

    def __init__(self) -> None:
        super().__init__()
        self.destination = TensorMapper("numpy", DigestMode.FULL)

    def holds(self, received: Received, value: int) -> bool:
        return bool((received.tensors["w"] == value).all())


class OnDevice(Case):
    """The broker's part is played by this object: it writes to the memory."""

    granted_path: resources_pb2.TransferPath.ValueType | None = None
    staging = StagingPolicy.DIRECT

    def __init__(self, acl: Acl) -> None:
        self.acl = acl
        self.memory = Memory()
        self.described = describe({"w": self.memory.tensor()})
        kind = kind_of(NPU)
        self.destination = kind.destination(self.described, Terms(staging=self.staging))
        published = describe({"w": Memory(PUBLISHED).tensor()})
        self.digests = digests_to_wire(kind.digests(published))

    def bring(self, value: int, deadline: float) -> Received:
        path = self.granted_path or self.path
        message = pb.Granted(transfer_id="transfer-1", path=path, digests=[self.digests])
        assert self.destination.take(message, _no_claim, deadline) is None
        self.memory.fill(value)
        return self.destination.verify(message, pb.Moved(size_bytes=SIZE_BYTES), deadline)

    def holds(self, received: Received, value: int) -> bool:
        return self.memory.content() == bytes([value]) * SIZE_BYTES

    def is_clean(self) -> bool:
        return not self.acl.keys


class Direct(OnDevice):
    path = resources_pb2.TRANSFER_PATH_COPY


class Staged(OnDevice):
    path = resources_pb2.TRANSFER_PATH_STAGED
    staging = StagingPolicy.STAGED


class Either(OnDevice):
    """The broker may pick, and maps the memory."""

    path = resources_pb2.TRANSFER_PATH_COPY
    staging = StagingPolicy.AUTO


class EitherStaged(Either):
    """The broker may pick, and its card refuses to map the memory."""

    granted_path = resources_pb2.TRANSFER_PATH_STAGED


class EitherUnexported(Staged):
    """The driver exports nothing."""

    staging = StagingPolicy.AUTO

    def __init__(self, acl: Acl) -> None:
        super().__init__(acl)
        acl.refuses_exports = True


@pytest.fixture
def acl(monkeypatch: pytest.MonkeyPatch) -> Acl:
    driver = Acl()
    monkeypatch.setattr(acl_module, "load", lambda *_: driver)
    return driver


@pytest.fixture
def session() -> Session:
    """What can be served is noted."""
    served: dict[str, object] = {}
    stage = SimpleNamespace(
        add=lambda name, tensors, _: served.update({name: tensors}),
        remove=lambda name: served.pop(name, None),
        serves=served.__contains__,
        served=served,
    )
    return cast(Session, SimpleNamespace(staging=stage))


@pytest.fixture(params=[Filler, Mapper, Direct, Staged, Either, EitherStaged, EitherUnexported])
def case(request: pytest.FixtureRequest, acl: Acl) -> Any:
    case = made(request.param, acl)
    yield case
    case.close()


def made(kind_of_case: type[Case], acl: Acl) -> Case:
    return kind_of_case(acl) if issubclass(kind_of_case, OnDevice) else kind_of_case()


def _region(value: int) -> HostRegion:
    return export(describe({"w": np.full(SIZE_BYTES, value, np.uint8)}), digest_mode=DigestMode.FULL)


def _no_claim(index: int) -> int:
    raise AssertionError("no region is claimed")


def soon() -> float:
    return time.monotonic() + 20


def asked(case: Case, session: Session) -> pb.AcquireRequest:
    request = pb.AcquireRequest()
    case.destination.fill_request(request, session, soon())
    return request


def test_the_request_says_how_the_bytes_are_to_come(case: Case, session: Session) -> None:
    request = asked(case, session)
    assert request.path == case.path
    assert (len(request.regions) > 0) is isinstance(case, Direct | Either)
    assert (request.stage_id != "") is isinstance(case, Staged | Either)


def test_it_can_be_asked_for_again_in_another_session(case: Case, session: Session) -> None:
    first = asked(case, session)
    assert asked(case, session) == first


def test_what_was_published_arrives_whole_and_verified(case: Case, session: Session) -> None:
    asked(case, session)
    received = case.bring(PUBLISHED, soon())
    assert case.holds(received, PUBLISHED)
    assert received.size_bytes == SIZE_BYTES
    assert [spec.name for spec in received.layout] == ["w"]
    assert received.touched is case.touches
    assert "verify" in received.seconds or "transfer" in received.seconds


def test_other_bytes_are_an_integrity_error_that_names_the_tensors(case: Case, session: Session) -> None:
    asked(case, session)
    with pytest.raises(IntegrityError) as caught:
        case.bring(DAMAGED, soon())
    assert caught.value.metadata["tensors"] == "w"
    assert (caught.value.touched, caught.value.quiesced) == (case.touches, True)


def test_after_a_damaged_source_another_one_can_be_taken_from(case: Case, session: Session) -> None:
    asked(case, session)
    with pytest.raises(IntegrityError):
        case.bring(DAMAGED, soon())
    assert case.holds(case.bring(PUBLISHED, soon()), PUBLISHED)


def test_nothing_arrives_after_the_deadline(case: Case, session: Session) -> None:
    asked(case, session)
    with pytest.raises(AcquireTimeout):
        case.bring(PUBLISHED, time.monotonic() - 1)


def test_what_arrived_can_be_kept_and_outlives_the_destination(case: Case, session: Session) -> None:
    asked(case, session)
    case.bring(PUBLISHED, soon())
    shared = case.destination.keep()
    case.destination.close()
    assert [spec.name for spec in shared.layout] == ["w"]
    assert shared.digests
    assert shared.is_served
    shared.close()
    shared.close()
    assert case.is_clean()


def test_closing_leaves_nothing_open(case: Case, session: Session) -> None:
    asked(case, session)
    case.bring(PUBLISHED, soon())
    case.destination.close()
    case.destination.close()
    assert case.is_clean()
    assert not cast(Any, session.staging).served


@pytest.mark.parametrize("kind_of_case", [Filler, Mapper])
def test_a_source_that_cannot_be_opened_touches_nothing(kind_of_case: type[OnHost], session: Session) -> None:
    case = kind_of_case()

    def refuse(index: int) -> int:
        raise TransferFailed("no such region")

    asked(case, session)
    message = granted_message("transfer-1", case.described, case.regions[PUBLISHED]).granted
    with pytest.raises(TransferFailed) as caught:
        case.destination.take(message, refuse, soon())
    assert not caught.value.touched
    assert case.is_clean()
    case.close()


def test_memory_that_stays_mapped_is_not_quiesced_until_it_is_let_go(acl: Acl, session: Session) -> None:
    case = Direct(acl)
    asked(case, session)
    acl.is_mapped = True
    with pytest.raises(BrokerError) as caught:
        case.destination.close()
    assert (caught.value.touched, caught.value.quiesced) == (True, False)
    acl.is_mapped = False
    case.destination.close()
    assert case.is_clean()


@pytest.mark.parametrize(
    ("kind_of_case", "is_only_writer"), [(Filler, True), (Mapper, True), (Direct, False), (Staged, True)]
)
def test_a_destination_knows_whether_only_this_process_writes(
    acl: Acl, session: Session, kind_of_case: type[Case], is_only_writer: bool
) -> None:
    case = made(kind_of_case, acl)
    asked(case, session)
    assert case.destination.stop() is is_only_writer
    case.close()
