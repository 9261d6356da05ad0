"""The verdict and the table of the demo on cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from weight_broker.cli import output
from weight_broker.demo import page_cache
from weight_broker.demo.orders import CardResult

if TYPE_CHECKING:
    from rich.table import Table

LEGEND = (
    "ready: until every byte is on the card and verified; of that, read: the checkpoint from disk into the card, ask: "
    "the broker, wait: for others, map: exporting and mapping memory, starting card processes and communicators, move: "
    "the bytes, verify: digests on the card. GB/s: over read or move. x cold, x warm: how many times sooner ready than "
    "instance 1 and than `warm disk`, a load from a warm page cache without a broker. Afterwards: publish."
)
PHASES = {
    "wait": ("wait",),
    "ask": ("attach", "describe", "reserve", "confirm"),
    "map": ("map",),
    "move": ("transfer",),
    "verify": ("synchronize", "verify"),
}
"""Columns, and the phases of an acquisition that are in them."""
_WORDS = ("instance", "card", "source", "plane", "path", "digest")


@dataclass(frozen=True)
class CardReport:
    """What a run of the demo on cards measured."""

    first: CardResult
    """Instance 1, from disk."""
    warm: CardResult
    """The same from a warm page cache, without a broker."""
    others: tuple[CardResult, ...]
    """The instances started at once; last, the instance started after instance 1 was killed."""
    digests: Mapping[str, str]
    """Digest of each instance's weights, read back from its card, by the instance's name."""
    expected: str
    """The digest of the checkpoint's files."""
    changed: Sequence[str]
    """Instances whose memory changed after it was filled."""
    cold_share: float | None
    """Share of the checkpoint that was in the page cache when instance 1 began; None if the kernel does not say."""

    @property
    def all(self) -> tuple[CardResult, ...]:
        """In the order of the table."""
        return (self.first, self.warm, *self.others)

    @property
    def is_cold(self) -> bool:
        """True if instance 1 had to read the disk."""
        return page_cache.was_cold(self.cold_share)

    def failures(self) -> list[str]:
        """Why the demo failed; empty if it did not."""
        found = [f"{result.name}: {problem}" for result in self.all for problem in result.problems]
        found += [f"{result.name}: it read the disk" for result in self.others if result.source == "disk"]
        found += [f"{name}: its memory changed after it was filled" for name in self.changed]
        found += [
            f"{name}: what is on its card differs from the checkpoint"
            for name, digest in self.digests.items()
            if digest != self.expected
        ]
        found += [
            f"{result.name}: its card was not read back" for result in self.others if result.name not in self.digests
        ]
        return found

    def verdict(self) -> str:
        """When there are no failures."""
        return (
            f"All {len(self.digests)} instances had exactly the checkpoint's bytes on their cards: "
            f"{self.first.tensor_count} tensors, {output.size(self.first.size_bytes)}, SHA-256 {self.expected[:16]}..."
        )

    def cold_sentence(self) -> str:
        """What the page cache held when instance 1 began."""
        return page_cache.sentence(self.cold_share)

    def speed_up(self, result: CardResult, baseline: CardResult) -> float:
        """How many times sooner than `baseline` the weights of `result` were in place."""
        return baseline.ready_seconds / result.ready_seconds

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "cold_page_cache": self.is_cold,
            "page_cache_share": self.cold_share,
            "expected_digest": self.expected,
            "instances": [
                asdict(result)
                | {
                    "digest": self.digests.get(result.name),
                    "bytes_per_second": bytes_per_second(result),
                    "speed_up_against_cold_disk": self.speed_up(result, self.first) if self.is_cold else None,
                    "speed_up_against_warm_disk": self.speed_up(result, self.warm),
                }
                for result in self.all
            ],
            "failures": self.failures(),
        }

    def rows(self) -> list[dict[str, str]]:
        """The table's cells by column, a row for each instance; columns that say nothing are left out."""
        rows = [self._row(result) for result in self.all]
        if set(self.digests.values()) == {self.expected}:
            for row in rows:
                row["digest"] = ""
        shown = [name for name in rows[0] if any(row[name] not in ("-", "") for row in rows)]
        return [{name: row[name] for name in shown} for row in rows]

    def table(self) -> Table:
        """For a terminal."""
        rows = self.rows()
        columns = "|".join(name if name in _WORDS else f">{name}" for name in rows[0])
        table_ = output.table("How each instance got its weights onto its card", columns)
        for row in rows:
            table_.add_row(*(value if name in _WORDS else value.replace(" ", "") for name, value in row.items()))
        return table_

    def _row(self, result: CardResult) -> dict[str, str]:
        speed = bytes_per_second(result)
        return {
            "instance": result.name,
            "card": result.device_id,
            "source": output.plain(result.source),
            "plane": result.data_plane or "-",
            "path": result.path,
            "ready": output.seconds(result.ready_seconds),
            "read": _seconds(result.disk_seconds),
            **{name: _seconds(seconds_of(result, name)) for name in PHASES},
            "GB/s": f"{speed / 1e9:.2f}" if speed is not None else "-",
            "x cold": f"{self.speed_up(result, self.first):.2f}" if self.is_cold else "-",
            "x warm": f"{self.speed_up(result, self.warm):.2f}",
            "publish": _seconds(result.publish_seconds),
            "digest": self.digests.get(result.name, "")[:8],
        }


def seconds_of(result: CardResult, column: str) -> float:
    """Seconds of an acquisition in the phases of a column of `PHASES`."""
    return sum(result.phases.get(name, 0.0) for name in PHASES[column])


def bytes_per_second(result: CardResult) -> float | None:
    """Bandwidth while bytes moved; None if none did."""
    moving = result.disk_seconds if result.source == "disk" else seconds_of(result, "move")
    return result.size_bytes / moving if moving > 0 else None


def _seconds(value: float) -> str:
    return output.seconds(value) if value >= 1e-6 else "-"
