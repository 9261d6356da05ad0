"""A campaign: several instances do what a seed says while faults strike them and their broker; a model judges what
happened. `make torture`, or python -m campaign.run."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from campaign.faults import Faults
from campaign.history import History, Recorder, now, read
from campaign.model import violations
from campaign.plan import steps
from campaign.scene import Scene, card_scene, defects_in, host_scene, processes_of, remains
from campaign.seat import Seat
from support.waiting import eventually

SCENES = {"host": host_scene, "npu": card_scene}
LEFT_SECONDS = 90.0
"""How long what is left may take to go: leases that their holders forgot end by themselves."""


@dataclass(frozen=True)
class Order:
    """What kind of campaign, as the command line says it."""

    seed: int
    seats: int = 6
    seconds: float = 0.0
    """Ends after so many seconds; 0: after `operations`."""
    operations: int = 120
    """At each seat, if `seconds` is 0."""
    fault_rate: float = 0.12
    memory: str = "host"

    @property
    def command(self) -> str:
        """Repeats the decisions of this campaign."""
        length = f"--seconds {self.seconds:g}" if self.seconds else f"--operations {self.operations}"
        arguments = f"--seed {self.seed} --seats {self.seats} {length} --fault-rate {self.fault_rate:g}"
        return f"make torture TORTURE_ARGUMENTS='{arguments} --memory {self.memory}'"


def campaign(order: Order, directory: Path) -> History:
    """Runs it; `directory` has the histories and logs afterwards."""
    records = directory / "history"
    records.mkdir()
    with SCENES[order.memory](directory) as scene:
        recorder = Recorder(records / "campaign.jsonl")
        _occupy(order, scene, records, recorder)
        _leave(scene, recorder)
    return read(records)


def summary(history: History) -> str:
    """How much of what happened."""
    calls = Counter(f"{call.operation}: {call.outcome or 'killed'}" for call in history.calls)
    strikes = Counter(strike.kind for strike in history.strikes)
    lines = [f"{len(history.calls)} operations under {len(history.strikes)} faults"]
    for title, counts in (("operations", calls), ("faults", strikes)):
        lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return "\n".join(lines)


def _occupy(order: Order, scene: Scene, records: Path, recorder: Recorder) -> None:
    """Every seat does its steps, in a thread."""
    faults, over = Faults(scene.broker, recorder, memory=order.memory), threading.Event()
    timer = threading.Timer(order.seconds, over.set)
    timer.daemon = True
    if order.seconds:
        timer.start()
    limit = None if order.seconds else order.operations
    with ThreadPoolExecutor(order.seats) as pool:
        futures = []
        for number in range(order.seats):
            seat = Seat(number, scene.memory, records, scene.environment, recorder)
            plan = steps(order.seed, number, operations=scene.operations, fault_rate=order.fault_rate)
            futures.append(pool.submit(seat.run, islice(plan, limit), faults, over))
        try:
            for future in futures:
                future.result()
        finally:
            over.set()
            timer.cancel()


def _leave(scene: Scene, recorder: Recorder) -> None:
    """All instances have ended: nothing of them may stay, and the broker ends as it should."""
    broker = scene.broker
    assert broker.process is not None
    if broker.process.poll() is not None:
        recorder.write("ending", process="broker", status=broker.process.returncode, at=now())
        broker.start()
    with suppress(AssertionError):  # the model sees what is left
        eventually(lambda: not any(remains(broker).values()), within=LEFT_SECONDS)
    left = remains(broker)
    status = broker.terminate()
    recorder.write("ending", process="broker", status=status, at=now())
    with suppress(AssertionError):
        eventually(lambda: not processes_of(broker.runtime_directory))
    left["processes"] = len(processes_of(broker.runtime_directory))
    left["files in the runtime directory"] = len({path.name for path in broker.runtime_directory.iterdir()} - {"lock"})
    recorder.write("remains", **left)
    for text in defects_in(broker.log):
        recorder.write("defect", text=text)
    for text in scene.misuses():
        recorder.write("misuse", text=text)


def main() -> int:
    order = _parse()
    directory = Path(tempfile.mkdtemp(prefix="campaign-"))
    print(f"seed {order.seed}; {order.command}", flush=True)
    history = campaign(order, directory)
    print(summary(history))
    found = violations(history)
    if not found:
        shutil.rmtree(directory)
        print("no violation")
        return 0
    print("\n".join(f"violation: {sentence}" for sentence in found))
    print(f"histories and logs: {directory}\nthe same decisions again: {order.command}")
    return 1


def _parse() -> Order:
    defaults = Order(seed=random.SystemRandom().randrange(1 << 32), seconds=300.0)
    parser = argparse.ArgumentParser(prog="python -m campaign.run", description=__doc__)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--seats", type=int, default=defaults.seats, help="instances at the same time")
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--operations", type=int, default=0, help="at each seat, instead of --seconds")
    parser.add_argument("--fault-rate", type=float, default=defaults.fault_rate, help="faults for each operation")
    parser.add_argument("--memory", choices=sorted(SCENES), default=defaults.memory)
    order = Order(**vars(parser.parse_args()))
    return replace(order, seconds=0.0) if order.operations else order


if __name__ == "__main__":
    sys.exit(main())
