"""Stock gRPC tools work against the daemon over its unix socket: they know nothing of it but reflection."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from support.broker_process import BrokerProcess
from support.raw_client import acquire_request
from support.rpc_errors import assert_no_defect
from support.scene import SERVICES, Scene
from weight_broker.wire import key_from_wire

BUF = str(Path(sys.executable).parent / "buf")
OWN_SERVICES = {f"weight_broker.v1.{name}" for name in SERVICES}
INVALID_ARGUMENT_EXIT_STATUS = 3 * 8
"""buf's own rule: eight times the gRPC code."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    broker = BrokerProcess(tmp_path_factory.mktemp("interoperability") / "run")
    try:
        with Scene(broker.start()) as scene:
            yield scene
        assert_no_defect(broker.log)
    finally:
        broker.close()


def buf_curl(scene: Scene, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket"]
    return subprocess.run(
        [*command, str(scene.broker.socket_path), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=scene.broker.runtime_directory,  # no buf.yaml there: what buf knows, it knows from the daemon
    )


def call(scene: Scene, method: str, request: object, *options: str) -> Any:
    """Calls a method of the inspection service without a token."""
    url = f"http://localhost/weight_broker.v1.InspectionService/{method}"
    finished = buf_curl(scene, *options, "--data", json.dumps(request), url)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_buf_lists_the_services_and_their_methods(scene: Scene) -> None:
    services = set(buf_curl(scene, "--list-services", "http://localhost").stdout.split())
    assert services >= OWN_SERVICES | {"grpc.health.v1.Health"}
    methods = set(buf_curl(scene, "--list-methods", "http://localhost").stdout.split())
    for service, names in SERVICES.items():
        assert methods >= {f"weight_broker.v1.{service}/{name}" for name in names}


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
def test_buf_calls_the_daemon_through_either_version_of_reflection(scene: Scene, version: str) -> None:
    host = call(scene, "GetHost", {}, "--reflect-protocol", version)["host"]
    assert host["pid"] == scene.broker.pid
    assert host["publicationCount"] == 1


def test_buf_reads_what_is_resident_and_why(scene: Scene) -> None:
    weight_set_id = key_from_wire(acquire_request("resident").key).id
    [weight_set] = call(scene, "ListWeightSets", {"model": "resident"})["weightSets"]
    assert weight_set["weightSetId"] == weight_set_id
    [publication] = weight_set["publications"]
    assert publication["state"] == "STATE_RESIDENT"
    assert publication["instanceName"] == "publisher"
    explained = call(scene, "Explain", {"weightSetId": weight_set_id})
    assert explained["outcome"] == "OUTCOME_TRANSFER"
    assert explained["candidates"][0]["chosen"]
    missed = call(scene, "Explain", {"weightSetId": "0" * 32})
    assert missed["outcome"] == "OUTCOME_COLD_LOAD"


def test_buf_shows_what_is_wrong_with_a_request(scene: Scene) -> None:
    url = "http://localhost/weight_broker.v1.InspectionService/ListWeightSets"
    finished = buf_curl(scene, "--data", '{"pageSize": 1001}', url)
    assert finished.returncode == INVALID_ARGUMENT_EXIT_STATUS
    error = json.loads(finished.stderr)
    assert error["code"] == "invalid_argument"
    assert "page_size is 1001" in error["message"]
    assert error["details"][0]["type"] == "google.rpc.ErrorInfo"


def test_buf_is_told_that_acquiring_needs_an_attachment(scene: Scene) -> None:
    finished = buf_curl(scene, "--data", "{}", "http://localhost/weight_broker.v1.WeightBrokerService/Acquire")
    assert json.loads(finished.stderr)["code"] == "unauthenticated"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_names_every_service_and_gives_its_schema(scene: Scene, version: str) -> None:
    method = scene.broker.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(OWN_SERVICES)),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol"),
    ]
    listed, *schemas, unknown = method(iter(requests), timeout=60)
    assert {service.name for service in listed.list_services_response.service} >= OWN_SERVICES
    assert all(schema.file_descriptor_response.file_descriptor_proto for schema in schemas)
    assert unknown.error_response.error_code == 5, "NOT_FOUND"
