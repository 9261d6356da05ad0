"""The daemon as a process: how it starts, what it tells its surroundings, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.broker_process import BrokerProcess
from support.raw_client import RawClient, publish_request
from support.waiting import eventually
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub

StartBroker = Callable[..., BrokerProcess]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = [f"weight_broker.v1.{name}Service" for name in ("WeightBroker", "Inspection", "Administration")]


def run_daemon(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a daemon that is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "weight_brokerd", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def health(broker: BrokerProcess, service: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(broker.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status


def log_events(broker: BrokerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in broker.log.splitlines()]


def main_thread(pid: int) -> tuple[str, int]:
    """Its state, as the kernel abbreviates it, and how often it has gone to sleep."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return fields["State"].split()[0], int(fields["voluntary_ctxt_switches"])


@contextmanager
def running_transfer(broker: BrokerProcess) -> Iterator[tuple[RawClient, Any, str]]:
    """A reader that has been granted a transfer and has not finished it: the reader, its call, the transfer's id."""
    directory = broker.runtime_directory
    with RawClient(directory, "publisher") as publisher, RawClient(directory, "reader") as reader:
        publisher.publish()
        call = reader.acquire()
        yield reader, call, next(call).granted.transfer_id


@pytest.fixture
def service_manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that a service manager listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sink:
        sink.bind(str(tmp_path / "notify"))
        sink.settimeout(60)
        yield sink


def test_a_broker_that_is_ready_is_within_its_budget_of_memory(tmp_path: Path, service_manager: socket.socket) -> None:
    broker = BrokerProcess(tmp_path / "run", NOTIFY_SOCKET=str(tmp_path / "notify"))
    try:
        broker.start()
        assert service_manager.recv(4096).startswith(b"READY=1")
        resident = int(Path(f"/proc/{broker.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert resident < 120e6
    finally:
        broker.close()


def test_an_idle_broker_sleeps_until_something_happens(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory) as publisher:
        publisher.publish()
        states, slept = [], []
        for _ in range(30):
            time.sleep(0.1)
            state, times = main_thread(broker.pid)
            states.append(state)
            slept.append(times)
        assert states.count("S") > 15, "it does not spin"
        assert slept[-1] - slept[0] < 15, "nor does it look whether something has happened"


def test_the_service_manager_hears_ready_status_signs_of_life_and_stopping(
    tmp_path: Path, service_manager: socket.socket, start_broker: StartBroker
) -> None:
    broker = start_broker(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
    assert service_manager.recv(4096).decode().splitlines() == [
        "READY=1",
        "STATUS=0 instances, 0 publications (0.0 GB), 0 transfers",
        f"MAINPID={broker.pid}",
    ]
    with RawClient(broker.runtime_directory) as publisher:
        publisher.publish()
        messages = {service_manager.recv(4096).decode() for _ in range(4)}
        assert messages == {"WATCHDOG=1", "STATUS=1 instances, 1 publications (0.0 GB), 0 transfers"}
    assert broker.terminate() == 0
    service_manager.setblocking(False)  # the broker has ended: nothing more is on its way
    rest = []
    with suppress(BlockingIOError):
        while True:
            rest.append(service_manager.recv(4096).decode())
    assert "STOPPING=1\nSTATUS=draining: 0 transfers run" in rest


def test_the_log_is_one_json_object_a_line_from_beginning_to_end(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory) as publisher:
        publisher.publish()
    assert broker.terminate() == 0
    events = log_events(broker)
    assert [one["event"] for one in events if one["logger"] == "weight_brokerd.daemon.application"] == [
        "ready",
        "draining",
        "stopped",
    ]
    audited = [one["event"] for one in events if one["logger"] == "weight_brokerd.audit"]
    assert audited[:3] == ["attach", "offer_region", "publish"]
    assert {"internal_error", "attendance_failed"}.isdisjoint(one["event"] for one in events)


@pytest.mark.parametrize(("mode", "expected"), [("0660", 0o660), ("0600", 0o600)])
def test_sockets_have_the_configured_permissions(start_broker: StartBroker, mode: str, expected: int) -> None:
    broker = start_broker(WEIGHT_BROKER_BROKER_SOCKET_MODE=mode)
    for name in ("broker.sock", "attach.sock"):
        assert stat.S_IMODE((broker.runtime_directory / name).stat().st_mode) == expected
    assert stat.S_IMODE(broker.runtime_directory.stat().st_mode) == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to any group")
def test_sockets_and_directory_belong_to_the_configured_group(start_broker: StartBroker) -> None:
    broker = start_broker(WEIGHT_BROKER_BROKER_SOCKET_GROUP="daemon")
    directory = broker.runtime_directory
    assert {path.group() for path in (directory, directory / "broker.sock", directory / "attach.sock")} == {"daemon"}


def test_a_directory_may_have_any_name(start_broker: StartBroker) -> None:
    broker = start_broker("a b%41é?#")
    with RawClient(broker.runtime_directory) as instance:
        assert instance.instance_id
    assert sorted(os.listdir(broker.runtime_directory)) == ["attach.sock", "broker.sock", "lock"]
    assert broker.terminate() == 0


def test_health_says_that_every_service_serves(broker: BrokerProcess) -> None:
    assert {name: health(broker, name) for name in ("", "liveness", *SERVICES)} == dict.fromkeys(
        ("", "liveness", *SERVICES), SERVING
    )


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
def test_stock_tools_list_and_call_the_services(broker: BrokerProcess, version: str) -> None:
    command = [
        str(Path(sys.executable).with_name("buf")),
        "curl",
        f"--unix-socket={broker.socket_path}",
        "--protocol=grpc",
        "--http2-prior-knowledge",
        f"--reflect-protocol={version}",
    ]
    listed = subprocess.run(
        [*command, "--list-methods", "http://localhost"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "weight_broker.v1.InspectionService/GetHost" in listed.stdout.split()
    assert "grpc.health.v1.Health/Check" in listed.stdout.split()
    answered = subprocess.run(
        [*command, "http://localhost/weight_broker.v1.InspectionService/GetHost"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(answered.stdout)["host"]["pid"] == broker.pid


def test_metrics_are_served_where_they_are_asked_for_and_nowhere_else(
    start_broker: StartBroker, unused_port: int
) -> None:
    broker = start_broker(WEIGHT_BROKER_METRICS_LISTEN=f"127.0.0.1:{unused_port}")
    with running_transfer(broker) as (reader, _, _), pytest.raises(grpc.RpcError):
        reader.publish("model", region_id="never offered", offer=False)

    def scrape() -> str:
        text: str = urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/metrics", timeout=60).read().decode()
        return text

    publish = 'grpc_method="weight_broker.v1.WeightBrokerService/Publish"'
    refused = f'grpc_server_call_duration_seconds_count{{{publish},grpc_status="FAILED_PRECONDITION"}} 1.0'
    eventually(lambda: refused in scrape())  # a call is counted when it is over, and that is after its answer
    text = scrape()
    assert "weight_broker_instances " in text
    assert f'grpc_server_call_duration_seconds_count{{{publish},grpc_status="OK"}} 1.0' in text
    assert broker.terminate() == 0


def test_every_series_is_there_before_its_first_event_and_hits_differ_from_misses(
    start_broker: StartBroker, unused_port: int
) -> None:
    listen = f"127.0.0.1:{unused_port}"
    broker = start_broker(WEIGHT_BROKER_METRICS_LISTEN=listen)

    def samples() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{listen}/metrics", timeout=60) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def outcomes() -> dict[str, float]:
        prefix = 'weight_broker_acquisitions_total{outcome="'
        return {name.removeprefix(prefix)[:-2]: count for name, count in samples().items() if name.startswith(prefix)}

    first = samples()
    for method in ("Acquire", "Publish", "ReportTransfer"):
        label = f'grpc_method="weight_broker.v1.WeightBrokerService/{method}"'
        assert first[f"grpc_server_call_started_total{{{label}}}"] == 0
        assert first[f'grpc_server_call_duration_seconds_count{{{label},grpc_status="OK"}}'] == 0
    begun = outcomes()
    assert set(begun.values()) == {0}
    assert {"transferred", "cold_load", "weights_not_found", "integrity_error", "transfer_failed"} <= begun.keys()
    with running_transfer(broker) as (reader, call, transfer_id):
        reader.report_success(transfer_id)
        assert next(call).HasField("done")
        with pytest.raises(grpc.RpcError):
            next(reader.acquire("absent"))
        assert next(reader.acquire("absent", if_absent=pb.IF_ABSENT_LOAD)).HasField("cold_load")
        ended = {name: count for name, count in outcomes().items() if count}
        assert ended == {"transferred": 1, "weights_not_found": 1, "cold_load": 1}
        assert outcomes().keys() == begun.keys()


def test_without_metrics_the_broker_has_no_network_socket(broker: BrokerProcess) -> None:
    inodes = {line.removeprefix("socket:[").rstrip("]") for line in broker.descriptors() if line.startswith("socket:")}
    network = [
        line.split()[9] for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    assert inodes.isdisjoint(network)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_sigterm_ends_an_idle_broker_at_once_and_removes_its_sockets(broker: BrokerProcess) -> None:
    assert broker.terminate() == 0
    assert os.listdir(broker.runtime_directory) == ["lock"]


def test_sigterm_lets_a_running_transfer_finish_and_refuses_new_work(broker: BrokerProcess) -> None:
    with running_transfer(broker) as (reader, call, transfer_id):
        os.kill(broker.pid, signal.SIGTERM)
        eventually(lambda: health(broker, "") == NOT_SERVING)
        assert [health(broker, name) for name in SERVICES] == [NOT_SERVING] * 3
        assert health(broker, "liveness") == SERVING
        with pytest.raises(grpc.RpcError) as refused:
            next(reader.acquire("another"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        reader.report_success(transfer_id)
        assert next(call).HasField("done")
    assert broker.process is not None
    assert broker.process.wait(60) == 0


def test_a_transfer_that_does_not_end_is_cut_off_at_the_drain_limit(start_broker: StartBroker) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_DRAIN_SECONDS="0.5")
    with running_transfer(broker) as (_, call, _):
        begun = time.monotonic()
        assert broker.terminate() == 0
        assert time.monotonic() - begun >= 0.5, "the transfer has until then"
        with pytest.raises(grpc.RpcError) as cut_off:
            next(call)
        assert cut_off.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the broker stopped while the transfer ran" in str(cut_off.value)
    assert "cut_off" in [one["event"] for one in log_events(broker)]


def test_a_second_sigterm_ends_the_drain(start_broker: StartBroker) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_DRAIN_SECONDS="600")
    with running_transfer(broker):
        os.kill(broker.pid, signal.SIGTERM)
        eventually(lambda: "draining" in broker.log)
        assert broker.terminate() == 0


def test_an_open_watch_does_not_hold_up_the_stop(broker: BrokerProcess) -> None:
    watch = broker.inspection.Watch(inspection.WatchRequest(), timeout=60)
    assert next(watch).snapshot
    stub: Any = health_pb2_grpc.HealthStub(broker.channel)
    health_watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert next(health_watch).status == SERVING
    os.kill(broker.pid, signal.SIGTERM)
    assert next(health_watch).status == NOT_SERVING
    assert broker.process is not None
    assert broker.process.wait(60) == 0
    assert list(watch)[-1:] == []
    assert list(health_watch) == []
    assert [one["event"] for one in log_events(broker) if one["level"] == "error"] == []


def test_a_broker_that_was_killed_leaves_nothing_in_the_way(broker: BrokerProcess) -> None:
    broker.kill()
    assert sorted(os.listdir(broker.runtime_directory)) == ["attach.sock", "broker.sock", "lock"]
    broker.start()
    with RawClient(broker.runtime_directory) as publisher:
        publisher.publish()
    assert broker.terminate() == 0


def test_generations_and_the_host_id_survive_a_restart_of_either_kind(broker: BrokerProcess) -> None:
    seen: list[int] = []
    hosts: set[str] = set()
    for stop in (broker.kill, broker.terminate, broker.kill):
        with RawClient(broker.runtime_directory) as publisher:
            seen += [publisher.publish(f"model-{index}", region_id=str(index)).generation for index in range(2)]
            hosts.add(broker.host().host_id)
        stop()
        broker.start()
    assert seen == sorted(set(seen))
    assert len(hosts) == 1


def test_a_second_broker_is_told_who_is_there_and_touches_nothing(broker: BrokerProcess) -> None:
    def state() -> list[tuple[str, int, int]]:
        found = {path.name: path.lstat() for path in broker.runtime_directory.iterdir()}
        return sorted((name, one.st_ino, one.st_mtime_ns) for name, one in found.items())

    before = state()
    second = run_daemon(WEIGHT_BROKER_RUNTIME_DIRECTORY=str(broker.runtime_directory))
    assert second.returncode == 3
    assert f"a broker already runs in {broker.runtime_directory}: process {broker.pid}." in second.stderr
    assert state() == before
    assert broker.host().pid == broker.pid
    assert broker.terminate() == 0


def test_a_broker_whose_lock_file_was_deleted_is_still_not_robbed_of_its_sockets(broker: BrokerProcess) -> None:
    (broker.runtime_directory / "lock").unlink()
    second = run_daemon(WEIGHT_BROKER_RUNTIME_DIRECTORY=str(broker.runtime_directory))
    assert second.returncode == 3
    assert broker.host().pid == broker.pid


def test_sighup_reloads_the_log_level_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(f'[broker]\nruntime_directory = "{tmp_path / "run"}"\n')
    log_path = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHT_BROKER_")}
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "weight_brokerd", "--config", str(file)], stderr=log, env=environment
        ) as daemon,
    ):
        try:
            eventually(lambda: '"ready"' in log_path.read_text())
            file.write_text("[log]\nlevel = 'loud'\n")
            daemon.send_signal(signal.SIGHUP)
            eventually(lambda: "reload_refused" in log_path.read_text())
            assert "one of 'debug', 'info', 'warning', 'error'" in log_path.read_text()
            file.write_text("[log]\nlevel = 'error'\n")
            daemon.send_signal(signal.SIGHUP)
            with grpc.insecure_channel(f"unix:{tmp_path}/run/broker.sock") as channel:
                # An answer takes the daemon several turns of its loop, and the signal was there before.
                InspectionServiceStub(channel).GetHost(inspection.GetHostRequest(), timeout=60)
        finally:
            daemon.terminate()
        assert daemon.wait(60) == 0
    events = [json.loads(line)["event"] for line in log_path.read_text().splitlines()]
    assert events == ["ready", "reload_refused", "drain"], "only the audit event is logged at level error"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limits]\npublications = 0\n", "limits.publications is 0 "),
        ("[log]\nlevle = 'info'\n", "log.levle is 'info' "),
        ("[", "expected a TOML file"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_touched(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(text)
    refused = run_daemon("--config", str(file), WEIGHT_BROKER_RUNTIME_DIRECTORY=str(tmp_path / "run"))
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_place_without_room_is_refused_with_what_to_do(tmp_path: Path, unused_port: int) -> None:
    missing = run_daemon(WEIGHT_BROKER_RUNTIME_DIRECTORY=str(tmp_path / "missing" / "run"))
    assert missing.returncode == 1
    assert "set broker.runtime_directory" in missing.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", unused_port))
        taken.listen()
        listening = run_daemon(
            WEIGHT_BROKER_RUNTIME_DIRECTORY=str(tmp_path / "run"),
            WEIGHT_BROKER_METRICS_LISTEN=f"127.0.0.1:{unused_port}",
        )
    assert listening.returncode == 1
    assert f"metrics.listen: 127.0.0.1:{unused_port} cannot be bound" in listening.stderr
    assert os.listdir(tmp_path / "run") == ["lock"]
    for result in (missing, listening):
        assert "Traceback" not in result.stderr


def test_nothing_is_left_open_after_many_instances_came_and_went(broker: BrokerProcess) -> None:
    def kinds() -> list[str]:
        return sorted(line.partition(":")[0] for line in broker.descriptors())

    with RawClient(broker.runtime_directory) as first:
        first.publish()
    broker.host()
    before = kinds()
    for index in range(20):
        with RawClient(broker.runtime_directory) as instance:
            instance.publish(f"model-{index}")
            assert instance.offer_region("spare") == ""
    eventually(lambda: kinds() == before)
    assert (broker.host().region_count, broker.host().instance_count) == (0, 0)


def test_publish_requests_of_a_stranger_are_refused(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory) as instance, pytest.raises(grpc.RpcError) as refused:
        instance.weight_broker.Publish(publish_request(), timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
