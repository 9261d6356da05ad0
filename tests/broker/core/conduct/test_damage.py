"""A report of damage is a claim: what follows from it is decided by a check, or by independent witnesses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.local_core import LocalCoordinator as Coordinator
from weight_broker.errors import IntegrityError, TransferFailed
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.answers import Outcome, Question
from weight_brokerd.core.conduct.damage import CHECK_HOLDS_SECONDS, FALSE_REPORTS_OF_A_SUSPECT
from weight_brokerd.core.model import (
    Acquisition,
    FailureCause,
    Finding,
    IfAbsent,
    Instance,
    Limits,
    TransferPath,
)
from weight_brokerd.core.publications import Offer, Publication, PublicationState

KEY = WeightSetKey("model")
LAYOUT = Layout([TensorSpec("weight", "int8", (8,), (1,), 8)])
PUBLISHER_UID = 100


class Scene:
    """A coordinator, publishers of one user, receivers of any."""

    def __init__(self) -> None:
        self.core = Coordinator(host_id="host", limits=Limits())
        self.number = 0

    def attach(self, uid: int = PUBLISHER_UID, pid: int = 0) -> str:
        self.number += 1
        name = f"instance-{self.number}"
        self.core.attach(Instance(name, name, pid or 1000 + self.number, uid, uid, 0.0))
        return name

    def publish(self) -> Publication:
        instance_id = self.attach()
        offer = Offer(KEY, LAYOUT, instance_id, "cpu", "", 0, f"request of {instance_id}")
        publication, _ = self.core.publish(offer, 0.0)
        self.core.held(publication, 0.0)
        return publication

    def ask(self, instance_id: str, if_absent: IfAbsent = IfAbsent.FAIL) -> decide.Decisions:
        self.number += 1
        path = TransferPath.COPY
        wanted = Acquisition(f"a-{self.number}", KEY, LAYOUT, instance_id, if_absent, "cpu", "", path, 0.0, 1e9)
        return self.core.acquire(wanted, 0.0)

    def source_of(self, decisions: decide.Decisions) -> Publication | None:
        grants = [decision for decision in decisions if isinstance(decision, decide.Grant)]
        return grants[0].transfer.publication if grants else None

    def report(self, instance_id: str, now: float = 1.0) -> decide.Decisions:
        """The instance acquires and says that the bytes were wrong."""
        [transfer] = [d.transfer for d in self.ask(instance_id) if isinstance(d, decide.Grant)]
        cause = FailureCause.DIGEST_MISMATCH
        return self.core.transfer_failed(transfer.transfer_id, instance_id, cause, "weight", now)

    def check(self, publication: Publication, finding: Finding, now: float = 1.0) -> list[decide.DamageJudged]:
        decisions = self.core.checked(publication, finding, "the reason", now)
        return [decision for decision in decisions if isinstance(decision, decide.DamageJudged)]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def checks(decisions: decide.Decisions) -> list[Publication]:
    return [decision.publication for decision in decisions if isinstance(decision, decide.CheckContent)]


def test_a_report_has_the_source_checked_and_changes_nothing_for_others(scene: Scene) -> None:
    publication, liar, honest = scene.publish(), scene.attach(7), scene.attach(8)
    assert checks(scene.report(liar)) == [publication]
    assert publication.state is PublicationState.RESIDENT
    assert scene.source_of(scene.ask(honest)) is publication, "the source serves while it is checked"
    [judged] = scene.check(publication, Finding.INTACT)
    assert (judged.report.instance_id, judged.report.process.uid, judged.is_quarantined) == (liar, 7, False)
    assert publication.state is PublicationState.RESIDENT
    assert scene.source_of(scene.ask(honest)) is publication


def test_what_fails_the_check_is_quarantined(scene: Scene) -> None:
    publication, receiver = scene.publish(), scene.attach(7)
    scene.report(receiver)
    [judged] = scene.check(publication, Finding.DAMAGED)
    assert judged.is_quarantined
    assert (publication.state, publication.quarantine_reason) == (PublicationState.QUARANTINED, "the reason")
    assert scene.core.damage.false_reports(judged.report.process) == 0


def test_reports_during_a_check_wait_for_its_end(scene: Scene) -> None:
    publication, one, two = scene.publish(), scene.attach(7), scene.attach(8)
    assert checks(scene.report(one)) == [publication]
    assert checks(scene.report(two)) == []
    assert [judged.report.instance_id for judged in scene.check(publication, Finding.INTACT)] == [one, two]


def test_a_check_answers_the_reports_that_follow_until_it_is_old(scene: Scene) -> None:
    publication = scene.publish()
    scene.report(scene.attach(7))
    scene.check(publication, Finding.INTACT, now=1.0)
    soon = scene.report(scene.attach(7), now=CHECK_HOLDS_SECONDS)
    assert checks(soon) == []
    assert [decision.finding for decision in soon if isinstance(decision, decide.DamageJudged)] == [Finding.INTACT]
    assert checks(scene.report(scene.attach(7), now=2 * CHECK_HOLDS_SECONDS)) == [publication]


def test_a_receiver_is_not_sent_again_to_a_source_that_it_accused(scene: Scene) -> None:
    first, second = scene.publish(), scene.publish()
    receiver = scene.attach(7, pid=5)
    assert scene.source_of(scene.report(receiver)) is second
    scene.check(first, Finding.INTACT)
    again = scene.attach(7, pid=5)
    assert scene.source_of(scene.ask(again)) is second, "the same process, attached again"
    scene.core.evict(second.publication_id, 2.0)
    answer = scene.ask(again, IfAbsent.LOAD)
    assert [type(decision) for decision in answer if isinstance(decision, decide.ClaimLease)] == [decide.ClaimLease]
    apart_from = scene.core.damage.apart_from(scene.core.instances[again].process)
    question = Question(KEY.id, KEY, LAYOUT, apart_from=apart_from)
    assert scene.core.explain(question).outcome is not Outcome.TRANSFER
    assert scene.core.explain(replace(question, apart_from={})).outcome is Outcome.TRANSFER


def test_the_error_says_that_the_bytes_were_wrong_and_the_next_time_that_the_source_is_not_tried(scene: Scene) -> None:
    scene.publish()
    receiver = scene.attach(7)
    [error] = [decision.error for decision in scene.report(receiver) if isinstance(decision, decide.Fail)]
    assert isinstance(error, IntegrityError)
    [later] = [decision.error for decision in scene.ask(receiver) if isinstance(decision, decide.Fail)]
    assert isinstance(later, TransferFailed)
    assert "this process reported wrong bytes in transfer-1: weight" in later.message


def test_a_receiver_whose_reports_keep_proving_false_is_suspect_until_its_process_ends(scene: Scene) -> None:
    sources = [scene.publish() for _ in range(FALSE_REPORTS_OF_A_SUSPECT)]
    receiver = scene.attach(7, pid=5)
    other = scene.attach(7, pid=5)
    process = scene.core.instances[receiver].process
    scene.report(receiver)
    for source in sources:
        assert not scene.core.damage.is_suspect(process)
        for transfer in list(scene.core.transfers.running.values()):
            cause = FailureCause.DIGEST_MISMATCH
            scene.core.transfer_failed(transfer.transfer_id, receiver, cause, "weight", 1.0)
        [judged] = scene.check(source, Finding.INTACT)
    assert judged.is_suspect
    assert scene.core.damage.suspects == 1
    scene.core.depart(receiver, 2.0)
    assert scene.core.damage.is_suspect(process), "another instance of the process is left"
    scene.core.depart(other, 3.0)
    assert scene.core.damage.suspects == 0


def test_without_a_check_another_user_is_one_witness_however_many_processes_it_has(scene: Scene) -> None:
    publication = scene.publish()
    for _ in range(3):
        scene.report(scene.attach(7))
        scene.check(publication, Finding.UNCHECKED)
        assert publication.state is PublicationState.RESIDENT
    scene.report(scene.attach(8))
    scene.check(publication, Finding.UNCHECKED)
    assert publication.state is PublicationState.QUARANTINED


def test_without_a_check_two_processes_of_the_publishers_user_are_two_witnesses(scene: Scene) -> None:
    publication, one = scene.publish(), scene.attach(PUBLISHER_UID)
    scene.report(one)
    assert [judged.is_quarantined for judged in scene.check(publication, Finding.UNCHECKED)] == [False]
    scene.report(scene.attach(PUBLISHER_UID))
    assert [judged.is_quarantined for judged in scene.check(publication, Finding.UNCHECKED)] == [True]
    assert publication.state is PublicationState.QUARANTINED


def test_a_check_that_ends_after_its_publication_changes_nothing(scene: Scene) -> None:
    publication, receiver = scene.publish(), scene.attach(7)
    scene.report(receiver)
    scene.core.evict(publication.publication_id, 1.0)
    assert scene.core.checked(publication, Finding.DAMAGED, "too late", 2.0) == []


def publish_content(scene: Scene, content: dict[str, str]) -> Publication:
    instance_id = scene.attach()
    offer = Offer(KEY, LAYOUT, instance_id, "cpu", "", 0, f"request of {instance_id}", content=content)
    publication, _ = scene.core.publish(offer, 0.0)
    scene.core.held(publication, 0.0)
    return publication


def test_a_source_with_other_content_than_an_older_one_serves_only_where_no_other_can(scene: Scene) -> None:
    first = publish_content(scene, {"xxh3 full": "right", "crc32 sampled": "right"})
    other = publish_content(scene, {"xxh3 full": "other"})
    equal = publish_content(scene, {"crc32 sampled": "right"})
    unlike = publish_content(scene, {"multilinear": "not comparable"})
    assert [one.contradicts for one in (first, other, equal, unlike)] == ["", first.publication_id, "", ""]
    served = [scene.source_of(scene.ask(scene.attach(7))) for _ in range(6)]
    assert other not in served
    assert {one.publication_id for one in served if one} == {one.publication_id for one in (first, equal, unlike)}
    for publication in (first, equal, unlike):
        scene.core.evict(publication.publication_id, 1.0)
    assert scene.source_of(scene.ask(scene.attach(7))) is other


def test_a_source_does_not_contradict_one_that_is_quarantined(scene: Scene) -> None:
    damaged = publish_content(scene, {"xxh3 full": "damaged"})
    scene.core.quarantine(damaged.publication_id, "damaged", 1.0)
    assert publish_content(scene, {"xxh3 full": "right"}).contradicts == ""
