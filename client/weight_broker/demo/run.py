"""`weight-broker demo`: the main job. Instance 1 loads a model from disk and publishes it; the others, started at once,
are filled from it and never read the disk. Fails unless all of them compute the same logits, bit for bit."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from pathlib import Path

from weight_broker.cli import output, status
from weight_broker.cli.failure import CommandError, ExitCode, held
from weight_broker.cli.inspector import Inspector, State
from weight_broker.cli.progress import Progress
from weight_broker.demo import available_memory as demo_memory
from weight_broker.demo import page_cache
from weight_broker.demo.checkpoint import DEFAULT_SIZE, ensure_checkpoint, model_shape, parse_size
from weight_broker.demo.orders import Order, Result
from weight_broker.demo.process import Broker, Instance
from weight_broker.demo.report import DemoReport
from weight_broker.demo.scene import Scene
from weight_broker.drivers.available_memory import available_bytes
from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_files
from weight_broker.kinds import MemoryKind

_PACKAGES = ("torch", "transformers", "safetensors", "weight_brokerd")
_LEGEND = (
    "ready: until every weight is in place; of that, read: the checkpoint, ask: the broker, wait: for others, move: "
    "the bytes, digests included, rest: key, empty model, assignment. GB/s: over read or move. x cold, x warm: how "
    "many times sooner ready than instance 1 and than `warm disk`, a load from a warm page cache without a broker. "
    "disk: what came from it. map: nothing is copied, pages are shared until a process writes to them. Afterwards: "
    "publish, and a first forward pass."
)
_INSTANCE_SECONDS = 1800.0
_INSTANCES = 3
_ON_DEVICES = {MemoryKind.NPU: "weight_broker.demo.npu.run"}
"""The demo of each kind of device memory; every other kind has this one."""


def run(options: argparse.Namespace) -> ExitCode:
    """Runs the demo and prints what it measured."""
    if (module := _ON_DEVICES.get(options.device)) is not None:
        code: ExitCode = importlib.import_module(module).run(options)
        return code
    if options.run_in is not None:
        raise CommandError("--run-in is for instances on cards; it needs --device npu", ExitCode.USAGE)
    options.instances = options.instances or _INSTANCES
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"the demo needs {', '.join(missing)}: pip install 'weight-broker[demo]'", ExitCode.USAGE)
    progress = Progress(quiet=options.json)
    model_dir = _model(options, progress)
    with _HostScene(model_dir, progress) as scene:
        report, state = scene.play(options.instances)
    failures = report.failures()
    if options.json:
        output.print_json({"model_dir": str(model_dir), **report.to_json(), "status": status.state_to_json(state)})
    else:
        _print(report, state)
    for failure in failures:
        print(f"weight-broker: {failure}", file=sys.stderr)
    return ExitCode.FAILED if failures else ExitCode.DONE


class _HostScene(Scene):
    """A broker and instances in host memory."""

    def __init__(self, model_dir: Path, progress: Progress) -> None:
        super().__init__()
        self._model_dir = model_dir
        self._progress = progress
        self._files = checkpoint_files(model_dir)

    def play(self, count: int) -> tuple[DemoReport, State]:
        """Runs everything; returns what was measured and the broker's state while all instances were alive."""
        with self._progress.step("starting a broker"):
            with held():
                broker = Broker(self.runtime_directory, self.directory, WEIGHT_BROKER_CARDS_ENABLED="off")
                self.processes.append(broker)
            broker.wait_until_ready()
        first = self._instance("instance 1", zero_copy=True)
        self._import([first])
        page_cache.evict(self._files)
        share = page_cache.resident_share(self._files)
        with self._progress.step("instance 1 loads from disk and publishes"):
            first_result = self._results([first])[0]
        warm = self._instance("warm disk", zero_copy=False, broker=False)
        self._import([warm])
        for file in self._files:
            page_cache.read_through(file)
        with self._progress.step("another process loads from the warm page cache, without a broker"):
            warm_result = self._results([warm])[0]
        warm.ask_to_stop()
        warm.stop()
        # Copy and map alternate, the copy first.
        others = [self._instance(f"instance {number + 2}", zero_copy=number % 2 == 1) for number in range(count)]
        self._import(others)
        # Emptied so that a read from disk would show.
        page_cache.evict(self._files)
        with self._progress.step(f"{count} instances at once are filled from instance 1"):
            results = self._results(others)
        with Inspector(self.runtime_directory) as inspector:
            state = inspector.state()
        return DemoReport(first_result, warm_result, tuple(results), share), state

    def _instance(self, name: str, *, zero_copy: bool, broker: bool = True) -> Instance:
        directory = str(self.runtime_directory) if broker else None
        order = Order(name, str(self._model_dir), directory, zero_copy, _INSTANCE_SECONDS)
        with held():
            instance = Instance(order, self.directory)
            self.processes.append(instance)
        return instance

    def _import(self, instances: list[Instance]) -> None:
        names = ", ".join(instance.name for instance in instances)
        with self._progress.step(f"{names}: importing torch and transformers"):
            for instance in instances:
                instance.wait_until_imported(time.monotonic() + _INSTANCE_SECONDS, self._check)

    def _results(self, instances: list[Instance]) -> list[Result]:
        for instance in instances:
            instance.begin()
        return [instance.result(time.monotonic() + _INSTANCE_SECONDS, self._check) for instance in instances]

    def _check(self) -> None:
        self.processes[0].check_alive()


def _model(options: argparse.Namespace, progress: Progress) -> Path:
    """The directory of the model to load; writes a model if the options name none."""
    plan = demo_memory.Plan(copying=(options.instances + 1) // 2, mapping=options.instances // 2)
    available = available_bytes()
    if options.model_dir is not None:
        if options.size is not None:
            raise CommandError("--size is for the random model; it does not go with --model-dir", ExitCode.USAGE)
        try:
            size = sum(file.stat().st_size for file in checkpoint_files(options.model_dir))
        except (CheckpointError, OSError) as error:
            raise CommandError(str(error), ExitCode.USAGE) from None
        _check_memory(size, plan, available)
        model_dir: Path = options.model_dir
        return model_dir.absolute()
    if options.size is not None:
        try:
            size = parse_size(options.size)
        except ValueError as error:
            raise CommandError(str(error), ExitCode.USAGE) from None
        _check_memory(size, plan, available)
    else:
        size = demo_memory.fitting_size(DEFAULT_SIZE, plan, available)
        if size != DEFAULT_SIZE and available is not None:
            progress.say(
                f"a model of {output.size(DEFAULT_SIZE)} needs {output.size(plan.needed_bytes(DEFAULT_SIZE))} of "
                f"memory, {output.size(available)} are available: using a model of {output.size(size)}"
            )
    shape = model_shape(size)
    title = f"Qwen2 model with random weights, {shape.layers} layers of {shape.hidden}, {output.size(shape.size_bytes)}"
    try:
        with progress.bytes_written(title, shape.size_bytes) as report:
            return ensure_checkpoint(size, report)
    except OSError as error:
        raise CommandError(f"the model cannot be written: {error}") from error


def _check_memory(size: int, plan: demo_memory.Plan, available: int | None) -> None:
    needed = plan.needed_bytes(size)
    if available is not None and needed > available:
        raise CommandError(
            f"this needs about {output.size(needed)} of memory and {output.size(available)} are available; take a "
            "smaller model (--size) or fewer instances (--instances)"
        )


def _print(report: DemoReport, state: State) -> None:
    console = output.console()
    console.print(report.table())
    console.print(report.cold_sentence())
    console.print(_LEGEND)
    if not report.failures():
        console.print(f"All {len(report.all)} logits are identical, bit for bit.", style="bold green")
    console.print("\nweight-broker status, while all of them were alive:", style="bold")
    for row in status.renderables(state):
        console.print(row)
