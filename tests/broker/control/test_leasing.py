"""Leases where the directory is slow or fails, and where the answer does not reach its caller."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from support.control_room import EMPTY, NOWHERE, ControlRoom
from weight_broker.errors import Reason
from weight_brokerd.control import leasing
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import ColdLoadLease, LeaseClaim
from weight_brokerd.core.sources import Holder
from weight_brokerd.directory.memory import MemoryDirectory


class BrokenDirectory(MemoryDirectory):
    """One that cannot be reached, as often as `claims` and `releases` say."""

    def __init__(self, *, claims: int = 0, releases: int = 0) -> None:
        super().__init__(lease_seconds=60, first_token=1)
        self.claims = claims
        self.releases = releases

    async def claim(self, weight_set_id: str, claimant: Holder) -> LeaseClaim:
        if self.claims:
            self.claims -= 1
            raise ConnectionError("test")
        return await super().claim(weight_set_id, claimant)

    async def release(self, lease: ColdLoadLease) -> None:
        if self.releases:
            self.releases -= 1
            raise ConnectionError("test")
        await super().release(lease)


def test_a_directory_that_fails_sends_every_caller_to_the_disk() -> None:
    async def run() -> None:
        room = ControlRoom(directory=BrokenDirectory(claims=2))
        mailboxes = [room.control.acquiring.begin(room.acquisition(name)) for name in ("one", "two")]
        async with asyncio.timeout(60):
            for event in [await mailbox.get() for mailbox in mailboxes]:
                assert isinstance(event, decide.Fail)
                assert event.error.reason is Reason.BROKER_UNAVAILABLE
        assert not list(room.control.coordinator.weight_sets)
        room.control.close()

    asyncio.run(run())


def test_a_lease_is_given_back_as_often_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then nobody else may load, so a release that is lost would keep every waiter from its weights."""
    monkeypatch.setattr(leasing, "FIRST_RETRY_SECONDS", 0.001)

    async def run() -> None:
        directory = BrokenDirectory(releases=3)
        room = ControlRoom(directory=directory)
        dying = room.control.acquiring.begin(room.acquisition("dying"))
        async with asyncio.timeout(60):
            loading = await dying.get()
            assert isinstance(loading, decide.LoadFromDisk)
            room.control.acquiring.confirm_lease("dying")
            waiting = room.control.acquiring.begin(room.acquisition("waiting"))
            assert isinstance(await waiting.get(), decide.Wait)
            with capture_logs() as logged:
                room.control.sessions.departed(loading.lease.holder.instance_id, "test")
                assert isinstance(await waiting.get(), decide.LoadFromDisk)
        assert [entry["event"] for entry in logged].count("lease_release_failed") == 3
        assert directory.releases == 0
        room.control.close()

    asyncio.run(run())


@pytest.mark.parametrize("taken", [False, True], ids=["never taken out", "never sent"])
def test_a_lease_that_does_not_reach_its_caller_goes_to_the_next_waiter(taken: bool) -> None:
    async def run() -> None:
        room = ControlRoom()
        unread = room.control.acquiring.begin(room.acquisition("one"))
        waiting = room.control.acquiring.begin(room.acquisition("two"))
        async with asyncio.timeout(60):
            assert isinstance(await waiting.get(), decide.Wait)
            assert unread.qsize() == 1
            if taken:
                assert isinstance(unread.get_nowait(), decide.LoadFromDisk)
            room.control.acquiring.end_call("one")
            answer = await waiting.get()
        assert isinstance(answer, decide.LoadFromDisk)
        assert answer.lease.fencing_token == 2
        room.control.close()

    asyncio.run(run())


def test_a_lease_that_has_reached_its_caller_outlives_the_call() -> None:
    async def run() -> None:
        room = ControlRoom()
        mailbox = room.control.acquiring.begin(room.acquisition("one"))
        async with asyncio.timeout(60):
            assert isinstance(await mailbox.get(), decide.LoadFromDisk)
        room.control.acquiring.confirm_lease("one")
        room.control.acquiring.end_call("one")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert room.control.counts().cold_load_leases == 1
        room.control.close()

    asyncio.run(run())


def test_a_publication_ends_the_lease_that_it_fulfils() -> None:
    async def run() -> None:
        room = ControlRoom()
        async with asyncio.timeout(60):
            answer = await room.control.acquiring.begin(room.acquisition("one")).get()
            assert isinstance(answer, decide.LoadFromDisk)
            room.control.acquiring.confirm_lease("one")
            lease = answer.lease
            offer = room.offer("other", EMPTY)
            await room.control.publishing.publish(offer, NOWHERE)
            assert room.control.counts().cold_load_leases == 1, "another instance's publication leaves it"
            await room.control.leasing.give_up(lease.holder.instance_id, lease.weight_set_id, lease.fencing_token, "")
        assert room.control.counts().cold_load_leases == 0
        room.control.close()

    asyncio.run(run())
