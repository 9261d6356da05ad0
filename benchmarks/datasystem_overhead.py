"""What do the card processes add to the datasystem's own device transfers?

The same dev_mset, dev_mget and dev_local_delete of the same bytes: by two plain processes with a client each, and by
the card processes through `CardSupervisor`; beside them the copy between cards (peer_copy). All move between two cards
of the double of Ascend's driver, over communicators that are set up. Nothing of it says how fast an NPU is. Run by
`make benchmark-ascend`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import Options
from benchmarks.measure import Samples, interleaved
from benchmarks.report import Budget, Row, milliseconds, number, size

from doubles.cann.control import CannHost
from support import acl
from support import datasystem_actions as engine
from support.card_process import CardProcess
from support.cards import Owned, configuration, own, supervised
from support.datasystem_worker import DatasystemWorker
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

MOST_RATIO = 1.05
MOST_FIRST_BYTE_MILLISECONDS = 15.0
MOST_IDLE_PERCENT = 1.0
TENSORS = (339, 1)
_LEAST_ROUNDS = 30
_SMALL_BYTES = 2 << 20
_SMALL_ROUNDS = 40
_IDLE_SECONDS = 10.0
_TIMEOUT_SECONDS = 120.0

Spans = Sequence[tuple[int, int]]
"""Offset and size of each tensor."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Memory on card 0 and on card 1, and who moves it."""

    source: Owned
    destination: Owned


def run(options: Options) -> list[Row]:
    """See the module."""
    size_bytes = -(-options.size_bytes // acl.CHUNK) * acl.CHUNK
    with contextlib.ExitStack() as stack:
        worker = DatasystemWorker(client_dead_timeout_s=120)
        stack.callback(worker.close)
        worker.start()
        host = stack.enter_context(CannHost(card_bytes=4 * size_bytes + (1 << 30)))
        processes = [stack.enter_context(_process(host, worker)) for _ in range(4)]
        plain, shared = (
            _Pair(own(sender, 0, size_bytes, seed=3), own(reader, 1, size_bytes))
            for sender, reader in (processes[:2], processes[2:])
        )
        for process in processes[:2]:
            process.call(engine.connect, "client", worker.port)
        return asyncio.run(_measure(options, host, worker, plain, shared))


async def _measure(
    options: Options, host: CannHost, worker: DatasystemWorker, plain: _Pair, shared: _Pair
) -> list[Row]:
    rows: list[Row] = []
    async with supervised(configuration(host, worker)) as cards:
        await cards.register(shared.source.card, shared.source.region)
        for tensors in TENSORS:
            spans = _spans(shared.source.size, tensors)
            rows += await _whole_transfers(options, cards, plain, shared, spans)
            rows.append(await _peer_copy(options, cards, shared, spans))
            if not await asyncio.to_thread(_equal, shared, spans):
                raise AssertionError("what arrived is not what was sent")
        rows.append(await _first_byte(cards, plain, shared))
        rows += await _idle(cards, worker)
    if host.violations():
        raise AssertionError(f"the driver was not used as it is to be: {host.violations()}")
    return rows


async def _whole_transfers(
    options: Options, cards: CardSupervisor, plain: _Pair, shared: _Pair, spans: Spans
) -> list[Row]:
    """Times of whole transfers, and of what is not the engine in them."""
    loop = asyncio.get_running_loop()
    steps: list[dict[str, float]] = []
    processor: dict[str, list[float]] = {"broker": [], "plain": []}

    def broker() -> float:
        front, children = time.process_time(), _processor_seconds(*_children(cards))
        steps.append(asyncio.run_coroutine_threadsafe(_move(cards, shared, spans), loop).result())
        used = time.process_time() - front + _processor_seconds(*_children(cards)) - children
        processor["broker"].append(used)
        return steps[-1]["all"]

    def plainly() -> float:
        pids = plain.source.process.pid, plain.destination.process.pid
        used = _processor_seconds(*pids)
        seconds = sum(_move_plainly(plain, spans))
        processor["plain"].append(_processor_seconds(*pids) - used)
        return seconds

    rounds = max(options.rounds, _LEAST_ROUNDS)
    arms = {"broker": broker, "plain": plainly}
    seconds = await asyncio.to_thread(interleaved, arms, rounds=rounds, warm_up=2)
    own_time = Samples(tuple(one["all"] - one["engine"] for one in steps[-rounds:]))
    within = Samples(tuple(one["engine"] for one in steps[-rounds:]))
    used = {arm: sum(values[-rounds:]) / rounds for arm, values in processor.items()}
    ratio = seconds["broker"].ratio_to(seconds["plain"])
    moved = sum(length for _, length in spans)
    what = f"{size(moved)} as {len(spans)} {'tensor' if len(spans) == 1 else 'tensors'}"
    conditions = (
        "reserve, fetch and withdraw; the source registered, the destination mapped and unmapped each time; "
        "the worker, which has a busy loop for each client, kept on one processor"
    )
    return [
        Row(
            f"transfer through the card processes, {what}",
            str(seconds["broker"]),
            f"{seconds['plain']} dev_mset, dev_mget and dev_local_delete in two plain processes",
            f"{number(ratio)} x",
            Budget(ratio, MOST_RATIO, "x the time"),
            f"{conditions}; {rounds} rounds",
        ),
        Row(
            f"of it what is not the engine, {what}",
            str(own_time),
            f"{within} in the engine's three calls of the same transfers",
            f"{number(own_time.ratio_to(within))} x",
            conditions="wall time of the transfer less the time that the card processes spent in the engine",
        ),
        Row(
            f"processor time of it, {what}",
            f"{milliseconds(used['broker'])} of front, sender and receiver",
            f"{milliseconds(used['plain'])} of two plain processes",
            f"{number(used['broker'] / used['plain'])} x",
            conditions="mean; hardly depends on what else the machine does",
        ),
    ]


async def _peer_copy(options: Options, cards: CardSupervisor, shared: _Pair, spans: Spans) -> Row:
    """The same bytes, copied by a process of the destination's card that maps both sides."""
    loop = asyncio.get_running_loop()

    def datasystem() -> float:
        return asyncio.run_coroutine_threadsafe(_move(cards, shared, spans), loop).result()["all"]

    def peer_copy() -> float:
        return asyncio.run_coroutine_threadsafe(_copy(cards, shared, spans), loop).result()

    rounds = max(options.rounds, _LEAST_ROUNDS)
    arms = {"peer_copy": peer_copy, "datasystem": datasystem}
    seconds = await asyncio.to_thread(interleaved, arms, rounds=rounds, warm_up=2)
    return Row(
        f"peer_copy, {size(sum(length for _, length in spans))} as {len(spans)}",
        str(seconds["peer_copy"]),
        f"{seconds['datasystem']} through the datasystem",
        f"{number(seconds['peer_copy'].ratio_to(seconds['datasystem']))} x",
        conditions=f"both sides mapped and unmapped each time; {rounds} rounds",
    )


async def _first_byte(cards: CardSupervisor, plain: _Pair, shared: _Pair) -> Row:
    """A transfer of little is over when its first bytes are there."""
    loop = asyncio.get_running_loop()
    spans = [(0, _SMALL_BYTES)]

    def broker() -> float:
        done = asyncio.run_coroutine_threadsafe(_move(cards, shared, spans), loop).result()
        return done["arrived"]

    def plainly() -> float:
        published, fetched, _ = _move_plainly(plain, spans)
        return published + fetched

    arms = {"broker": broker, "plain": plainly}
    seconds = await asyncio.to_thread(interleaved, arms, rounds=_SMALL_ROUNDS, warm_up=2)
    added = seconds["broker"].less(seconds["plain"]) * 1e3
    return Row(
        "the broker's own time from request to first byte",
        f"{number(added)} ms p50",
        f"{seconds['broker']} with it, {seconds['plain']} in two plain processes",
        budget=Budget(added, MOST_FIRST_BYTE_MILLISECONDS, "ms"),
        conditions=f"a tensor of {size(_SMALL_BYTES)}: until all of it is there; {_SMALL_ROUNDS} rounds",
    )


async def _idle(cards: CardSupervisor, worker: DatasystemWorker) -> list[Row]:
    """Processor time when nothing moves."""
    sender, receiver = cards.health[0].sender_pid, cards.health[1].receiver_pids[0]
    pids = {"the sender of a card": sender, "a receiver of a card": receiver, "the datasystem worker": worker.pid}
    await asyncio.sleep(2.0)  # what the transfers left to do is done
    begun, used = time.process_time(), {what: _processor_seconds(pid) for what, pid in pids.items()}
    await asyncio.sleep(_IDLE_SECONDS)
    front = (time.process_time() - begun) / _IDLE_SECONDS * 100
    conditions = f"over {_IDLE_SECONDS:.0f} s, two cards in use"
    rows = [
        Row(
            "the front (CardSupervisor), idle",
            f"{number(front)} %",
            budget=Budget(front, MOST_IDLE_PERCENT, "% of a processor"),
            conditions=conditions,
        )
    ]
    for what, pid in pids.items():
        percent = (_processor_seconds(pid) - used[what]) / _IDLE_SECONDS * 100
        rows.append(Row(f"{what}, idle", f"{number(percent)} %", conditions=f"{conditions}; the engine's own threads"))
    return rows


async def _move(cards: CardSupervisor, pair: _Pair, spans: Spans) -> dict[str, float]:
    """Seconds until the bytes are there, of all of it, and of what the engine took."""
    key = fresh_key()
    offered: dict[str, float] = {}
    given, taken = pair.source.blobs(*spans), pair.destination.blobs(*spans)

    async def reserve() -> None:
        offered.update((await cards.offer(pair.source.card, key, given)).seconds)

    begun = time.perf_counter()
    fetched = await cards.fetch(
        pair.destination.card, key, taken, [pair.destination.region], timeout=_TIMEOUT_SECONDS, reserve=reserve
    )
    arrived = time.perf_counter()
    withdrawn = await cards.withdraw(pair.source.card, key, OfferEnd.DELIVERED)
    ended = time.perf_counter()
    in_engine = offered["dev_mset"] + fetched.seconds["dev_mget"] + withdrawn.seconds["dev_local_delete"]
    return {"arrived": arrived - begun, "all": ended - begun, "engine": in_engine}


async def _copy(cards: CardSupervisor, pair: _Pair, spans: Spans) -> float:
    """Seconds of the whole copy."""
    source = replace(pair.source.region, device_id=pair.source.card)
    given, taken = pair.source.blobs(*spans), pair.destination.blobs(*spans)
    begun = time.perf_counter()
    regions = [source, pair.destination.region]
    await cards.copy(pair.destination.card, given, taken, regions, timeout=_TIMEOUT_SECONDS)
    return time.perf_counter() - begun


def _move_plainly(pair: _Pair, spans: Spans) -> tuple[float, float, float]:
    """Seconds of the engine's three calls, measured in the processes that make them."""
    key = fresh_key()
    given, taken = ([(side.address + at, length) for at, length in spans] for side in (pair.source, pair.destination))
    outcomes = (
        pair.source.process.call(engine.publish, "client", key, pair.source.device, given),
        pair.destination.process.begin(engine.fetch, "client", key, pair.destination.device, taken)(_TIMEOUT_SECONDS),
        pair.source.process.call(engine.withdraw, "client", key, pair.source.device, _TIMEOUT_SECONDS / 4),
    )
    for outcome in outcomes:
        if outcome.error or outcome.failed_keys:
            raise AssertionError(f"the engine failed: {outcome}")
    published, fetched, withdrawn = outcomes
    return published.seconds, fetched.seconds, withdrawn.seconds


def _spans(size_bytes: int, tensors: int) -> Spans:
    length = size_bytes // tensors // acl.PAGE * acl.PAGE
    return [(index * length, length) for index in range(tensors)]


def _equal(pair: _Pair, spans: Spans) -> bool:
    at, length = spans[-1]
    step = min(length, 1 << 20)
    return all(
        pair.source.read(offset, step) == pair.destination.read(offset, step) for offset in (0, at, at + length - step)
    )


@contextlib.contextmanager
def _process(host: CannHost, worker: DatasystemWorker) -> Iterator[CardProcess]:
    process = CardProcess(host, environment={"DATASYSTEM_CLIENT_LOG_DIR": str(worker.directory / "clients")})
    try:
        yield process
    finally:
        process.close()


def _children(cards: CardSupervisor) -> tuple[int, ...]:
    """All card processes that live."""
    return tuple(
        pid for card in cards.health for pid in (card.sender_pid, *card.retiring_pids, *card.receiver_pids) if pid
    )


def _processor_seconds(*pids: int) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
