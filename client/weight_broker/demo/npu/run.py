"""`weight-broker demo --device npu`: the main job on Ascend cards.

The instance on the first card loads a checkpoint from disk and publishes it; instances on the other cards, started at
once, are filled from it; then the first is killed and an instance in its place is filled from the others. Fails
unless all of them have the checkpoint's bytes, bit for bit.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from weight_broker.cli import output, status
from weight_broker.cli.failure import CommandError, ExitCode, held
from weight_broker.cli.inspector import Inspector, State
from weight_broker.cli.progress import Progress
from weight_broker.demo import checkpoint as demo_checkpoint
from weight_broker.demo import page_cache
from weight_broker.demo.npu import memory as npu_memory
from weight_broker.demo.npu.report import LEGEND, CardReport
from weight_broker.demo.orders import CardOrder, CardResult
from weight_broker.demo.process import Answering, Broker
from weight_broker.demo.scene import Scene
from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_files
from weight_broker.v1 import resources_pb2 as pb
from weight_broker.v1 import weight_set_pb2

DEFAULT_SIZE = 1_000_000_000
INSTANCES = 3
_SECONDS = 1800.0
_CARDS_SECONDS = 150.0
_GONE_SECONDS = 20.0
_POLL_SECONDS = 0.2
_WORKER_VARIABLES = ("DS_WORKER_ADDR", "WEIGHT_BROKER_DATASYSTEM_WORKER_ADDRESS", "WEIGHT_BROKER_DATASYSTEM_MANAGED")


def run(options: argparse.Namespace) -> ExitCode:
    """Runs the demo on cards and prints what it measured."""
    progress = Progress(quiet=options.json)
    framework, run_in = framework_of(options.framework), prefix_of(options.run_in)
    model_dir = model(options.model_dir, options.size, DEFAULT_SIZE, progress)
    with CardScene(model_dir, framework, progress, run_in) as scene:
        scene.start(options.instances)
        report, state = scene.play()
    failures = report.failures()
    if options.json:
        output.print_json({"model_dir": str(model_dir), **report.to_json(), "status": status.state_to_json(state)})
    else:
        console = output.console()
        for part in (report.table(), report.cold_sentence(), LEGEND):
            console.print(part)
        if not failures:
            console.print(report.verdict(), style="bold green")
        console.print("\nweight-broker status, while all of them were alive:", style="bold")
        for row in status.renderables(state):
            console.print(row)
    for failure in failures:
        print(f"weight-broker: {failure}", file=sys.stderr)
    return ExitCode.FAILED if failures else ExitCode.DONE


def framework_of(wanted: str) -> str:
    """The allocator of the tensors; "auto" is torch_npu if it is installed."""
    installed = importlib.util.find_spec("torch_npu") is not None
    if wanted == "torch_npu" and not installed:
        raise CommandError("torch_npu is not installed here; --framework acl does without", ExitCode.USAGE)
    return wanted if wanted != "auto" else "torch_npu" if installed else "acl"


def model(model_dir: Path | None, size: str | None, default_size: int, progress: Progress) -> Path:
    """The directory of the model to load; writes a model with random weights if `model_dir` is None."""
    if model_dir is not None:
        if size is not None:
            raise CommandError("--size is for the random model; it does not go with --model-dir", ExitCode.USAGE)
        try:
            npu_memory.checkpoint(model_dir)
        except (CheckpointError, OSError) as error:
            raise CommandError(str(error), ExitCode.USAGE) from None
        return model_dir.absolute()
    if importlib.util.find_spec("torch") is None:
        raise CommandError("the random model needs torch: pip install torch, or --model-dir", ExitCode.USAGE)
    try:
        shape = demo_checkpoint.model_shape(demo_checkpoint.parse_size(size) if size is not None else default_size)
    except ValueError as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    title = f"Qwen2 model with random weights, {shape.layers} layers of {shape.hidden}, {output.size(shape.size_bytes)}"
    try:
        with progress.bytes_written(title, shape.size_bytes) as report:
            return demo_checkpoint.ensure_checkpoint(shape.size_bytes, report)
    except OSError as error:
        raise CommandError(f"the model cannot be written: {error}") from error


def driver_variables() -> dict[str, str]:
    """Variables with which a process finds Ascend's libraries; the broker's own processes get the same."""
    path = os.environ.get("WEIGHT_BROKER_CARDS_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": path} if path else {}


def start_broker(scene: Scene) -> Broker:
    """A broker that serves the host's cards, with a managed datasystem worker unless the environment names another."""
    settings = {"WEIGHT_BROKER_CARDS_ENABLED": "on"}
    if not any(os.environ.get(name) for name in _WORKER_VARIABLES):
        settings["WEIGHT_BROKER_DATASYSTEM_MANAGED"] = "true"
    with held():
        broker = Broker(scene.runtime_directory, scene.directory, **settings)
        scene.processes.append(broker)
    broker.wait_until_ready()
    return broker


def wait_for_cards(scene: Scene, tick: Callable[[], None]) -> pb.Host:
    """The host, once its cards are listed and the datasystem worker serves. Raises `CommandError` after 150 seconds."""
    deadline = time.monotonic() + _CARDS_SECONDS
    with Inspector(scene.runtime_directory) as inspector:
        while True:
            tick()
            host = inspector.host()
            if host.device_problem and not npus(host):
                raise CommandError(f"the broker serves no cards: {host.device_problem}")
            # A managed worker listens before it serves; until then there is a problem.
            if npus(host) and host.datasystem_worker.reachable and not host.datasystem_worker.problem:
                return host
            if time.monotonic() > deadline:
                why = host.datasystem_worker.problem or "the datasystem worker is not reachable"
                raise CommandError(f"no card serves after {_CARDS_SECONDS:.0f} s: {output.plain(why)}")
            time.sleep(_POLL_SECONDS)


def npus(host: pb.Host) -> list[pb.Card]:
    return [card for card in host.cards if card.device_kind == weight_set_pb2.DEVICE_KIND_NPU]


def prefix_of(command: str | None) -> list[str]:
    """The words of a command that instances are started with."""
    try:
        words = shlex.split(command or "")
    except ValueError as error:
        raise CommandError(f"--run-in {command!r} is no command: {error}", ExitCode.USAGE) from None
    if words and shutil.which(words[0]) is None:
        raise CommandError(f"--run-in: there is no command {words[0]!r}", ExitCode.USAGE)
    return words


class CardInstance(Answering):
    def __init__(self, order: CardOrder, directory: Path, run_in: Sequence[str] = ()) -> None:
        """`run_in`: words before the instance's command; `{card}` is the number of its card."""
        self.order = order
        arguments = ["-m", "weight_broker.demo.npu.instance", order.to_argument()]
        prefix = [word.replace("{card}", order.device_id.rpartition(":")[2]) for word in run_in]
        super().__init__(order.name, arguments, directory, prefix=prefix, **driver_variables())


class CardScene(Scene):
    """A broker and instances on cards."""

    def __init__(self, model_dir: Path, framework: str, progress: Progress, run_in: Sequence[str] = ()) -> None:
        """`run_in`: as `CardInstance`."""
        super().__init__()
        self._model_dir = model_dir
        self._framework = framework
        self._progress = progress
        self._run_in = run_in
        self._files = checkpoint_files(model_dir)
        self._cards: list[pb.Card] = []

    @property
    def cards(self) -> list[int]:
        """Indices of the cards in use in the broker's processes, the first instance's first."""
        return [card.device_index for card in self._cards]

    def start(self, count: int | None) -> pb.Host:
        """Starts the broker and returns its host. `count`: instances to start at once."""
        with self._progress.step("starting a broker and its datasystem worker, asking the driver for its cards"):
            start_broker(self)
            host = wait_for_cards(self, self._check)
        self._cards = self._usable(host, count)
        return host

    def play(self) -> tuple[CardReport, State]:
        """Runs everything; returns what was measured and the broker's state while all instances were alive."""
        first = self._instance("instance 1", self._cards[0])
        self._open([first])
        page_cache.evict(self._files)
        share = page_cache.resident_share(self._files)
        with self._progress.step(f"{first.name} loads from disk into its card and publishes"):
            first_result = self._results([first])[0]
        if first_result.problems:
            problems, log = "; ".join(first_result.problems), self.processes[0].log_end()
            raise CommandError(f"{first.name} did not become a source: {problems}\nthe broker:{log}")
        warm_result = self._load_warm()
        others = [self._instance(f"instance {number + 2}", card) for number, card in enumerate(self._cards[1:])]
        self._open(others)
        page_cache.evict(self._files)  # so that reading the disk would show
        with self._progress.step(f"{len(others)} instances at once, each on its own card"):
            results = self._results(others)
        digests = {instance.name: self._digest(instance) for instance in (first, *others)}
        with self._progress.step(f"{first.name} is killed (kill -9)"):
            first.kill()
            self.processes.remove(first)
            self._wait_until_gone(first.name)
        # Not earlier: the driver gives a card to one container at a time.
        restarted = self._instance(f"instance {len(others) + 2}", self._cards[0])
        self._open([restarted])
        with self._progress.step(f"{restarted.name} starts on the card of {first.name}"):
            results += self._results([restarted])
        # Digested again: memory that was filled must not change while other instances are filled.
        again = {instance.name: self._digest(instance) for instance in (*others, restarted)}
        with Inspector(self.runtime_directory) as inspector:
            state = inspector.state()
        expected = npu_memory.digest(
            (tensor.name, npu_memory.file_content(tensor)) for tensor in npu_memory.checkpoint(self._model_dir)
        )
        changed = [name for name, found in again.items() if digests.setdefault(name, found) != found]
        report = CardReport(first_result, warm_result, tuple(results), digests, expected, changed, share)
        if report.failures():
            self._progress.say(f"the broker's log ends with:{self.processes[0].log_end(40)}")
        return report, state

    def _usable(self, host: pb.Host, count: int | None) -> list[pb.Card]:
        """The cards to use: one more than the instances started at once."""
        ready = [card for card in npus(host) if card.state == pb.Card.STATE_READY]
        wanted = (count or min(INSTANCES, len(ready) - 1)) + 1
        if wanted < 2 or wanted > len(ready):
            broken = [card for card in npus(host) if card.problem]
            reasons = "".join(f"\n    {card.device_id}: {output.plain(card.problem)}" for card in broken)
            fix = f"take --instances {len(ready) - 1}" if len(ready) > 1 else "the demo needs two"
            raise CommandError(f"{max(wanted, 2)} cards are needed and {len(ready)} are ready; {fix}{reasons}")
        return ready[:wanted]

    def _load_warm(self) -> CardResult:
        warm = self._instance("warm disk", self._cards[-1], broker=False)
        self._open([warm])
        for file in self._files:
            page_cache.read_through(file)
        with self._progress.step("another process loads from the warm page cache, without a broker"):
            result = self._results([warm])[0]
        warm.ask_to_stop()
        warm.stop()
        self.processes.remove(warm)
        return result

    def _instance(self, name: str, card: pb.Card, *, broker: bool = True) -> CardInstance:
        directory = str(self.runtime_directory) if broker else None
        order = CardOrder(name, card.device_id, str(self._model_dir), directory, self._framework, _SECONDS)
        with held():
            instance = CardInstance(order, self.directory, self._run_in)
            self.processes.append(instance)
        return instance

    def _open(self, instances: list[CardInstance]) -> None:
        names = ", ".join(instance.name for instance in instances)
        with self._progress.step(f"{names}: opening the card, allocating memory"):
            for instance in instances:
                instance.answer("ready", time.monotonic() + _SECONDS, self._check)

    def _results(self, instances: list[CardInstance]) -> list[CardResult]:
        for instance in instances:
            instance.tell("begin")
        return [
            CardResult(**instance.answer("done", time.monotonic() + _SECONDS, self._check)["result"])
            for instance in instances
        ]

    def _digest(self, instance: CardInstance) -> str:
        instance.tell("digest")
        return str(instance.answer("digest", time.monotonic() + _SECONDS, self._check)["digest"])

    def _wait_until_gone(self, name: str) -> None:
        deadline = time.monotonic() + _GONE_SECONDS
        with Inspector(self.runtime_directory) as inspector:
            while any(instance.name == name for instance in inspector.instances()):
                if time.monotonic() > deadline:
                    raise CommandError(f"{name} was killed and is still listed after {_GONE_SECONDS:.0f} s")
                time.sleep(_POLL_SECONDS / 10)

    def _check(self) -> None:
        self.processes[0].check_alive()
