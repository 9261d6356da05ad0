"""The ranks of one engine are all filled from one other engine, or all load from disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import actions, rank_actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.waiting import eventually
from weight_broker.errors import LoadGroupFailed, WeightsNotFound
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.wire import key_to_wire

Start = Callable[..., InstanceProcess]
RANKS = range(2)


def start_engine(start_instance: Start, name: str) -> list[InstanceProcess]:
    ranks = [start_instance(f"{name}-{member}") for member in RANKS]
    for rank in ranks:
        rank.call(actions.prepare)
    return ranks


def ask(name: str, ranks: list[InstanceProcess], **options: float) -> None:
    for member, rank in enumerate(ranks):
        rank.begin(rank_actions.acquire, name, member, **options)


@pytest.fixture
def first(broker: BrokerProcess, start_instance: Start) -> list[InstanceProcess]:
    """An engine that has loaded from disk and published."""
    ranks = start_engine(start_instance, "first")
    ask("first", ranks)
    assert [rank.result() for rank in ranks] == ["lease"] * 2
    for member, rank in enumerate(ranks):
        rank.call(actions.prepare, member + 1)
        rank.call(rank_actions.publish, "first", member)
    return ranks


def test_all_ranks_are_filled_from_one_engine(
    first: list[InstanceProcess], broker: BrokerProcess, start_instance: Start
) -> None:
    ranks = start_engine(start_instance, "second")
    ask("second", ranks)
    assert [rank.result() for rank in ranks] == [actions.expected(member + 1) for member in RANKS]
    assert {publication.load_group.group_id for publication in broker.publications()} == {"first"}


def test_half_the_ranks_unservable_sends_all_to_the_disk(
    first: list[InstanceProcess], broker: BrokerProcess, start_instance: Start
) -> None:
    first[1].call(actions.retract_all)
    ranks = start_engine(start_instance, "second")
    ask("second", ranks)
    assert [rank.result() for rank in ranks] == ["lease"] * 2


def test_a_rank_that_is_killed_sends_the_others_to_the_disk(broker: BrokerProcess, start_instance: Start) -> None:
    ranks = start_engine(start_instance, "second")
    ranks[0].begin(rank_actions.acquire, "second", 0)
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    ranks[0].kill()
    eventually(lambda: not broker.instances())
    ranks[1].begin(rank_actions.acquire, "second", 1)
    with pytest.raises(LoadGroupFailed, match="rank 0"):
        ranks[1].result()


def test_a_rank_that_never_asks_is_waited_for_no_longer_than_was_said(
    first: list[InstanceProcess], start_instance: Start
) -> None:
    ranks = start_engine(start_instance, "second")
    ranks[0].begin(rank_actions.acquire, "second", 0, patience=0.5)
    with pytest.raises(LoadGroupFailed, match="only ranks 0 of 2"):
        ranks[0].result()


def test_weights_that_cannot_be_published_are_explained_and_waited_for_by_nobody(
    broker: BrokerProcess, start_instance: Start
) -> None:
    ranks, others = start_engine(start_instance, "second"), start_engine(start_instance, "third")
    ask("second", ranks)
    assert [rank.result() for rank in ranks] == ["lease"] * 2
    ask("third", others)
    eventually(lambda: broker.host().waiting_acquisition_count == 2)
    ranks[0].call(rank_actions.declare_unpublishable, "post-processing moved them")
    with pytest.raises(WeightsNotFound, match="post-processing moved them"):
        others[0].result()
    with pytest.raises(LoadGroupFailed):
        others[1].result()
    answer = broker.inspection.Explain(inspection.ExplainRequest(key=key_to_wire(rank_actions.key_of(0))), timeout=60)
    assert answer.outcome == inspection.ExplainResponse.OUTCOME_UNPUBLISHABLE
    assert "post-processing moved them" in answer.summary
    assert answer.key.model == rank_actions.MODEL
