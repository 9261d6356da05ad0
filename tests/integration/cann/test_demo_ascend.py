"""The demo on cards as `make demo-ascend-double` runs it: a real broker, a real datasystem worker, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from doubles.cann.build import CannotBuild, build
from doubles.cann.control import CannHost, Fault, card_name
from doubles.cann.run import variables
from support.datasystem_worker import require_wheel

pytestmark = pytest.mark.timeout(400)
TESTS = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "weight_broker.cli.main", "demo", "--device", "npu", "--framework", "acl"]


@pytest.fixture(autouse=True)
def _parts() -> None:
    require_wheel()
    try:
        build()
    except CannotBuild as error:
        pytest.skip(str(error))


def run(command: list[str], tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    mine = {
        "PYTHONPATH": str(TESTS),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(tmp_path / "the-users-own"),
    }
    return subprocess.run(command, env=os.environ | mine | environment, capture_output=True, text=True, timeout=390)


def test_one_instance_reads_the_disk_and_the_other_cards_are_filled_from_it(tmp_path: Path) -> None:
    emulated = [sys.executable, "-m", "doubles.cann.run", "--cards", "3"]
    done = run([*emulated, *DEMO, "--size", "8M", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    first, warm, *filled = answer["instances"]
    assert (first["source"], first["device_id"], warm["source"]) == ("disk", card_name(0), "disk")
    assert [(one["device_id"], one["data_plane"], one["path"]) for one in filled] == [
        (card_name(1), "datasystem", "copy"),
        (card_name(2), "datasystem", "copy"),
        (card_name(0), "datasystem", "copy"),  # the restart
    ]
    assert filled[-1]["source"] in ("instance 2", "instance 3")
    digests = {one["digest"] for one in (first, *filled)}
    assert digests == {answer["expected_digest"]}
    assert sorted((row["device"], row["instance_name"]) for row in answer["status"]["residency"]) == [
        (card_name(0), "instance 4"), (card_name(1), "instance 2"), (card_name(2), "instance 3"),
    ]  # fmt: skip
    assert answer["status"]["host"]["datasystem_worker"]["managed"] is True


CONTAINER = """#!/bin/sh
# A container with the host's second card and the card that is named, of which its process sees the latter.
export CANN_DOUBLE_DEVICES=1,$1 ASCEND_RT_VISIBLE_DEVICES=1
shift
exec unshare --user --map-root-user --mount --net sh -c 'readlink /proc/self/ns/mnt >> "$0"; exec "$@"' {seen} "$@"
"""


def container(tmp_path: Path) -> tuple[Path, Path]:
    """A command that runs another one in a container, and the file with the mount namespaces of all containers."""
    made = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "--net", "true"], capture_output=True)
    if made.returncode:
        pytest.skip(f"namespaces cannot be made: {made.stderr.decode().strip()}")
    command, seen = tmp_path / "container", tmp_path / "namespaces"
    command.write_text(CONTAINER.format(seen=seen))
    command.chmod(0o755)
    return command, seen


def test_instances_in_containers_that_see_other_cards_are_filled_by_a_broker_that_sees_some_of_the_host(
    tmp_path: Path,
) -> None:
    command, namespaces = container(tmp_path)
    with CannHost(cards=7) as host:
        environment = variables(host, visible="1,3,6,7")
        done = run([*DEMO, "--size", "8M", "--run-in", f"{command} {{card}}", "--json"], tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert host.violations() == []
    answer: dict[str, Any] = json.loads(done.stdout)
    first, warm, *filled = answer["instances"]
    cards = [card_name(logical - 1) for logical in (1, 3, 6, 7)]
    assert (first["source"], first["device_id"], warm["source"]) == ("disk", cards[0], "disk")
    assert [(one["device_id"], one["data_plane"], one["path"]) for one in filled] == [
        (card, "datasystem", "copy") for card in (*cards[1:], cards[0])
    ]
    assert {one["digest"] for one in (first, *filled)} == {answer["expected_digest"]}
    assert sorted(card["device_id"] for card in answer["status"]["host"]["cards"]) == sorted(cards)
    found = namespaces.read_text().split()
    assert len(found) == len(answer["instances"])
    assert os.readlink("/proc/self/ns/mnt") not in found
    assert len(set(found)) >= len(cards), "as many at a time"


def test_an_instance_whose_container_lacks_its_card_says_what_it_sees(tmp_path: Path) -> None:
    with CannHost(cards=2) as host:
        run_in = f"env CANN_DOUBLE_DEVICES={CannHost.physical(1)} ASCEND_RT_VISIBLE_DEVICES=0"
        done = run([*DEMO, "--size", "1M", "--run-in", run_in], tmp_path, **variables(host))
    assert done.returncode == 1
    assert f"this process sees {card_name(1)}, not {card_name(0)}, its card" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_fails_with_the_reason_where_there_are_too_few_cards(tmp_path: Path) -> None:
    with CannHost(cards=2) as host:
        host.inject(Fault.CARD_UNAVAILABLE, card=1)
        done = run([*DEMO, "--size", "1M"], tmp_path, **variables(host))
    assert done.returncode == 1
    assert "2 cards are needed and 1 are ready" in done.stderr
    assert "aclrtSetDevice failed" in done.stderr
    assert "Traceback" not in done.stderr
