"""The daemon's attach socket: memory that is not what it should be, and processes that do not behave."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from support.broker_process import BrokerProcess
from support.raw_client import REGION_BYTES, RawClient, connect, exchange, hello, publish_request, sealed_memory
from support.rpc_errors import assert_no_defect, refusal_of
from support.sealed_memory import ALL_SEALS
from support.waiting import eventually
from weight_broker.errors import Reason
from weight_broker.v1 import attach_pb2 as pb

TRIES = 50


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """One for all tests here: none of them may harm it."""
    broker = BrokerProcess(tmp_path_factory.mktemp("attach") / "run")
    try:
        yield broker.start()
        assert_no_defect(broker.log)
        assert broker.terminate() == 0
    finally:
        broker.close()


@pytest.fixture
def client(broker: BrokerProcess) -> Iterator[RawClient]:
    """An attached instance. When the test is over the daemon is as it was before."""
    broker.host()
    before = len(broker.descriptors())
    with RawClient(broker.runtime_directory) as client:
        yield client
    eventually(lambda: len(broker.descriptors()) <= before)
    assert broker.host().region_count == 0


def unsealed() -> int:
    return sealed_memory(seals=0)


def partly_sealed() -> int:
    return sealed_memory(seals=ALL_SEALS & ~fcntl.F_SEAL_WRITE)


def too_small() -> int:
    return sealed_memory(REGION_BYTES - 1)


def reserved_huge_pages() -> int:
    """Memory of huge pages, of which the machine may have none: a reader dies of the first byte."""
    try:
        descriptor = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, 2 << 20)
    except OSError:
        pytest.skip("this kernel has no huge pages of 2 MiB")
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)
    return descriptor


def regular_file() -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(REGION_BYTES)
        return os.dup(file.fileno())


def pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def unix_socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def directory() -> int:
    return os.open("/", os.O_RDONLY)


def device() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def own_memory() -> int:
    return os.open("/proc/self/mem", os.O_RDWR)


@pytest.mark.parametrize(
    "make",
    [
        unsealed,
        partly_sealed,
        too_small,
        reserved_huge_pages,
        regular_file,
        pipe,
        unix_socket,
        directory,
        device,
        own_memory,
    ],
)
def test_what_is_no_sealed_memfd_of_that_size_is_refused_and_not_kept(
    broker: BrokerProcess, client: RawClient, make: Callable[[], int]
) -> None:
    before = len(broker.descriptors())
    descriptor = make()
    try:
        reasons = {client.offer_region("region", descriptor=descriptor) for _ in range(TRIES)}
    finally:
        os.close(descriptor)
    assert reasons == {Reason.REGION_REFUSED}
    assert len(broker.descriptors()) <= before
    assert broker.host().region_count == 0


def test_a_region_of_astronomic_size_is_refused(broker: BrokerProcess, client: RawClient) -> None:
    """A sparse memfd has any size; the sum of a few would not fit into GetHost's number."""
    descriptor = sealed_memory((1 << 63) - 1)
    offers = [pb.OfferRegion(region_id=f"region {index}", size_bytes=(1 << 63) - 1) for index in range(3)]
    try:
        answers = [client.ask(pb.AttachRequest(offer_region=offer), descriptor) for offer in offers]
    finally:
        os.close(descriptor)
    assert {answer.refused.reason for answer in answers} == {Reason.REGION_REFUSED}
    assert broker.host().region_bytes == 0


def publish_refusal(client: RawClient, region_id: str) -> Reason:
    request = publish_request(region_id=region_id)
    with pytest.raises(grpc.RpcError) as caught:
        client.weight_broker.Publish(request, metadata=client.metadata, timeout=60)
    return refusal_of(caught.value).reason


def test_a_publication_in_a_region_that_was_never_offered_is_refused(broker: BrokerProcess, client: RawClient) -> None:
    assert publish_refusal(client, "never offered") is Reason.REGION_REFUSED
    assert broker.publications() == []


def test_a_publication_in_a_withdrawn_region_is_refused(broker: BrokerProcess, client: RawClient) -> None:
    assert client.offer_region("region") == ""
    assert client.withdraw_region("region") == ""
    assert publish_refusal(client, "region") is Reason.REGION_REFUSED
    assert broker.publications() == []


def test_a_publication_in_another_instances_region_is_refused(broker: BrokerProcess, client: RawClient) -> None:
    with RawClient(broker.runtime_directory, "owner") as owner:
        assert owner.offer_region("region") == ""
        assert publish_refusal(client, "region") is Reason.REGION_REFUSED
        assert client.withdraw_region("region") == Reason.REGION_REFUSED
        assert owner.publish(offer=False).publication_id


def test_a_region_of_another_instances_transfer_cannot_be_claimed(broker: BrokerProcess, client: RawClient) -> None:
    with RawClient(broker.runtime_directory, "receiver") as receiver:
        client.publish()
        stream = receiver.acquire()
        transfer_id = next(stream).granted.transfer_id
        claim = pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id=transfer_id, region_index=0))
        assert client.ask(claim).refused.reason == Reason.TRANSFER_NOT_FOUND
        assert receiver.ask(claim).HasField("accepted")
        beyond = pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id=transfer_id, region_index=1))
        assert receiver.ask(beyond).refused.reason == Reason.INVALID_ARGUMENT
        stream.cancel()
        eventually(lambda: not broker.host().running_transfer_count)
        assert receiver.ask(claim).refused.reason == Reason.TRANSFER_NOT_FOUND


def test_offered_regions_and_publications_leave_with_goodbye(broker: BrokerProcess, client: RawClient) -> None:
    before = len(broker.descriptors())
    with RawClient(broker.runtime_directory, "guest") as guest:
        guest.publish()
        guest.offer_region("unused")
        assert broker.host().region_count == 2
    assert broker.host().region_count == 0
    assert broker.publications() == []
    eventually(lambda: len(broker.descriptors()) <= before)


def test_hostile_clients_leave_no_trace(broker: BrokerProcess, client: RawClient) -> None:
    before = len(broker.descriptors())
    subprocess.run(
        [sys.executable, "-m", "support.hostile_attacher", str(broker.runtime_directory), "400"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
        timeout=60,
    )
    eventually(lambda: len(broker.descriptors()) <= before)
    eventually(lambda: broker.host().instance_count == 1)
    assert broker.host().region_count == 0
    assert client.offer_region("still served") == ""


def test_two_hundred_strangers_keep_nobody_out(broker: BrokerProcess, client: RawClient) -> None:
    before = len(broker.descriptors())
    strangers = [connect(broker.runtime_directory) for _ in range(200)]
    with RawClient(broker.runtime_directory, "guest") as guest:
        assert guest.publish().publication_id
    assert client.offer_region("region") == ""
    eventually(lambda: len(broker.descriptors()) <= before + 1)
    for stranger in strangers:
        assert stranger.recv(1) == b"", "a connection that says nothing is closed"
        stranger.close()
    client.withdraw_region("region")


def test_an_instance_cannot_be_two(broker: BrokerProcess, client: RawClient) -> None:
    assert client.ask(hello()).refused.reason == Reason.INVALID_ARGUMENT
    assert broker.host().instance_count == 1
    assert client.offer_region("region") == ""
    assert exchange(client.connection, pb.AttachRequest(goodbye=pb.Goodbye()).SerializeToString()).HasField("accepted")
