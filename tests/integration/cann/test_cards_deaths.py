"""What happens to transfers and to cards when something dies, hangs or is not there: bounded, told apart, and over."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost, Fault, card_name, is_alive
from support import acl
from support.card_process import CardProcess
from support.cards import CardScene, move, own, until
from support.datasystem_worker import DatasystemWorker, free_ports
from weight_brokerd.cards.errors import CardLost, CardRefused, CardTimeout, CardUnavailable
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.health import CardState
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

MIB = 1 << 20
SLOW = 4 * MIB
"""Bytes per second of a link on which nothing here ends by itself in time."""

pytestmark = pytest.mark.timeout(90)


def test_an_overdue_fetch_ends_with_its_receiver_and_nothing_is_written_any_more(scene: CardScene) -> None:
    """H5: the engine would go on writing. And the sender, which the driver may hold for half an hour, is replaced."""
    source, other = scene.own(0, 32 * MIB, seed=3), scene.own(0, 4 * MIB, seed=4)
    destination, elsewhere = scene.own(1, 32 * MIB), scene.own(2, 4 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, other, elsewhere)
        old = cards.health[0].sender_pid
        await cards.warm_up(card_name(1))
        (receiver,) = cards.health[1].receiver_pids
        scene.host.inject(Fault.SLOW_LINK, card=1, value=MIB)
        with pytest.raises(CardTimeout) as caught:
            await move(cards, source, destination, timeout=3.0)
        assert caught.value.touched
        assert caught.value.quiesced
        assert not is_alive(receiver)
        assert destination.digest() != source.digest(), "the fetch was not interrupted"
        scene.host.clear()
        await move(cards, other, elsewhere)
        await move(cards, source, destination)
        assert destination.digest() == source.digest()
        assert cards.health[0].sender_pid != old
        await until(lambda: not is_alive(old))

    scene.run(scenario, source, other)


def test_a_killed_receiver_that_the_driver_does_not_let_go_in_time_is_not_called_quiesced(scene: CardScene) -> None:
    source, destination = scene.pair(8 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=MIB / 4)
        with pytest.raises(CardTimeout) as caught:
            await move(cards, source, destination, timeout=3.0)
        assert caught.value.touched
        assert not caught.value.quiesced

    scene.run(scenario, source, exit_seconds=0.0, check_driver=False)


def test_bytes_do_not_arrive_after_a_fetch_was_given_up(scene: CardScene) -> None:
    source, destination = scene.pair(32 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=20 * MIB)
        moving = asyncio.create_task(move(cards, source, destination))
        await scene.until_moving(cards)
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        assert cards.health[1].receiver_pids == ()
        destination.fill(77)  # its owner uses the memory again
        content = destination.digest()
        await asyncio.sleep(0.8)
        assert destination.digest() == content

    scene.run(scenario, source, check_driver=False)


def test_while_one_reader_hangs_the_readers_that_run_are_served_by_the_old_sender_to_their_end(
    scene: CardScene,
) -> None:
    source = scene.own(0, 12 * MIB, seed=3)
    slow, hung, new = (scene.own(card, 12 * MIB) for card in (1, 2, 3))

    async def scenario(cards: CardSupervisor) -> None:
        old = cards.health[0].sender_pid
        await asyncio.gather(*(cards.warm_up(card) for card in (card_name(1), card_name(2), card_name(3))))
        scene.host.inject(Fault.SLOW_LINK, card=1, value=MIB // 4)
        scene.host.inject(Fault.SLOW_LINK, card=2, value=MIB)
        slowly = asyncio.create_task(move(cards, source, slow))
        with pytest.raises(CardTimeout):
            await move(cards, source, hung, timeout=1.0)
        await move(cards, source, new)
        assert new.digest() == source.digest()
        assert cards.health[0].sender_pid != old
        assert not slowly.done(), "they did not overlap"
        assert cards.health[0].retiring_pids == (old,)
        scene.host.clear()
        await slowly
        assert slow.digest() == source.digest()
        await until(lambda: cards.health[0].retiring_pids == ())
        assert not is_alive(old)

    scene.run(scenario, source, check_driver=False)


def test_an_instance_that_dies_while_its_memory_is_read_costs_one_fetch_and_no_other_publication(
    scene: CardScene,
) -> None:
    """H2: the engine would wait for a minute and refuse the key for good; a new publication is read at once."""
    dying, living = scene.own(0, 24 * MIB, seed=3), scene.own(0, 4 * MIB, seed=4)
    destination = scene.own(1, 24 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=SLOW)
        moving = asyncio.create_task(move(cards, dying, destination))
        await scene.until_moving(cards)
        dying.process.kill()
        moving.cancel()  # as the daemon does when the instance's pidfd says so
        with pytest.raises(asyncio.CancelledError):
            await moving
        await cards.unregister(card_name(0), dying.region.region_id)
        scene.host.clear()
        again = own(living.process, 0, 24 * MIB, seed=9)
        await cards.register(card_name(0), again.region)
        await move(cards, again, destination, timeout=40)
        assert destination.digest() == again.digest()
        assert set(scene.host.used_bytes()) == {0, 1}
        await until(lambda: scene.host.used_bytes() == {0: 28 * MIB, 1: 24 * MIB})

    scene.run(scenario, dying, living, check_driver=False)


def test_a_sender_that_dies_is_replaced_by_one_with_the_same_memory_and_its_readers_are_told(scene: CardScene) -> None:
    source, destination = scene.pair(24 * MIB)
    gone = scene.own(0, 2 * MIB, seed=5)
    lost: list[str] = []
    regions_lost: dict[str, str] = {}

    hooks = Hooks(on_offers_lost=lambda keys, _: lost.extend(keys), on_region_lost=regions_lost.__setitem__)

    async def scenario(cards: CardSupervisor) -> None:
        key = fresh_key()
        await cards.offer(card_name(0), key, source.blobs())
        scene.host.inject(Fault.SLOW_LINK, value=SLOW)
        fetching = asyncio.create_task(
            cards.fetch(card_name(1), key, destination.blobs(), [destination.region], timeout=60)
        )
        await scene.until_moving(cards)
        gone.process.kill()
        pid = cards.health[0].sender_pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: lost == [key])
        fetching.cancel()  # as the daemon does with the readers of lost offers
        with pytest.raises(asyncio.CancelledError):
            await fetching
        scene.host.clear()
        await until(lambda: cards.health[0].sender_pid not in (0, pid))
        assert list(regions_lost) == [gone.region.region_id]
        assert "no memory has this key" in regions_lost[gone.region.region_id]
        await move(cards, source, destination)
        assert cards.health[0].state is CardState.READY

    scene.run(scenario, source, gone, hooks=hooks, check_driver=False)
    assert destination.digest() == source.digest()


def test_a_receiver_that_dies_is_an_error_at_once_and_the_next_fetch_works(scene: CardScene) -> None:
    source, destination = scene.pair(24 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=SLOW)
        moving = asyncio.create_task(move(cards, source, destination))
        await scene.until_moving(cards)
        os.kill(cards.health[1].receiver_pids[0], signal.SIGKILL)
        with pytest.raises(CardLost, match="killed by SIGKILL") as caught:
            await moving
        assert caught.value.touched
        assert caught.value.quiesced
        scene.host.clear()
        await move(cards, source, destination)

    scene.run(scenario, source, check_driver=False)
    assert destination.digest() == source.digest()


def test_an_engine_that_fails_costs_the_receiver_because_it_may_go_on_writing(scene: CardScene) -> None:
    source, destination = scene.pair(4 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        key = fresh_key()
        await cards.offer(card_name(0), key, source.blobs((0, MIB)))
        await cards.warm_up(card_name(1))
        (pid,) = cards.health[1].receiver_pids
        with pytest.raises(CardLost, match="dev_mget") as caught:  # other sizes than on offer
            await cards.fetch(
                card_name(1), key, destination.blobs((0, MIB), (MIB, MIB)), [destination.region], timeout=20
            )
        assert caught.value.touched
        assert not is_alive(pid)
        await cards.withdraw(card_name(0), key, OfferEnd.ABANDONED)
        await move(cards, source, destination)

    scene.run(scenario, source, check_driver=False)
    assert destination.digest() == source.digest()


def test_without_a_worker_everything_is_refused_at_once_and_says_so(scene: CardScene) -> None:
    source = scene.own(0, 2 * MIB, seed=3)
    (nobody,) = free_ports(1)

    async def scenario(cards: CardSupervisor) -> None:
        with pytest.raises(CardUnavailable, match=f"no datasystem worker answers at 127.0.0.1:{nobody}"):
            await cards.register(card_name(0), source.region)
        with pytest.raises(CardUnavailable, match="no datasystem worker"):
            await cards.fetch(card_name(0), fresh_key(), source.blobs(), [source.region], timeout=30)
        assert {card.state for card in cards.health} == {CardState.DEGRADED}
        assert "no datasystem worker" in cards.health[0].problem

    scene.run(scenario, worker_port=nobody, check_driver=False)


def test_a_card_that_does_not_open_is_told_in_the_drivers_words_and_the_others_serve(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)
    scene.host.inject(Fault.CARD_UNAVAILABLE, card=5)

    async def scenario(cards: CardSupervisor) -> None:
        states = {card.identity: card.state for card in cards.health}
        assert [identity for identity, state in states.items() if state is CardState.FAILED] == [card_name(5)]
        assert "aclrtSetDevice" in next(card.problem for card in cards.health if card.identity == card_name(5))
        with pytest.raises(CardUnavailable, match="aclrtSetDevice"):
            await cards.register(card_name(5), source.region)
        with pytest.raises(CardUnavailable, match="no card 'npu:77'"):
            await cards.register("npu:77", source.region)
        await cards.register(card_name(0), source.region)
        await move(cards, source, destination)
        scene.host.inject(Fault.CARD_UNAVAILABLE, card=2)
        with pytest.raises(CardUnavailable, match="aclrtSetDevice"):
            await cards.warm_up(card_name(2))
        seen = [cards.health[2].state]
        scene.host.clear()
        await cards.warm_up(card_name(2))
        seen.append(cards.health[2].state)
        assert seen == [CardState.DEGRADED, CardState.READY]

    scene.run(scenario, check_driver=False)


def test_no_driver_at_all_is_a_reason_too(scene: CardScene) -> None:
    async def scenario(cards: CardSupervisor) -> None:
        assert cards.health == []
        assert "libascendcl.so" in cards.problem

    scene.run(scenario, library_path="/nowhere", preload="", check_driver=False)


def test_memory_that_the_driver_does_not_import_is_refused_and_the_card_goes_on(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)
    wrong_card = scene.own(3, 2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        scene.host.inject(Fault.IMPORT_REFUSED, card=0)
        with pytest.raises(CardRefused, match="the driver refuses this import"):
            await cards.register(card_name(0), source.region)
        scene.host.clear()
        with pytest.raises(CardRefused, match="can only be imported there"):
            await cards.register(card_name(0), wrong_card.region)
        await cards.register(card_name(0), source.region)
        scene.host.inject(Fault.IMPORT_REFUSED, card=1)
        with pytest.raises(CardRefused, match="refuses this import") as caught:
            await move(cards, source, destination)
        assert not caught.value.touched
        scene.host.clear()
        await move(cards, source, destination)

    scene.run(scenario, check_driver=False)
    assert destination.digest() == source.digest()


def test_signals_that_the_whole_service_gets_do_not_end_a_card_process_before_the_daemon_is_done(
    scene: CardScene,
) -> None:
    source, destination = scene.pair(2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        pids = [cards.health[0].sender_pid, *cards.health[1].receiver_pids]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        await move(cards, source, destination)
        assert pids == [cards.health[0].sender_pid, *cards.health[1].receiver_pids]

    scene.run(scenario, source, check_driver=False)


DAEMON = """
import asyncio, sys
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.messages import Role
from weight_brokerd.cards.process import CardProcess

async def main():
    configuration = CardsConfiguration("127.0.0.1", int(sys.argv[1]), preload=sys.argv[2])
    children = [await CardProcess.start(role, 0, configuration) for role in Role]
    print(*(child.pid for child in children), file=sys.stderr, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_card_processes_end_when_the_daemon_is_killed(cann_host: CannHost, worker: DatasystemWorker) -> None:
    environment = cann_host.environment()
    arguments = [sys.executable, "-c", DAEMON, str(worker.port), environment.pop("LD_PRELOAD")]
    environment["DATASYSTEM_CLIENT_LOG_DIR"] = str(worker.directory / "clients")
    with subprocess.Popen(
        arguments, env={**os.environ, **environment}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as daemon:
        assert daemon.stderr is not None
        pids = [int(pid) for pid in daemon.stderr.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        daemon.kill()
    asyncio.run(until(lambda: not any(map(is_alive, pids))))


def test_card_processes_do_not_outlive_the_supervisor(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination)

    scene.run(scenario, source)
    owners = {source.process.pid, destination.process.pid}
    assert [pid for pid in scene.host.processes() if is_alive(pid) and pid not in owners] == []
    source.process.call(close_and_free, source.address, bytes.fromhex(source.region.export_key))


def close_and_free(address: int, key: bytes) -> None:
    """What an instance does when its memory is withdrawn."""
    acl.close_key(key)
    acl.free(address)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_worker_that_was_killed_and_started_again_serves_the_next_fetch(
    cann_host: CannHost, start_process: Callable[..., CardProcess]
) -> None:
    worker = DatasystemWorker().start()
    scene = CardScene(cann_host, worker, start_process)
    source, destination = scene.pair(4 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination)
        await asyncio.to_thread(worker.kill)
        await until(lambda: not cards.worker_is_there)
        with pytest.raises(CardUnavailable, match="no datasystem worker"):
            await cards.offer(card_name(0), fresh_key(), source.blobs())
        destination.fill(None)
        await asyncio.to_thread(worker.start)
        await until(lambda: cards.worker_is_there)
        await move(cards, source, destination, timeout=40)
        assert destination.digest() == source.digest()

    try:
        scene.run(scenario, source, check_driver=False)
    finally:
        worker.close()
