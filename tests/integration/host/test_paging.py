"""Lists of any length come in pages that neither repeat nor hide anything, whatever comes and goes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from support.raw_client import RawClient, publish_request
from support.rpc_errors import assert_no_defect
from support.waiting import eventually
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

COUNT = 10_000
MODELS = 10
IN_FLIGHT = 200


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path_factory.mktemp("paging") / "run")
    try:
        yield broker.start()
        assert_no_defect(broker.log)
    finally:
        broker.close()


def numbered(number: int) -> pb.PublishRequest:
    request = publish_request(f"model {number % MODELS}", region_id="shared", request_id=f"{number}")
    request.key.revision = f"{number}"
    return request


def publish(publisher: RawClient, numbers: range) -> list[resources_pb2.Publication]:
    """Publishes that many weight sets, all of them in the same memory, some hundred calls at a time."""
    publications = []
    for begin in range(numbers.start, numbers.stop, IN_FLIGHT):
        calls = [
            publisher.weight_broker.Publish.future(numbered(number), metadata=publisher.metadata, timeout=60)
            for number in range(begin, min(begin + IN_FLIGHT, numbers.stop))
        ]
        publications += [call.result().publication for call in calls]
    return publications


@pytest.fixture(scope="module")
def publisher(broker: BrokerProcess) -> Iterator[RawClient]:
    """Has published ten thousand weight sets."""
    with RawClient(broker.runtime_directory, "publisher") as publisher:
        assert not publisher.offer_region("shared")
        publish(publisher, range(COUNT))
        yield publisher


def weight_sets(
    broker: BrokerProcess,
    *,
    page_size: int = 1000,
    model: str = "",
    between: Callable[[list[resources_pb2.WeightSet]], None] = lambda _: None,
) -> list[resources_pb2.WeightSet]:
    """All pages; `between` is called after each but the last with what has come so far."""
    found: list[resources_pb2.WeightSet] = []
    token = ""
    while True:
        request = inspection.ListWeightSetsRequest(page_size=page_size, page_token=token, model=model)
        answer = broker.inspection.ListWeightSets(request, timeout=60)
        assert len(answer.weight_sets) <= (page_size or 100)
        found += answer.weight_sets
        token = answer.next_page_token
        if not token:
            return found
        between(found)


def ids(listed: list[resources_pb2.WeightSet]) -> list[str]:
    return [one.weight_set_id for one in listed]


def test_ten_thousand_publications_are_listed_once_each_and_in_order(
    broker: BrokerProcess, publisher: RawClient
) -> None:
    listed = weight_sets(broker)
    assert len(listed) == COUNT
    assert ids(listed) == sorted(set(ids(listed)))
    assert {one.key.revision for one in listed} == {str(number) for number in range(COUNT)}
    host = broker.host()
    assert (host.publication_count, host.region_count) == (COUNT, 1)
    assert broker.instances()[0].publication_count == COUNT


@pytest.mark.parametrize(("page_size", "pages"), [(0, 10), (7, 143), (1000, 1)])
def test_the_size_of_the_pages_changes_nothing_else(
    broker: BrokerProcess, publisher: RawClient, page_size: int, pages: int
) -> None:
    seen: list[int] = []
    listed = weight_sets(broker, page_size=page_size, model="model 3", between=lambda found: seen.append(len(found)))
    assert len(listed) == COUNT // MODELS
    assert {one.key.model for one in listed} == {"model 3"}
    assert len(seen) == pages - 1


def test_what_comes_and_goes_between_two_pages_hides_and_repeats_nothing(
    broker: BrokerProcess, publisher: RawClient
) -> None:
    """Everything that is there from the first page to the last is listed exactly once."""
    before = weight_sets(broker)
    retracted: set[str] = set()
    added = 0

    def change(found: list[resources_pb2.WeightSet]) -> None:
        """Retracts the last one that was listed (the token names it), one before it and one after it; adds some."""
        nonlocal added
        position = len(set(ids(found)) & set(ids(before)))
        victims = [before[position - 1], before[position // 2], before[min(position + 1, COUNT - 1)]]
        for victim in victims:
            if victim.weight_set_id not in retracted:
                request = pb.RetractRequest(publication_id=victim.publications[0].publication_id)
                publisher.weight_broker.Retract(request, metadata=publisher.metadata, timeout=60)
                retracted.add(victim.weight_set_id)
        publish(publisher, range(COUNT + added, COUNT + added + 5))
        added += 5

    listed = ids(weight_sets(broker, between=change))
    assert len(retracted) > 20
    assert added == 50
    assert listed == sorted(listed)
    assert len(listed) == len(set(listed))
    assert set(ids(before)) - retracted <= set(listed)


def test_one_of_ten_thousand_is_explained(broker: BrokerProcess, publisher: RawClient) -> None:
    key = numbered(COUNT - 1).key
    explained = broker.inspection.Explain(inspection.ExplainRequest(key=key), timeout=60)
    assert explained.outcome == inspection.ExplainResponse.OUTCOME_TRANSFER


def test_transfers_keep_their_place_in_the_list_when_they_end(broker: BrokerProcess, publisher: RawClient) -> None:
    publisher.publish("resident", region_id="another")
    with RawClient(broker.runtime_directory, "receiver") as receiver:
        calls: list[Any] = []
        running: list[str] = []
        for number in range(6):  # one after the other, so that it is known which was granted first
            calls.append(receiver.acquire("resident", request_id=f"{number}"))
            running.append(next(calls[-1]).granted.transfer_id)
        expected = running[::-1]
        listed: list[str] = []
        token = ""
        while len(listed) < len(expected):
            request = inspection.ListTransfersRequest(page_size=1, page_token=token)
            answer = broker.inspection.ListTransfers(request, timeout=60)
            listed += [one.transfer_id for one in answer.transfers]
            token = answer.next_page_token
            # The one that the token names ends, and so does the oldest one.
            for transfer_id in {listed[-1], running[len(listed) // 2]}:
                with_state = {one.transfer_id: one.state for one in broker.transfers()}
                if with_state[transfer_id] == resources_pb2.Transfer.STATE_RUNNING:
                    receiver.report_success(transfer_id)
        assert listed == expected
        assert token == ""
        for call in calls:
            call.cancel()
    eventually(lambda: not broker.host().running_transfer_count)


def test_instances_are_listed_once_each(broker: BrokerProcess, publisher: RawClient) -> None:
    clients = [RawClient(broker.runtime_directory, f"guest {number}") for number in range(25)]
    try:
        listed: list[str] = []
        token = ""
        while True:
            request = inspection.ListInstancesRequest(page_size=4, page_token=token)
            answer = broker.inspection.ListInstances(request, timeout=60)
            listed += [one.instance_id for one in answer.instances]
            token = answer.next_page_token
            if not token:
                break
        assert len(listed) == len(set(listed)) == 26
        assert {client.instance_id for client in clients} < set(listed)
    finally:
        for client in clients:
            client.close()


def test_the_end_of_a_publisher_ends_all_ten_thousand(broker: BrokerProcess, publisher: RawClient) -> None:
    assert broker.host().publication_count >= COUNT
    publisher.close()
    assert broker.host().publication_count == 0
    assert broker.host().region_count == 0
    assert weight_sets(broker) == []
