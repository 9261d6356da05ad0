"""What the daemon lends fits what the system lets it have."""

from __future__ import annotations

import pytest

from weight_broker.errors import PublishRefused
from weight_brokerd.config.settings import LimitSettings
from weight_brokerd.core.model import Process
from weight_brokerd.daemon.quotas import Quotas, make_quotas


def lent(quotas: Quotas, users: int, processes: int) -> int:
    """Descriptors that so many processes of so many users get if each takes what it can."""
    for uid in range(users):
        for number in range(processes):
            try:
                while True:
                    quotas.descriptors.take(Process(uid, str(number)))
            except PublishRefused:
                continue
    return len(quotas.descriptors)


@pytest.mark.parametrize("open_files", [256, 1024, 20_000, 65_536])
def test_however_many_ask_the_broker_keeps_descriptors_for_itself_and_for_connections(open_files: int) -> None:
    assert lent(make_quotas(LimitSettings(), open_files), users=3, processes=3) <= open_files - 64 - open_files // 4


@pytest.mark.parametrize("open_files", [256, 1024, 65_536])
def test_a_process_or_a_user_that_takes_what_it_can_leaves_descriptors_for_others(open_files: int) -> None:
    quotas = make_quotas(LimitSettings(), open_files)
    lent(quotas, users=1, processes=5)
    quotas.descriptors.take(Process(7, "1"), 3)
    alone = make_quotas(LimitSettings(), open_files)
    lent(alone, users=1, processes=1)
    alone.descriptors.take(Process(0, "another"), 3)


def test_sixty_four_ranks_of_one_user_fit_the_default_limits() -> None:
    quotas = make_quotas(LimitSettings(), 65_536)
    for rank in range(64):
        for _ in range(90):
            quotas.regions.take(Process(1000, str(rank)))
            quotas.descriptors.take(Process(1000, str(rank)), 4)
            quotas.acquires.take(Process(1000, str(rank)))


def test_a_refusal_for_want_of_descriptors_names_what_to_raise() -> None:
    quotas = make_quotas(LimitSettings(), 256)
    with pytest.raises(PublishRefused) as refused:
        quotas.regions.take(Process(1, "1"), 200)
    assert refused.value.metadata["limit"] == "LimitNOFILE"
