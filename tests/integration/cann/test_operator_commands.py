"""What operators see of an Ascend host: `weight-broker status`, `doctor` and the metrics, against a real broker."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from doubles.cann.build import build
from doubles.cann.control import Fault, card_name
from support import device_instance as instance
from support.broker_process import BrokerProcess
from support.device_host import DeviceHost, cards
from support.device_instance import Tensor
from support.waiting import eventually
from weight_broker.cli.main import main
from weight_broker.v1 import resources_pb2 as pb

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def host(device_host: DeviceHost, monkeypatch: pytest.MonkeyPatch) -> DeviceHost:
    """A host with 3 cards, whose driver the operator's commands find too."""
    device_host.cann.cards = 3
    for name, value in device_host.cann.environment().items():
        if name.startswith(("CANN_", "ASCEND_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WEIGHT_BROKER_CARDS_LIBRARY_PATH", str(build().libraries))
    return device_host


def run(broker: BrokerProcess, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main([arguments[0], "--runtime-directory", str(broker.runtime_directory), *arguments[1:]])
    return code, capsys.readouterr().out


def doctor(broker: BrokerProcess, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out = run(broker, capsys, "doctor", "--json")
    return code, {one["check"]: one for one in json.loads(out)["findings"]}


def squeezed(text: str) -> str:
    return " ".join(text.split())


def wait_for_cards(broker: BrokerProcess, number: int) -> None:
    eventually(lambda: len(cards(broker)) == number, within=60)


def test_status_shows_cards_the_worker_and_what_lies_where(
    host: DeviceHost, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = host.start_broker()
    first = host.start_instance("first")
    first.call(instance.create, "model", 1, [Tensor("weight", (512, 1024))], 7)
    assert first.call(instance.publish, "model").error == ""
    eventually(lambda: broker.host().datasystem_worker.reachable, within=60)
    code, out = run(broker, capsys, "status")
    card = cards(broker)[card_name(1)]
    assert code == 0
    assert f"Datasystem worker 127.0.0.1:{host.worker.port if host.worker else 0}, external: reachable" in out
    assert f"{card_name(1)} 1 {card.soc} ready {card.sender_pid} - - 1 0 0" in squeezed(out)
    assert f"{card_name(1)} first {first.pid} model" in squeezed(out)
    code, out = run(broker, capsys, "status", "--json")
    state = json.loads(out)
    assert [one["device_id"] for one in state["host"]["cards"]] == [card_name(0), card_name(1), card_name(2)]
    (row,) = state["residency"]
    assert (row["device"], row["instance_name"], row["pid"], row["model"], row["state"], row["size_bytes"]) == (
        card_name(1), "first", first.pid, "model", "STATE_RESIDENT", str(2 * 512 * 1024),
    )  # fmt: skip
    code, found = doctor(broker, capsys)
    assert code == 0, found
    assert {found[f"card {card_name(index)}"]["verdict"] for index in range(3)} == {"ok"}
    assert found["Ascend runtime"]["found"].endswith("sees 3 devices")
    assert found["datasystem worker"]["verdict"] == "ok"


def test_a_card_that_does_not_open_is_told_in_the_drivers_words_and_the_others_serve(
    host: DeviceHost, capsys: pytest.CaptureFixture[str]
) -> None:
    host.cann.inject(Fault.CARD_UNAVAILABLE, card=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    broker = host.start_broker(settings={"WEIGHT_BROKER_METRICS_LISTEN": listen})
    wait_for_cards(broker, 3)
    words = cards(broker)[card_name(2)].problem
    assert "aclrtSetDevice failed" in words
    code, out = run(broker, capsys, "status")
    assert (code, f"failed - - - 0 0 0 {words}" in squeezed(out)) == (0, True)
    code, found = doctor(broker, capsys)
    assert code == 1
    assert found[f"card {card_name(2)}"]["verdict"] == "problem"
    assert words in found[f"card {card_name(2)}"]["found"]
    assert found[f"card {card_name(2)}"]["fix"]
    assert found[f"card {card_name(0)}"]["verdict"] == "ok"
    with urllib.request.urlopen(f"http://{listen}/metrics") as response:
        metrics = response.read().decode()
    assert 'weight_broker_cards{state="ready"} 2.0' in metrics
    assert 'weight_broker_cards{state="degraded"} 0.0' in metrics
    assert 'weight_broker_cards{state="failed"} 1.0' in metrics


def test_a_worker_that_is_away_is_told_with_its_address(host: DeviceHost, capsys: pytest.CaptureFixture[str]) -> None:
    broker = host.start_broker(worker_port=1)
    wait_for_cards(broker, 3)
    code, out = run(broker, capsys, "status")
    assert code == 0
    assert "Datasystem worker 127.0.0.1:1, external: AWAY" in out
    code, found = doctor(broker, capsys)
    assert code == 1
    assert found["datasystem worker"]["verdict"] == "problem"
    assert "127.0.0.1:1" in found["datasystem worker"]["found"]
    assert cards(broker)[card_name(0)].state == pb.Card.STATE_DEGRADED
    assert found[f"card {card_name(0)}"]["verdict"] == "problem"


def test_a_driver_that_cannot_be_asked_is_told(
    host: DeviceHost, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broker = host.start_broker(settings={"WEIGHT_BROKER_CARDS_LIBRARY_PATH": str(tmp_path)})
    eventually(lambda: broker.host().device_problem != "", within=60)
    words = broker.host().device_problem
    assert f"Devices are not served: {words}" in run(broker, capsys, "status")[1]
    code, found = doctor(broker, capsys)
    assert (code, found["devices"]["verdict"]) == (1, "problem")
    assert words in found["devices"]["found"]
