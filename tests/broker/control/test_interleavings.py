"""Any interleaving of what instances do, of deaths, of the directory's answers and of time keeps the promises."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
)

from support.core_machine import CoreMachine
from support.core_values import KEYS, LAYOUTS
from weight_broker.errors import Reason
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import (
    FailureCause,
    IfAbsent,
)
from weight_brokerd.core.publications import PublicationState


class Core(CoreMachine):
    """The promises, looked at after every event."""

    @invariant()
    def everybody_is_answered_or_known(self) -> None:
        assert self.asked == set(self.answers) | self.abandoned | set(self.open)

    @invariant()
    def nobody_waits_while_a_source_is_free(self) -> None:
        for record in self.coordinator.weight_sets:
            for acquisition in record.waiting.values():
                for publication in self.coordinator.publications.of_weight_set(record.key.id):
                    assert (
                        publication.state is not PublicationState.RESIDENT
                        or len(publication.readers) == publication.reader_limit
                        or publication.ref in acquisition.failed_sources
                        or acquisition.layout not in (None, publication.layout)
                        or publication.device_kind not in {acquisition.device_kind, *acquisition.other_kinds}
                    )

    @invariant()
    def whoever_waits_for_a_load_has_one_to_wait_for(self) -> None:
        for record in self.coordinator.weight_sets:
            loads = [one for one in record.waiting.values() if one.if_absent is IfAbsent.LOAD]
            busy = any(
                publication.device_kind in {kind for one in loads for kind in (one.device_kind, *one.other_kinds)}
                and (
                    publication.state is PublicationState.REGISTERING
                    or (
                        publication.state is PublicationState.RESIDENT
                        and len(publication.readers) == publication.reader_limit
                    )
                )
                for publication in self.coordinator.publications.of_weight_set(record.key.id)
            )
            if loads and not busy:
                assert record.lease is not None or record.claim_pending is not None

    @invariant()
    def a_retraction_ends_with_its_last_reader(self) -> None:
        for publication in self.coordinator.publications:
            assert publication.state is not PublicationState.RETRACTING or publication.readers

    @invariant()
    def readers_are_the_running_transfers(self) -> None:
        for publication in self.coordinator.publications:
            running = {
                transfer.reader
                for transfer in self.coordinator.transfers.running.values()
                if transfer.publication is publication and not transfer.is_moved
            }
            assert publication.readers == running

    @invariant()
    def layouts_have_the_room_of_what_holds_them(self) -> None:
        core = self.coordinator
        read = [one.publication for one in core.transfers.running.values() if one.reader in one.publication.readers]
        sources = {publication.publication_id: publication for publication in [*core.publications, *read]}
        layouts = [holder.layout for holder in [*sources.values(), *core.acquisitions]]
        assert len(core.layout_room) == sum(len(layout) for layout in layouts if layout is not None)


class DrainingCore(Core):
    """The same, with a drain at any moment."""

    @initialize(
        target=Core.publications,
        key=st.sampled_from(KEYS),
        layout=st.sampled_from(LAYOUTS),
        if_absent=st.sampled_from(list(IfAbsent)),
    )
    def somebody_reads(self, key: WeightSetKey, layout: Layout, if_absent: IfAbsent) -> object:
        """Running transfers are what a drain waits for."""
        publication_id = self.publish(self.new_instance(), key, layout, fulfils=False)
        self.ask(self.new_instance(), key, layout, if_absent)
        return publication_id

    @precondition(lambda self: not self.coordinator.draining)
    @rule(causes=st.lists(st.sampled_from([None, *FailureCause])))
    def drain(self, causes: list[FailureCause | None]) -> None:
        """Of the transfers that run some end next, the others whenever they like."""
        waiting = {one.acquisition_id for one in self.coordinator.acquisitions.waiting}
        running, published = dict(self.coordinator.transfers.running), list(self.coordinator.publications)
        self.carry_out(self.coordinator.drain(self.now))
        for acquisition_id in waiting:
            answer = self.answers[acquisition_id]
            assert isinstance(answer, decide.Fail)
            assert answer.error.reason is Reason.DRAINING
        assert self.coordinator.transfers.running == running, "running transfers go on"
        assert list(self.coordinator.publications) == published, "and what is published stays"
        for transfer, cause in zip(running.values(), causes, strict=False):
            if transfer.transfer_id in self.granted:
                self.report(transfer, cause)

    @invariant()
    def nobody_waits_during_a_drain(self) -> None:
        if self.coordinator.draining:
            reading = {one.acquisition_id for one in self.coordinator.transfers.running.values()}
            assert set(self.open) == reading
            assert self.coordinator.next_deadline() is None


TestCore = Core.TestCase
TestCore.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestDrainingCore = DrainingCore.TestCase
TestDrainingCore.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
