"""What operators see: the log's lines, audit events, metrics."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from weight_broker.v1 import inspection_service_pb2 as pb
from weight_brokerd import __version__
from weight_brokerd.telemetry.counts import Counts
from weight_brokerd.telemetry.metrics import Metrics

SERVICE = "weight_broker.v1.InspectionService"

LOG_PROGRAM = """
import logging, sys, structlog
from weight_brokerd.telemetry import log
from weight_brokerd.telemetry.audit import audit
log.configure(sys.argv[1], sys.argv[2])
logger = structlog.get_logger("weight_brokerd.test")
structlog.contextvars.bind_contextvars(acquisition_id="acquisition-1")
logger.debug("fine")
logger.info("said", count=2)
logging.getLogger("asyncio").warning("foreign %s", "record")
audit("publish", publication_id="publication-1")
try:
    raise ValueError("broken")
except ValueError:
    logger.exception("failed")
log.set_level("debug")
logger.debug("finer")
"""


def logged(level: str, form: str, environment: dict[str, str] | None = None, stderr: int = subprocess.PIPE) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", LOG_PROGRAM, level, form],
        env={**os.environ, **(environment or {})},
        stderr=stderr,
        text=True,
        timeout=30,
        check=True,
    )
    return finished.stderr or ""


def test_every_line_is_a_json_object_with_the_bound_context() -> None:
    lines = [json.loads(line) for line in logged("info", "json").splitlines()]
    assert [(line["event"], line["level"], line["logger"]) for line in lines] == [
        ("said", "info", "weight_brokerd.test"),
        ("foreign record", "warning", "asyncio"),
        ("publish", "info", "weight_brokerd.audit"),
        ("failed", "error", "weight_brokerd.test"),
        ("finer", "debug", "weight_brokerd.test"),
    ]
    assert {line["acquisition_id"] for line in lines} == {"acquisition-1"}
    assert lines[0]["count"] == 2
    assert lines[0]["timestamp"].endswith("Z")
    assert "ValueError: broken" in lines[3]["exception"]


def test_audit_events_are_logged_whatever_the_level_is() -> None:
    events = [json.loads(line)["event"] for line in logged("error", "json").splitlines()]
    assert events == ["publish", "failed", "finer"]


def test_the_console_format_is_for_people() -> None:
    lines = logged("info", "console").splitlines()
    assert "said" in lines[0]
    assert "count=2" in lines[0]
    assert not lines[0].startswith("{")


def test_under_systemd_every_line_has_its_priority(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with journal.open("w") as stream:
        found = os.fstat(stream.fileno())
        logged("info", "json", {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, stderr=stream.fileno())
    assert [line[:3] for line in journal.read_text().splitlines()] == ["<6>", "<4>", "<6>", "<3>", "<7>"]


def test_a_journal_that_is_not_stderr_gets_no_priorities() -> None:
    assert logged("info", "json", {"JOURNAL_STREAM": "1:2"}).startswith("{")


Context = grpc.aio.ServicerContext[pb.GetHostRequest, pb.GetHostResponse]


async def answer(request: pb.GetHostRequest, context: Context) -> pb.GetHostResponse:
    return pb.GetHostResponse()


async def refuse(request: pb.GetHostRequest, context: Context) -> pb.GetHostResponse:
    await context.abort(grpc.StatusCode.NOT_FOUND, "nothing")


async def fail(request: pb.GetHostRequest, context: Context) -> pb.GetHostResponse:
    raise ValueError("defect")


async def stream(request: pb.GetHostRequest, context: Context) -> AsyncIterator[pb.GetHostResponse]:
    yield pb.GetHostResponse()
    await asyncio.sleep(60)


async def write(request: pb.GetHostRequest, context: Context) -> None:
    await context.write(pb.GetHostResponse())


def make_server(metrics: Metrics, socket: Path) -> grpc.aio.Server:
    """A server whose methods end in every way there is."""
    handlers = {
        method.__name__: make(
            method, pb.GetHostRequest.FromString, response_serializer=pb.GetHostResponse.SerializeToString
        )
        for make, methods in (
            (grpc.unary_unary_rpc_method_handler, (answer, refuse, fail)),
            (grpc.unary_stream_rpc_method_handler, (stream, write)),
        )
        for method in methods
    }
    server = grpc.aio.server(interceptors=[metrics.interceptor()])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"unix:{socket}")
    return server


def call(channel: grpc.Channel, method: str) -> object:
    return channel.unary_unary(f"/{SERVICE}/{method}", pb.GetHostRequest.SerializeToString)(
        pb.GetHostRequest(), timeout=60
    )


def call_stream(channel: grpc.Channel, method: str) -> Any:
    return channel.unary_stream(f"/{SERVICE}/{method}", pb.GetHostRequest.SerializeToString)(
        pb.GetHostRequest(), timeout=60
    )


async def metrics_after(calls: Callable[[grpc.Channel], object], socket: Path) -> dict[str, float]:
    """The samples after `calls`, as Prometheus reads them."""
    counted = Counts(
        1, 2, 3, 4, 5, 6, 7, {"ready": 8, "failed": 0}, {"peer_copy": 9}, {"cold_load": 0}, 10, {}, {"intact": 10}, 11
    )
    metrics = Metrics(lambda: counted, [SERVICE])
    server = make_server(metrics, socket)
    await server.start()
    port = metrics.serve("127.0.0.1", 0)
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            await asyncio.to_thread(calls, channel)
            # A call that was cancelled has ended for the client before it has for the server.
            await asyncio.sleep(0.1)
        text = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        )
    finally:
        await server.stop(0)
        await metrics.close()
    samples = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def duration_count(method: str, status: str) -> str:
    return f'grpc_server_call_duration_seconds_count{{grpc_method="{SERVICE}/{method}",grpc_status="{status}"}}'


def test_calls_are_counted_by_method_and_by_how_they_ended(tmp_path: Path) -> None:
    def calls(channel: grpc.Channel) -> None:
        call(channel, "answer")
        call(channel, "answer")
        for method in ("refuse", "fail"):
            with pytest.raises(grpc.RpcError):
                call(channel, method)
        assert len(list(call_stream(channel, "write"))) == 1
        endless = call_stream(channel, "stream")
        next(endless)
        endless.cancel()

    samples = asyncio.run(metrics_after(calls, tmp_path / "broker.sock"))
    assert samples[f'grpc_server_call_started_total{{grpc_method="{SERVICE}/answer"}}'] == 2
    assert samples[duration_count("answer", "OK")] == 2
    assert samples[duration_count("refuse", "NOT_FOUND")] == 1
    assert samples[duration_count("fail", "UNKNOWN")] == 1
    assert samples[duration_count("write", "OK")] == 1
    assert samples[duration_count("stream", "CANCELLED")] == 1


def test_gauges_show_the_counts_when_they_are_read(tmp_path: Path) -> None:
    samples = asyncio.run(metrics_after(lambda channel: None, tmp_path / "broker.sock"))
    gauges = {name: value for name, value in samples.items() if name.startswith("weight_broker_")}
    assert gauges.pop(f'weight_broker_build_info{{version="{__version__}"}}') == 1
    assert gauges == {
        "weight_broker_instances": 1,
        "weight_broker_publications": 2,
        "weight_broker_regions": 3,
        "weight_broker_region_bytes": 4,
        "weight_broker_running_transfers": 5,
        "weight_broker_waiting_acquisitions": 6,
        "weight_broker_cold_load_leases": 7,
        'weight_broker_cards{state="ready"}': 8,
        'weight_broker_cards{state="failed"}': 0,
        'weight_broker_transfers_total{data_plane="peer_copy"}': 9,
        'weight_broker_acquisitions_total{outcome="cold_load"}': 0,
        "weight_broker_log_lines_dropped_total": 10,
        'weight_broker_damage_reports_total{finding="intact"}': 10,
        "weight_broker_suspect_receivers": 11,
    }


def test_methods_of_other_services_share_one_label(tmp_path: Path) -> None:
    async def labels() -> set[str]:
        metrics = Metrics(lambda: Counts(0, 0, 0, 0, 0, 0, 0), ["another.Service"])
        server = make_server(metrics, tmp_path / "broker.sock")
        await server.start()
        with grpc.insecure_channel(f"unix:{tmp_path / 'broker.sock'}") as channel:
            await asyncio.to_thread(call, channel, "answer")
        await server.stop(0)
        samples = await asyncio.to_thread(
            lambda: [sample for family in metrics.registry.collect() for sample in family.samples]
        )
        return {sample.labels["grpc_method"] for sample in samples if "grpc_method" in sample.labels}

    assert asyncio.run(labels()) == {"other"}
