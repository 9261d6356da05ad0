"""What a test tells the ranks of an engine to do."""

from __future__ import annotations

from support.actions import State, current
from weight_broker.key import ParallelRank, WeightSetKey
from weight_broker.load_group import LoadGroup
from weight_broker.transfers.lease import ColdLoadLease

MODEL = "ranks"


def key_of(member: int, size: int = 2) -> WeightSetKey:
    """The key of a rank's weights."""
    return WeightSetKey(MODEL, rank=ParallelRank(tensor_parallel_rank=member, tensor_parallel_size=size))


def acquire(state: State, /, engine: str, member: int, *, timeout: float = 60.0, patience: float = 30.0) -> str:
    """Asks as a rank; the checksum of what arrived, or "lease" if this rank is to load from disk."""
    group = LoadGroup(engine, member, 2, assembly_timeout=patience)
    outcome = state.client.acquire_or_lease(key_of(member), state.arrays, timeout=timeout, group=group)
    if isinstance(outcome, ColdLoadLease):
        state.lease = outcome
        return "lease"
    return current(state)


def publish(state: State, /, engine: str, member: int) -> str:
    """Publishes what is there as a rank."""
    publication = state.client.publish(
        key_of(member), state.arrays, lease=state.lease, group=LoadGroup(engine, member, 2)
    )
    state.publications.append(publication)
    return publication.id


def declare_unpublishable(state: State, /, why: str) -> None:
    """Gives the lease up for all."""
    assert state.lease is not None
    state.lease.give_up(why, unpublishable=True)
