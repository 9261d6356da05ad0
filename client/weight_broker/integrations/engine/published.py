"""What this process has published, and how it takes it back before the weights change."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weight_broker.integrations.engine.report import EngineLoad
from weight_broker.transfers.load import SURVIVABLE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from weight_broker.client import BrokerClient
    from weight_broker.key import WeightSetKey
    from weight_broker.load_group import LoadGroup
    from weight_broker.transfers.publication import Publication

RETRACT_TIMEOUT_SECONDS = 120.0


@dataclass(eq=False)
class PublishedModel:
    """A model whose weights are published, or were before its sleep."""

    model: weakref.ref[nn.Module]
    client: BrokerClient
    key: WeightSetKey
    group: LoadGroup | None
    names: tuple[str, ...]
    """The tensors that were published."""
    report: EngineLoad
    logger: logging.Logger
    publication: Publication | None
    asleep: Mapping[str, int] | None = None
    """Digests of the tensors before the sleep; None if they will not be published again."""

    def waited(self, refusal: str) -> None:
        """The publication has waited for a check of the checkpoint."""
        publication = self.publication
        if publication is None:  # retracted meanwhile
            return
        self.report.publication_id, self.report.not_published = publication.id, refusal
        if refusal:
            self.publication = None
            self.logger.warning("%s is loaded but not published: %s", self.report.model, refusal)
            _published.remove(self)


def note(report: EngineLoad) -> None:
    """Keep the report for `reports`."""
    _reports.append(report)


def reports() -> tuple[EngineLoad, ...]:
    """The loads of this process, oldest first."""
    return tuple(_reports)


def add(published: PublishedModel) -> None:
    """Register a publication for `retract` and `republish`."""
    _published.append(published)


def retract(reason: str = "asked to", *, model: nn.Module | None = None, for_sleep: bool = False) -> int:
    """Retract the weights of `model`, or of all models of this process. Returns the number of ended publications, once
    no reader is left. Call it before weights change; the engine's own ways to change them do so by themselves. Raises
    `RetractTimeout` if readers still run: the weights must not change then."""
    ended = 0
    for entry in list(_published):
        if model is not None and entry.model() is not model:
            continue
        if for_sleep and entry.publication is not None and not entry.publication.needs_retraction:
            continue  # a copy, which no sleep changes
        if entry.publication is not None:
            begun = time.monotonic()
            entry.publication.retract(RETRACT_TIMEOUT_SECONDS)
            entry.publication, entry.report.publication_id = None, ""
            ended += 1
            entry.logger.info(
                "retracted weight set %s (%s) in %.3f s", entry.key.id, reason, time.monotonic() - begun
            )  # fmt: skip
        entry.report.not_published = f"retracted: {reason}"
        if not for_sleep or not _note_contents(entry):
            _published.remove(entry)
    return ended


def republish() -> int:
    """Publish weights again that were retracted for a sleep, if their content is unchanged. Returns how many."""
    done = 0
    for entry in list(_published):
        if entry.publication is None and entry.asleep is not None:
            done += _republish(entry)
    return done


def _tensors(entry: PublishedModel) -> dict[str, torch.Tensor]:
    from weight_broker.integrations.engine.stage import processed_tensors
    from weight_broker.integrations.engine.tensors import weight_tensors
    from weight_broker.key import Stage

    model = entry.model()
    collect = processed_tensors if entry.key.stage is Stage.RUNTIME else weight_tensors
    found = collect(model) if model is not None else {}
    return {name: found[name] for name in entry.names if name in found}


def _contents(entry: PublishedModel) -> dict[str, int]:
    from weight_broker.integrations.engine.completeness import content_digests

    return content_digests(_tensors(entry))


def _note_contents(entry: PublishedModel) -> bool:
    """Whether the content before the sleep is known, so that the weights can be published again."""
    try:
        entry.asleep = entry.asleep or _contents(entry)
    except SURVIVABLE as error:
        entry.report.not_published += f", and its content cannot be compared later: {error}"
        entry.logger.warning("weight set %s will not be published again: %s", entry.key.id, error)
        return False
    return True


def _republish(entry: PublishedModel) -> int:
    tensors = _tensors(entry)
    try:
        if len(tensors) < len(entry.names) or _contents(entry) != entry.asleep:
            entry.report.not_published = "the sleep changed the weights"
            entry.logger.warning("weight set %s is not published again: %s", entry.key.id, entry.report.not_published)
            return 0
        entry.publication = entry.client.publish(entry.key, tensors, group=entry.group)
    except SURVIVABLE as error:
        entry.report.not_published = f"publishing failed: {error}"
        entry.logger.warning("weight set %s is not published again: %s", entry.key.id, error)
        return 0
    entry.asleep, entry.report.not_published, entry.report.publication_id = None, "", entry.publication.id
    entry.logger.info("published weight set %s again as %s", entry.key.id, entry.publication.id)
    return 1


_reports: list[EngineLoad] = []
_published: list[PublishedModel] = []


def is_published(model: Any) -> bool:
    """Whether weights of `model` are published now."""
    return any(entry.publication is not None and entry.model() is model for entry in _published)
