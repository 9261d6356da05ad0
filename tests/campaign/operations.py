"""What an instance of a campaign does. An operation returns what is recorded of it, or raises."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from campaign.history import now
from campaign.plan import Step
from campaign.weights import Memory, blank, checksum_of, content, key_of
from weight_broker import AcquireReport, AttachedTensors, BrokerClient, ColdLoadLease, Publication
from weight_broker.errors import BrokerError

Result = dict[str, Any]
CLOSE_SECONDS = 60.0
FILLING = frozenset({"acquire", "acquire_or_load", "lease", "settle", "publish"})
"""Operations that write to the model's tensors."""


class Instance:
    """What a process has: its client, and what it got from the broker."""

    def __init__(self, name: str, memory: Memory) -> None:
        self.name = name
        self.memory = memory
        self.note: Callable[..., None] = lambda **values: None
        """Records what is known before the end of a call."""
        self.publications: dict[str, Publication] = {}
        self.leases: dict[str, ColdLoadLease] = {}
        self.views: dict[str, AttachedTensors] = {}
        self._client: BrokerClient | None = None

    @property
    def client(self) -> BrokerClient:
        if self._client is None:
            self._client = BrokerClient(name=self.name)
        return self._client

    def possible(self, operation: str, model: str) -> str:
        """The operation, or the one that has to come before it."""
        published = model in self.publications
        if operation in ("publish", "acquire_or_load") and published:
            return "retract"
        if operation in FILLING and published and self.memory.is_shared_in_place:
            return "retract"
        if operation == "settle" and model not in self.leases:
            return "acquire"
        if operation == "retract" and not published:
            return "acquire"
        return operation

    def failed(self, model: str, error: BrokerError) -> None:
        if not error.quiesced:
            self.memory.discard(model)

    def view_checksums(self) -> Mapping[str, str]:
        return {model: checksum_of(views) for model, views in self.views.items()}

    def leave(self) -> None:
        """Closes the client; the next call makes another one."""
        self.views.clear()
        self.leases.clear()
        self.client.close()
        self.publications.clear()
        self._client = None


def publish(instance: Instance, step: Step) -> Result:
    instance.memory.write(step.model, content(step.model))
    return _published(instance, step, None)


def acquire(instance: Instance, step: Step) -> Result:
    instance.memory.write(step.model, blank(step.model))
    tensors = instance.memory.tensors(step.model)
    return _filled(instance.client.acquire(key_of(step.model), tensors, timeout=step.timeout))


def acquire_or_load(instance: Instance, step: Step) -> Result:
    instance.memory.write(step.model, blank(step.model))

    def load() -> None:
        instance.note(loading_since=now())
        time.sleep(step.pause)
        instance.memory.write(step.model, content(step.model))
        instance.note(loaded_at=now())

    tensors = instance.memory.tensors(step.model)
    report = instance.client.acquire_or_load(key_of(step.model), tensors, load, timeout=step.timeout)
    if report.publication is not None:
        instance.publications[step.model] = report.publication
    if report.report is not None:
        return _filled(report.report)
    message = report.acquire_error or report.publish_error or ""
    return {"outcome": "loaded", "has_lease": report.acquire_error is None, "message": message}


def take_lease(instance: Instance, step: Step) -> Result:
    instance.memory.write(step.model, blank(step.model))
    tensors = instance.memory.tensors(step.model)
    outcome = instance.client.acquire_or_lease(key_of(step.model), tensors, timeout=step.timeout)
    if isinstance(outcome, AcquireReport):
        return _filled(outcome)
    instance.leases[step.model] = outcome
    return {"outcome": "leased", "touched": outcome.touched, **_lease(outcome)}


def settle(instance: Instance, step: Step) -> Result:
    lease = instance.leases[step.model]
    if step.settlement == "extend":
        lease.extend(2.0)
        return {"outcome": "extended", **_lease(lease)}
    del instance.leases[step.model]
    if step.settlement == "publish":
        instance.memory.write(step.model, content(step.model))
        return _published(instance, step, lease) | {"fencing_token": lease.fencing_token}
    if step.settlement == "give up":
        lease.give_up("the plan says so")
    return {"outcome": step.settlement, "fencing_token": lease.fencing_token}


def attach(instance: Instance, step: Step) -> Result:
    views = instance.client.attach_tensors(key_of(step.model), framework="numpy", timeout=step.timeout)
    instance.views[step.model] = views
    return {"outcome": "attached", "generation": views.report.source_generation}


def retract(instance: Instance, step: Step) -> Result:
    publication = instance.publications[step.model]
    generation = publication.generation
    publication.retract(timeout=step.timeout)
    del instance.publications[step.model]
    return {"outcome": "retracted", "generation": generation}


def close(instance: Instance, step: Step) -> Result:
    instance.leave()
    return {"outcome": "closed", "left": instance.memory.shared()}


def die(instance: Instance, step: Step) -> Result:
    os._exit(0)


def _published(instance: Instance, step: Step, lease: ColdLoadLease | None) -> Result:
    tensors = instance.memory.tensors(step.model)
    publication = instance.client.publish(key_of(step.model), tensors, lease=lease, timeout=step.timeout)
    replaced, instance.publications[step.model] = instance.publications.get(step.model), publication
    if replaced is not None:
        replaced.retract()
    return {"outcome": "published", "generation": publication.generation}


def _filled(report: AcquireReport) -> Result:
    return {"outcome": "filled", "generation": report.source_generation}


def _lease(lease: ColdLoadLease) -> Result:
    return {"fencing_token": lease.fencing_token, "expires_at": lease.expires_at - time.time() + now()}


OPERATIONS: Mapping[str, Callable[[Instance, Step], Result]] = {
    "publish": publish,
    "acquire": acquire,
    "acquire_or_load": acquire_or_load,
    "lease": take_lease,
    "settle": settle,
    "attach": attach,
    "retract": retract,
    "close": close,
    "die": die,
}
