"""How much is verified: decided by the mode and by what is offered, the same every time."""

from __future__ import annotations

import time

import numpy
import pytest

from weight_broker import digest
from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host import copying
from weight_broker.memory.host.export import copy_in, export
from weight_broker.memory.host.streaming import DigestingCopy
from weight_broker.memory.tensors import describe

XXH3 = ContentDigests(DigestAlgorithm.XXH3_64, DigestCoverage.FULL, 512, (1,))
CRC = ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.FULL, 512, (2,))
SAMPLE = ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED, 4096, (3,))
LARGE_BYTES = 260 << 20


@pytest.mark.parametrize(
    ("mode", "offered", "chosen"),
    [
        (DigestMode.AUTO, [SAMPLE, CRC, XXH3], XXH3),
        (DigestMode.AUTO, [CRC, SAMPLE], SAMPLE),
        (DigestMode.AUTO, [CRC], CRC),
        (DigestMode.FULL, [SAMPLE, CRC, XXH3], XXH3),
        (DigestMode.FULL, [SAMPLE, CRC], CRC),
        (DigestMode.FULL, [SAMPLE], None),
        (DigestMode.SAMPLED, [XXH3, SAMPLE], SAMPLE),
        (DigestMode.SAMPLED, [XXH3], XXH3),
    ],
)
def test_the_mode_chooses_from_what_is_offered(
    mode: DigestMode, offered: list[ContentDigests], chosen: ContentDigests | None
) -> None:
    assert mode.choose(offered) is chosen


def test_without_xxhash_automatic_is_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_xxh3_64", None)
    assert DigestMode.AUTO.choose([XXH3, SAMPLE]) is SAMPLE
    assert DigestMode.AUTO.exported_full_algorithm() is None
    assert DigestMode.FULL.exported_full_algorithm() is DigestAlgorithm.CRC32


def test_the_time_that_digesting_takes_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    functions_for = copying.functions_for

    def slow_digests(size_bytes: int, algorithm: DigestAlgorithm | None) -> tuple[object, DigestingCopy]:
        copy, copy_and_digest = functions_for(size_bytes, algorithm)

        def slow(destination: int, source: int, size_bytes: int, block_bytes: int) -> list[int]:
            time.sleep(0.02)
            return copy_and_digest(destination, source, size_bytes, block_bytes)

        return copy, slow

    region = export(describe({"w": numpy.ones(LARGE_BYTES, numpy.uint8)}))
    monkeypatch.setattr(copying, "functions_for", slow_digests)
    into = describe({"w": numpy.empty(LARGE_BYTES, numpy.uint8)})
    for _ in range(2):
        assert copy_in(into, [region.fd], region.placements, region.digests).verified is DigestCoverage.FULL
    region.close()
