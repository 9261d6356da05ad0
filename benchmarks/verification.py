"""What does full verification cost, relative to the copy that it goes with?"""

from __future__ import annotations

from benchmarks.harness import Options
from benchmarks.measure import interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import model_shapes, random_content, size_of, touched

from weight_broker.digest import FULL_BLOCK_BYTES, SAMPLE_BLOCK_BYTES, DigestAlgorithm, is_available
from weight_broker.memory.host import copying

MOST_SHARE = 1 / 2


def run(options: Options) -> list[Row]:
    """See the module."""
    shapes = model_shapes(options.size_bytes // 2)
    sources, destinations = random_content(shapes, 1), touched(shapes)
    pieces = [(destinations[name].data_ptr(), source.data_ptr(), source.nbytes) for name, source in sources.items()]
    contents = [(destination, size_bytes) for destination, _, size_bytes in pieces]
    arms = {
        "copy": lambda: copying.copy(pieces),
        "crc32": lambda: _ignore(copying.copy_and_digest(pieces, DigestAlgorithm.CRC32, FULL_BLOCK_BYTES)),
        "sample": lambda: _ignore(copying.digest_samples(contents, DigestAlgorithm.CRC32, SAMPLE_BLOCK_BYTES)),
    }
    if is_available(DigestAlgorithm.XXH3_64):
        arms["xxh3"] = lambda: _ignore(copying.copy_and_digest(pieces, DigestAlgorithm.XXH3_64, FULL_BLOCK_BYTES))
    seconds = interleaved(arms, rounds=2 * options.rounds, warm_up=2)
    conditions = f"{size(size_of(sources))}, {len(sources)} tensors, pre-touched, {copying.thread_count()} threads"
    copy = seconds["copy"]
    rows = []
    for arm, what in (("xxh3", "full XXH3, the default"), ("crc32", "full CRC-32, without xxhash")):
        if arm in seconds:
            share = max(0.0, seconds[arm].ratio_to(copy) - 1.0)
            rows.append(
                Row(
                    f"{what}: extra time over the copy",
                    str(seconds[arm]),
                    str(copy),
                    f"{number(1 + share)} x",
                    Budget(share, MOST_SHARE, "of the copy") if arm == "xxh3" else None,
                    conditions,
                )
            )
    share = seconds["sample"].ratio_to(copy)
    rows.append(
        Row("sampled CRC-32, after the copy", str(seconds["sample"]), str(copy), f"{number(share)} x", None, conditions)
    )
    return rows


def _ignore(_: object) -> None:
    """The digests themselves are not asked for."""
