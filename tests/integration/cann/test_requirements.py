"""Hosts that lack what the broker needs: the broker runs, serves no card, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from doubles.cann.build import build
from support.cann_libraries import RELEASE_8_3, compile_libraries
from support.device_host import DeviceHost, cards
from support.waiting import eventually
from weight_broker.drivers.acl import LIBRARY
from weight_broker.v1 import resources_pb2 as pb


def test_a_cann_of_8_3_is_refused_with_what_to_install(device_host: DeviceHost, tmp_path: Path) -> None:
    compile_libraries(tmp_path, RELEASE_8_3)
    (tmp_path / LIBRARY).symlink_to(build().libraries / LIBRARY)
    broker = device_host.start_broker(settings={"WEIGHT_BROKER_CARDS_LIBRARY_PATH": str(tmp_path)})
    eventually(lambda: broker.host().device_problem != "", within=60)
    problem = broker.host().device_problem
    assert "this CANN is older than 8.5.0: there is no RaInit in libra.so" in problem
    assert "vLLM Ascend 0.13.0rc2" in problem
    assert cards(broker) == {}


@pytest.mark.parametrize(("soc", "name"), [("Ascend310P3", "310P"), ("Ascend910ProB", "910A")])
def test_chips_that_cannot_share_memory_are_failed_cards(device_host: DeviceHost, soc: str, name: str) -> None:
    broker = device_host.start_broker(settings={"CANN_DOUBLE_SOC": soc})
    eventually(lambda: len(cards(broker)) > 0, within=60)
    card = next(iter(cards(broker).values()))
    assert card.state == pb.Card.STATE_FAILED
    assert card.problem.startswith(f"{soc} is a {name}: ")
