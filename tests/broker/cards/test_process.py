"""A card process that cannot even be started."""

from __future__ import annotations

import asyncio
import os
import resource

import pytest

from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardUnavailable
from weight_brokerd.cards.messages import Role
from weight_brokerd.cards.process import CardProcess


def test_a_daemon_without_descriptors_has_a_card_that_is_unavailable() -> None:
    async def start() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(CardUnavailable, match=r"sender of device 0 cannot be started.*Too many open files"):
                await CardProcess.start(Role.SENDER, 0, CardsConfiguration("127.0.0.1", 1))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    asyncio.run(start())
