"""Names in any language, of any length, on any terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy
import pytest

from support.broker_process import BrokerProcess
from weight_broker import BrokerClient, WeightSetKey

MODEL = "模型/千问-\N{ROCKET}-é"
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def command(broker: BrokerProcess, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "weight_broker.cli.main", *arguments, "--runtime-directory", broker.runtime_directory],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, ASCII_LOCALE, {"LC_ALL": "POSIX"}, {}],
    ids=["ascii", "latin-1", "locale C", "locale POSIX", "as here"],
)
def test_commands_print_names_that_the_output_cannot_carry(broker: BrokerProcess, environment: dict[str, str]) -> None:
    key = WeightSetKey(MODEL, dtype="float32")
    with BrokerClient(broker.runtime_directory, name=MODEL) as client:
        client.publish(key, {"w": numpy.ones(64, "float32")})
        for arguments in (["status"], ["explain", "--model", MODEL, "--dtype", "float32"]):
            done = command(broker, environment, *arguments)
            assert (done.returncode, done.stderr) == (0, b""), done.stderr
            assert key.id[:12].encode() in done.stdout
        done = command(broker, environment, "status", "--json")
        [weight_set] = json.loads(done.stdout.decode(environment.get("PYTHONIOENCODING", "utf-8")))["weight_sets"]
        assert weight_set["key"]["model"] == MODEL


@pytest.mark.parametrize("name", ["x" * 5000, "two\nlines", "mod\udce8le", "\x1b]0;title\x07"])
def test_no_name_keeps_an_instance_from_its_weights(broker: BrokerProcess, name: str) -> None:
    key, weights = WeightSetKey("m", dtype="float32"), {"w": numpy.ones(64, "float32")}
    with BrokerClient(broker.runtime_directory, name=name) as client:
        client.publish(key, weights)
        into = {"w": numpy.zeros(64, "float32")}
        client.acquire(key, into)
        assert into["w"].all()


def test_a_lease_can_be_given_up_for_a_reason_with_any_character(broker: BrokerProcess) -> None:
    key, weights = WeightSetKey("m", dtype="float32"), {"w": numpy.ones(64, "float32")}
    with BrokerClient(broker.runtime_directory, name="loader") as client:
        lease = client.acquire_or_lease(key, weights)
        lease.give_up("mod\udce8le is damaged" * 200)  # type: ignore[union-attr]
        client.publish(key, weights)
