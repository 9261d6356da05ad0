"""`deploy/ascend-check.sh`: what only an Ascend host can show, as a report in Markdown.

It measures the single steps without a broker (`weight_brokerd.ascend_check.steps`), then runs the demo on cards, and
writes both down beside the versions of everything that is involved. Exit status 1 if anything did not work.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from weight_broker._version import __version__
from weight_broker.cli import output
from weight_broker.cli.doctor import ascend as doctor_ascend
from weight_broker.cli.doctor.findings import Finding, Verdict
from weight_broker.cli.failure import CommandError, ExitCode, held, stoppable
from weight_broker.cli.inspector import Inspector, State
from weight_broker.cli.progress import Progress
from weight_broker.demo.checkpoint import parse_size
from weight_broker.demo.npu import report as demo_npu_report
from weight_broker.demo.npu import run as demo_npu
from weight_broker.demo.npu.report import CardReport
from weight_broker.errors import BrokerError
from weight_broker.memory.npu import driver as npu_driver
from weight_broker.v1 import resources_pb2 as pb
from weight_brokerd.ascend_check.steps import CardProcess, Row, Steps, measure
from weight_brokerd.kinds.npu.settings import hccl_variables

_PACKAGES = ("torch", "torch_npu", "vllm", "vllm-ascend", "openyuanrong-datasystem", "grpcio", "protobuf", "xxhash")
_VARIABLES = (
    "PYTORCH_NPU_ALLOC_CONF", "ASCEND_RT_VISIBLE_DEVICES", "VLLM_ASCEND_ENABLE_NZ", "HCCL_EXEC_TIMEOUT",
    "HCCL_CONNECT_TIMEOUT", "HCCL_OP_EXPANSION_MODE", "ASCEND_HOME_PATH",
)  # fmt: skip


def main() -> int:
    """Runs the check."""
    parser = argparse.ArgumentParser(prog="ascend-check", description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the report goes (standard output)")
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="a model to load (one with random weights)")
    parser.add_argument("--size", metavar="SIZE", help="size of the random model (8G)")
    parser.add_argument("--bytes", type=parse_size, default=1 << 30, metavar="SIZE", help="of each single step (1G)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of each single step (10)")
    parser.add_argument("--instances", type=int, metavar="N", help="started at once in the main job (up to 3)")
    parser.add_argument("--framework", choices=("auto", "acl", "torch_npu"), default="auto", help="as in the demo")
    options = parser.parse_args()
    try:
        with stoppable():
            return _run(options)
    except CommandError as error:
        print(f"ascend-check: {error}", file=sys.stderr)
        return error.code
    except BrokerError as error:
        print(f"ascend-check: {error.message} ({error.reason})", file=sys.stderr)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    progress = Progress(quiet=True)
    framework = demo_npu.framework_of(options.framework)
    model_dir = demo_npu.model(options.model_dir, options.size, 8 << 30, progress)
    with demo_npu.CardScene(model_dir, framework, progress) as stage:
        host = stage.start(options.instances)
        with progress.step("single steps, without a broker"):
            steps = _steps(stage, host, options)
        report, why_not = None, ""
        try:
            report, state = stage.play()
        except CommandError as error:  # the report is to say so
            why_not = f"the main job: {error}"
            with Inspector(stage.runtime_directory) as inspector:
                state = inspector.state()
    failures = [f"{row.what}: {row.problem}" for row in steps.failures()]
    failures += report.failures() if report is not None else [why_not]
    findings = doctor_ascend.findings(state)
    written = "\n".join(_report(options, framework, host, findings, steps, report, state, failures)) + "\n"
    if options.report is not None:
        options.report.write_text(written)
        print(f"the report is in {options.report}", file=sys.stderr)
    else:
        sys.stdout.write(written)
    for failure in failures:
        print(f"ascend-check: {failure}", file=sys.stderr)
    return ExitCode.FAILED if failures else ExitCode.DONE


def _steps(stage: demo_npu.CardScene, host: pb.Host, options: argparse.Namespace) -> Steps:
    """The worker is the broker's, so that both use the same one."""
    variables = demo_npu.driver_variables() | hccl_variables()
    if preload := os.environ.get("WEIGHT_BROKER_CARDS_PRELOAD"):
        variables["LD_PRELOAD"] = preload
    address, _, port = host.datasystem_worker.address.rpartition(":")
    logs = stage.directory / "clients"
    variables["DATASYSTEM_CLIENT_LOG_DIR"] = str(logs)
    started: list[CardProcess] = []

    def start(name: str, card: int) -> CardProcess:
        with held():
            process = CardProcess(name, card, stage.directory, variables)
            started.append(process)
            stage.processes.append(process)
        return process

    by_torch = importlib.util.find_spec("torch_npu") is not None
    worker = (address.strip("[]"), int(port))
    try:
        return measure(
            (stage.cards[0], stage.cards[1]), options.bytes, options.rounds, worker, start, by_torch=by_torch
        )
    finally:
        for process in reversed(started):  # importers before exporters
            process.ask_to_stop()
            process.stop()
            stage.processes.remove(process)


def _report(
    options: argparse.Namespace,
    framework: str,
    host: pb.Host,
    findings: list[Finding],
    steps: Steps,
    report: CardReport | None,
    state: State,
    failures: Sequence[str],
) -> Iterator[str]:
    yield f"# Ascend check of {host.hostname}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    yield ""
    verdict = "Everything worked." if not failures else f"{len(failures)} things did NOT work."
    yield f"**{verdict}** " + (report.verdict() if report is not None and not report.failures() else "")
    if failures:
        yield ""
        yield from (f"- {_cell(one)}" for one in failures)
    yield from ("", "## Host", "", "| What | |", "|---|---|")
    yield from (f"| {name} | {_cell(value)} |" for name, value in _host(host, framework))
    yield from ("", "## Checks", "", "| Check | Verdict | Found |", "|---|---|---|")
    for one in findings:
        fix = f" **{one.fix}**" if one.verdict is not Verdict.OK else ""
        yield f"| {one.check} | {one.verdict} | {_cell(one.found)}{_cell(fix)} |"
    yield from ("", "## Single steps, without a broker", "")
    yield f"Median of {options.rounds} rounds where there are several; two processes on the first card, one on another."
    yield from ("", "| Step | Size | Seconds | GB/s | Least to most |", "|---|---|---|---|---|")
    yield from map(_step, steps.rows)
    yield from ("", "## The main job, through the broker", "")
    if report is None:
        yield "It did not come to its end."
    else:
        rows = report.rows()
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
        yield from ("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows)
        yield from ("", demo_npu_report.LEGEND, "", report.cold_sentence())
    yield from ("", "### Resident at the end", "", "| Card | State | Regions | Instances |", "|---|---|---|---|")
    for card in state.host.cards:
        names = [
            one.instance_name
            for each in state.weight_sets
            for one in each.publications
            if one.device_id == card.device_id
        ]
        shown = output.state(pb.Card.State.Name(card.state))
        yield f"| {card.device_id} | {shown} | {card.region_count} | {_cell(', '.join(names))} |"


def _host(host: pb.Host, framework: str) -> Iterator[tuple[str, str]]:
    yield "weight-broker", __version__
    yield "Cards", ", ".join(f"{card.device_id} {card.soc}" for card in host.cards)
    yield "Driver", npu_driver.installed_version() or "not seen"
    yield "CANN", _cann()
    yield "Kernel, processor", f"{platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"
    yield "Python", platform.python_version()
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    worker = host.datasystem_worker
    yield "Datasystem worker", f"{worker.address}, {'managed' if worker.managed else 'external'}"
    yield "Tensors of the main job", f"allocated by {framework}"
    for name in _VARIABLES:
        if value := os.environ.get(name):
            yield name, value


def _cann() -> str:
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME") or ""
    for path in (Path(home, "version.cfg"), *Path(home or "/nonexistent").glob("*/ascend_toolkit_install.info")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        found = next((line for line in lines if "version" in line.lower()), "")
        return f"{found.strip()} ({path})"
    return f"{home or 'ASCEND_HOME_PATH is not set'}"


def _step(row: Row) -> str:
    if row.problem:
        return f"| {_cell(row.what)} | | not possible | | {_cell(row.problem)} |"
    size = output.size(row.size_bytes) if row.size_bytes else ""
    speed = f"{row.size_bytes / row.median / 1e9:.2f}" if row.size_bytes and row.median > 0 else ""
    spread = f"{output.seconds(min(row.seconds))} to {output.seconds(max(row.seconds))}" if len(row.seconds) > 1 else ""
    return f"| {_cell(row.what)} | {size} | {output.seconds(row.median)} | {speed} | {spread} |"


def _cell(value: str) -> str:
    return output.plain(value.replace("\n", " ")).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
