"""The demo's verdict and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from weight_broker.cli import output
from weight_broker.demo import page_cache
from weight_broker.demo.orders import Result

if TYPE_CHECKING:
    from rich.table import Table

_MOVING = ("map", "transfer", "verify")
_WORDS = ("instance", "source", "by", "logits")
_WAYS = {"zero_copy": "map"}
_ASKING = ("attach", "describe", "reserve", "confirm")


@dataclass(frozen=True)
class DemoReport:
    """What a run of the demo measured."""

    first: Result
    """Instance 1: from disk, with a cold page cache where `cold_share` says so."""
    warm: Result
    """The same from a warm page cache, without a broker."""
    others: tuple[Result, ...]
    """The instances that were started at once."""
    cold_share: float | None
    """Share of the checkpoint that was in the page cache when instance 1 began; None if the kernel does not say."""

    @property
    def all(self) -> tuple[Result, ...]:
        """In the order of the table."""
        return (self.first, self.warm, *self.others)

    @property
    def is_cold(self) -> bool:
        """True if instance 1 had to read the disk."""
        return page_cache.was_cold(self.cold_share)

    def failures(self) -> list[str]:
        """Why the demo failed; empty if it did not."""
        found = [f"{result.name}: {problem}" for result in self.all for problem in result.problems]
        found += [
            f"{result.name}: its logits differ from {self.first.name}'s"
            for result in self.all
            if result.logits_digest != self.first.logits_digest
        ]
        found += [f"{result.name}: it read the disk" for result in self.others if result.source == "disk"]
        return found

    def cold_sentence(self) -> str:
        """What the page cache held when instance 1 began."""
        return page_cache.sentence(self.cold_share)

    def speed_up(self, result: Result, baseline: Result) -> float:
        """How many times sooner than `baseline` the weights of `result` were in place."""
        return baseline.ready_seconds / result.ready_seconds

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "cold_page_cache": self.is_cold,
            "page_cache_share": self.cold_share,
            "instances": [
                asdict(result)
                | {
                    "bytes_per_second": bytes_per_second(result),
                    "speed_up_against_cold_disk": self.speed_up(result, self.first) if self.is_cold else None,
                    "speed_up_against_warm_disk": self.speed_up(result, self.warm),
                }
                for result in self.all
            ],
            "failures": self.failures(),
        }

    def table(self) -> Table:
        """One row for each instance; columns that say nothing are left out."""
        rows = [self._row(result) for result in self.all]
        shown = [name for name in rows[0] if any(row[name] not in ("-", "") for row in rows)]
        if len({result.logits_digest for result in self.all}) == 1:
            shown.remove("logits")
        columns = "|".join(name if name in _WORDS else f">{name}" for name in shown)
        table_ = output.table("How each instance got its weights", columns)
        for row in rows:
            table_.add_row(*(row[name] if name in _WORDS else row[name].replace(" ", "") for name in shown))
        return table_

    def _row(self, result: Result) -> dict[str, str]:
        waiting, asking, moving = (_sum(result, names) for names in (("wait",), _ASKING, _MOVING))
        speed = bytes_per_second(result)
        return {
            "instance": result.name,
            "source": output.plain(result.source),
            "by": _WAYS.get(result.path, result.path),
            "ready": output.seconds(result.ready_seconds),
            "read": _seconds(result.disk_seconds),
            "wait": _seconds(waiting),
            "ask": _seconds(asking),
            "move": _seconds(moving),
            "rest": _seconds(max(result.ready_seconds - result.disk_seconds - waiting - asking - moving, 0.0)),
            "GB/s": f"{speed / 1e9:.2f}" if speed is not None else "-",
            "x cold": f"{self.speed_up(result, self.first):.1f}" if self.is_cold else "-",
            "x warm": f"{self.speed_up(result, self.warm):.1f}",
            "disk": output.size(result.disk_bytes) if result.disk_bytes is not None else "?",
            "publish": _seconds(result.publish_seconds),
            "forward": output.seconds(result.forward_seconds),
            "logits": result.logits_digest[:8],
        }


def bytes_per_second(result: Result) -> float | None:
    """Bandwidth while bytes moved; None if none did."""
    moving = result.disk_seconds if result.source == "disk" else _sum(result, _MOVING)
    return result.size_bytes / moving if result.path != "zero_copy" and moving > 0 else None


def _sum(result: Result, phases: tuple[str, ...]) -> float:
    return sum(result.phases.get(name, 0.0) for name in phases)


def _seconds(value: float) -> str:
    return output.seconds(value) if value >= 1e-6 else "-"
