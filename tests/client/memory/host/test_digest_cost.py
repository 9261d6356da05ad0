"""How much is verified by default: everything where that is cheap on this host, else a sample."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from weight_broker import IntegrityError
from weight_broker.digest import DigestAlgorithm, DigestCoverage
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host import copying, digest_cost
from weight_broker.memory.host.export import HostRegion, copy_in, export
from weight_broker.memory.host.streaming import DigestingCopy
from weight_broker.memory.tensors import describe

TENSORS, TENSOR_BYTES = 30, 1 << 20
COPY_SECONDS = 0.002


class Host:
    """A host on which copying takes a certain time, and digesting on the way a certain share of it more."""

    def __init__(self, digest_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digest_share = digest_share
        self.digested = 0
        self._clock = threading.local()
        monkeypatch.setattr(copying, "functions_for", self.functions_for)
        monkeypatch.setattr(digest_cost, "time", SimpleNamespace(perf_counter=self.now))

    def now(self) -> float:
        """Of the thread's own clock, which copying alone makes run."""
        return float(getattr(self._clock, "seconds", 0.0))

    def spend(self, seconds: float) -> None:
        self._clock.seconds = self.now() + seconds

    def functions_for(self, size_bytes: int, algorithm: DigestAlgorithm | None) -> tuple[object, DigestingCopy]:
        copy, copy_and_digest = FUNCTIONS(size_bytes, algorithm)

        def slow_copy(*chunk: int) -> None:
            copy(*chunk)
            self.spend(COPY_SECONDS)

        def slow_copy_and_digest(destination: int, source: int, size_bytes: int, block_bytes: int) -> list[int]:
            self.spend(COPY_SECONDS * (1 + self.digest_share))
            self.digested += 1
            return copy_and_digest(destination, source, size_bytes, block_bytes)

        return slow_copy, slow_copy_and_digest


FUNCTIONS = copying.functions_for


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not copied anything yet; transfers of a few MiB count as large."""
    monkeypatch.setattr(digest_cost, "_shares", {})
    monkeypatch.setattr(digest_cost, "LEAST_BYTES", TENSORS * TENSOR_BYTES)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {f"w{index}": torch.randn(TENSOR_BYTES // 4) for index in range(TENSORS)}


@pytest.fixture
def region(weights: dict[str, torch.Tensor]) -> Iterator[HostRegion]:
    region = export(describe(weights))
    yield region
    region.close()


def fill(weights: dict[str, torch.Tensor], region: HostRegion, mode: DigestMode = DigestMode.AUTO) -> DigestCoverage:
    copied = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    result = copy_in(describe(copied), [region.fd], region.placements, region.digests, digest_mode=mode)
    assert all(torch.equal(copied[name], tensor) for name, tensor in weights.items())
    return result.verified


@pytest.mark.parametrize(("share", "verified"), [(0.0, DigestCoverage.FULL), (1.5, DigestCoverage.SAMPLED)])
def test_everything_is_verified_where_that_is_cheap_and_else_a_sample(
    share: float,
    verified: DigestCoverage,
    weights: dict[str, torch.Tensor],
    region: HostRegion,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Host(share, monkeypatch)
    with caplog.at_level(logging.INFO):
        assert fill(weights, region) is verified
    assert ("samples are verified" in caplog.text) is (verified is DigestCoverage.SAMPLED)


def test_the_first_large_transfer_decides_for_the_process(
    weights: dict[str, torch.Tensor], region: HostRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(1.5, monkeypatch)
    fill(weights, region)
    assert 0 < host.digested < TENSORS
    host.digest_share, host.digested = 0.0, 0
    assert fill(weights, region) is DigestCoverage.SAMPLED
    assert host.digested == 0


def test_a_small_transfer_is_verified_in_full_and_decides_nothing(
    weights: dict[str, torch.Tensor], region: HostRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cost, "LEAST_BYTES", TENSORS * TENSOR_BYTES + 1)
    Host(1.5, monkeypatch)
    assert fill(weights, region) is DigestCoverage.FULL
    assert not digest_cost._shares


def test_whoever_asks_for_everything_gets_it_whatever_it_costs(
    weights: dict[str, torch.Tensor], region: HostRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    Host(1.5, monkeypatch)
    assert fill(weights, region, DigestMode.FULL) is DigestCoverage.FULL


def test_a_sample_still_sees_a_flipped_bit_at_the_end_of_a_tensor(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    Host(1.5, monkeypatch)
    region = export(describe(weights))
    weights["w3"][-1] += 1
    other = export(describe(weights))
    copied = describe({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    with pytest.raises(IntegrityError, match="w3") as caught:
        copy_in(copied, [other.fd], other.placements, region.digests)
    assert caught.value.touched
    region.close()
    other.close()
