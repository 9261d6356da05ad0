"""The double keeps the contract of Ascend's driver, and the contract has a row for every call."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.cann import build
from doubles.cann.control import CannHost
from support.datasystem_worker import require_wheel
from weight_broker.drivers import acl
from weight_brokerd.ascend_check.contract import symbols
from weight_brokerd.ascend_check.contract.row import Row, Verdict, run
from weight_brokerd.ascend_check.contract.table import ROWS, covered
from weight_brokerd.proof.report import markdown

SINCE_9_0 = {"P9.range"}
NEWER = [row for row in ROWS if row.identity in SINCE_9_0 or row in symbols.ROWS]
IDS = [row.identity for row in ROWS]
RULES = [row for row in ROWS if ".machine." not in row.body.__module__]
"""The others need more than the driver, or say what it costs: test_proof.py runs all of them."""


def variables(host: CannHost) -> dict[str, str]:
    found = {**os.environ, **host.environment()}
    del found["LD_PRELOAD"]
    return found


def of(release: str) -> Iterator[dict[str, str]]:
    with CannHost(cards=3, release=release) as host:
        yield variables(host)


@pytest.fixture
def oldest() -> Iterator[dict[str, str]]:
    """CANN 8.5."""
    yield from of("8.5")


@pytest.fixture
def newer() -> Iterator[dict[str, str]]:
    """CANN 9.0."""
    yield from of("9.0")


@pytest.mark.parametrize("row", RULES, ids=lambda row: row.identity)
def test_the_double_keeps_the_contract(oldest: dict[str, str], row: Row) -> None:
    outcome = run(row, oldest)
    expected = Verdict.NOT_RUN if row.identity in SINCE_9_0 else Verdict.AS_SOURCE
    assert outcome.verdict is expected, outcome.seen


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.identity in SINCE_9_0 or row.identity == "P1"], ids=lambda row: row.identity
)
def test_a_newer_release_has_its_functions(newer: dict[str, str], row: Row) -> None:
    assert run(row, newer).verdict is Verdict.AS_SOURCE


def test_in_an_older_release_the_plugin_finds_its_functions_missing() -> None:
    with CannHost(cards=1, release="8.3") as host:
        (row,) = symbols.ROWS
        outcome = run(row, variables(host))
    assert outcome.verdict is Verdict.UNLIKE_SOURCE
    assert "RaInit" in outcome.seen
    assert "aclrtMalloc" not in outcome.seen


def test_every_call_of_the_product_has_a_row() -> None:
    called = set(acl.ARGUMENTS) | {"aclrtGetSocName", "aclGetRecentErrMsg"}
    assert called - covered() == set()


def test_every_call_of_the_datasystems_plugin_has_a_row() -> None:
    assert set(symbols.CALLED) - covered() == set()
    require_wheel()
    found = importlib.util.find_spec("yr.datasystem")
    assert found is not None
    assert found.origin is not None
    plugin = Path(found.origin).parent / "lib" / "libacl_plugin.so"
    listed = subprocess.run(["nm", "-D", "--undefined-only", plugin], capture_output=True, text=True, check=True).stdout
    prefixes = ("acl", "rt", "hrt", "Hccl", "Ra", "_Z11Hccl", "_Z13Hccl")
    names = {line.split()[-1] for line in listed.splitlines() if line.split()[-1].startswith(prefixes)}
    assert names == set(symbols.CALLED) | set(symbols.LINKED_ONLY)


def test_identities_and_functions_are_given() -> None:
    assert len(set(IDS)) == len(IDS)
    assert all(row.functions and row.source and row.needed_by for row in ROWS)


def test_the_table_for_people_is_the_contract() -> None:
    table = Path(build.__file__).with_name("CONTRACT.md").read_text()
    assert table.endswith("\n" + markdown(ROWS)), "write it anew: python -m weight_brokerd.proof npu --table"
