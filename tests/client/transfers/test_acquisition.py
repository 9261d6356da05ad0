"""One acquire call against a broker that misbehaves as told: what comes out, what is reported, what stays open."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest

from support.scripted_broker import Context, done
from support.scripted_stage import KEY, Stage, arrays, assert_set, holds, open_memfds
from weight_broker import (
    AcquireTimeout,
    BrokerError,
    DigestCoverage,
    IntegrityError,
    Reason,
    TransferFailed,
)
from weight_broker.memory.host import copying
from weight_broker.v1 import weight_broker_service_pb2 as pb


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    prepared = Stage(tmp_path, monkeypatch)
    yield prepared
    prepared.close()


def test_a_filled_acquisition_reports_its_source_and_leaves_nothing_open(stage: Stage) -> None:
    stage.script(stage.grant("transfer-1", stage.sound), done("transfer-1", 3 << 18))
    tensors = arrays(0)
    report = stage.client.acquire(KEY, tensors)
    assert holds(tensors, 5)
    assert (report.source_instance, report.source_instance_name) == ("instance-2", "peer")
    assert (report.source_publication_id, report.source_generation) == ("source-of-transfer-1", 7)
    assert (report.size_bytes, report.tensor_count, report.verified) == (3 << 18, 3, DigestCoverage.FULL)
    assert (report.data_plane, report.path) == ("local", "copy")
    assert set(report.phases) >= {"describe", "attach", "reserve", "map", "transfer", "confirm"}
    assert sum(report.phases.values()) <= report.seconds
    assert report.bandwidth > 0
    assert stage.reports[0].succeeded.size_bytes == 3 << 18
    assert open_memfds() == stage.baseline
    assert stage.broker.tokens == {b"t" * 32}


def test_wrong_bytes_are_reported_with_their_tensors_and_the_next_source_is_tried(stage: Stage) -> None:
    stage.script(
        stage.grant("transfer-1", stage.damaged), stage.grant("transfer-2", stage.sound), done("transfer-2", 3 << 18)
    )
    tensors = arrays(0)
    report = stage.client.acquire(KEY, tensors)
    assert holds(tensors, 5)
    assert report.source_publication_id == "source-of-transfer-2"
    failed = stage.reports[0].failed
    assert failed.cause == pb.TransferFailed.CAUSE_DIGEST_MISMATCH
    assert failed.detail == "tensors layers.0"
    assert open_memfds() == stage.baseline


def test_after_wrong_bytes_the_last_error_says_touched_and_names_the_tensors(stage: Stage) -> None:
    stage.script(stage.grant("transfer-1", stage.damaged), Reason.INTEGRITY_ERROR)
    with pytest.raises(IntegrityError) as caught:
        stage.client.acquire(KEY, arrays(0))
    assert (caught.value.touched, caught.value.quiesced) == (True, True)
    assert caught.value.metadata["tensors"] == "layers.0"
    assert caught.value.metadata["sources"] == "all"
    assert open_memfds() == stage.baseline


def test_a_source_that_cannot_be_opened_is_reported_and_nothing_is_touched(stage: Stage) -> None:
    message = stage.grant("transfer-1", stage.sound)
    del stage.broker.regions["transfer-1", 0]
    stage.script(message, Reason.TRANSFER_FAILED)
    tensors = arrays(1)
    with pytest.raises(TransferFailed) as caught:
        stage.client.acquire(KEY, tensors)
    assert stage.reports[0].failed.cause == pb.TransferFailed.CAUSE_SOURCE_UNREACHABLE
    assert not caught.value.touched
    assert holds(tensors, 1)


def test_memory_that_is_not_sealed_is_refused_before_the_first_byte(stage: Stage) -> None:
    unsealed = os.memfd_create("open")
    os.ftruncate(unsealed, stage.sound.size_bytes)
    message = stage.grant("transfer-1", stage.sound)
    stage.broker.regions["transfer-1", 0] = unsealed
    stage.script(message, Reason.TRANSFER_FAILED)
    tensors = arrays(1)
    with pytest.raises(TransferFailed) as caught:
        stage.client.acquire(KEY, tensors)
    os.close(unsealed)
    assert stage.reports[0].failed.cause == pb.TransferFailed.CAUSE_SOURCE_UNREACHABLE
    assert not caught.value.touched
    assert holds(tensors, 1)


def test_a_copy_that_fails_half_way_ends_the_acquisition_as_touched(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_copy(destination: int, source: int, count: int) -> int:
        raise OSError("copy failed")

    monkeypatch.setattr(copying, "_copy", fail_copy)
    stage.script(stage.grant("transfer-1", stage.sound), Reason.TRANSFER_FAILED)
    with pytest.raises(TransferFailed, match="copy failed") as caught:
        stage.client.acquire(KEY, arrays(0))
    assert (caught.value.touched, caught.value.quiesced) == (True, True)
    assert open_memfds() == stage.baseline


def test_a_failure_nobody_foresaw_is_still_a_broker_error_that_says_touched(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("weight_broker.memory.host.destination.copy_in", explode)
    stage.script(stage.grant("transfer-1", stage.sound), Reason.TRANSFER_FAILED)
    with pytest.raises(BrokerError, match="unforeseen") as caught:
        stage.client.acquire(KEY, arrays(0))
    assert caught.value.touched
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_deadline_passing_in_the_copy_says_touched(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, copied = copying._copy, threading.Event()

    def copy_until_the_deadline_has_passed(destination: int, source: int, count: int) -> int:
        copied.set()
        return copy(destination, source, count)

    monkeypatch.setattr(copying, "_copy", copy_until_the_deadline_has_passed)
    now = time.monotonic
    monkeypatch.setattr(copying, "time", SimpleNamespace(monotonic=lambda: now() + 600 * copied.is_set()))
    monkeypatch.setattr(copying, "thread_count", lambda: 1)
    stage.script(stage.grant("transfer-1", stage.sound), done("transfer-1", 1))
    with pytest.raises(AcquireTimeout) as caught:
        stage.client.acquire(KEY, arrays(0), timeout=600)
    assert (caught.value.touched, caught.value.quiesced) == (True, True)
    assert stage.broker.acquire_ended.wait(60)
    assert open_memfds() == stage.baseline


def test_the_deadline_passing_while_waiting_says_untouched(stage: Stage) -> None:
    waiting = pb.AcquireResponse(waiting=pb.Waiting(reason=pb.Waiting.REASON_COLD_LOAD))
    stage.script(waiting, lambda: assert_set(stage.broker.acquire_ended))
    with pytest.raises(AcquireTimeout) as caught:
        stage.client.acquire(KEY, arrays(0), timeout=0.2)
    assert not caught.value.touched


def test_bytes_in_place_are_a_success_even_if_the_broker_dies_before_it_says_so(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.script(stage.grant("transfer-1", stage.sound), Reason.BROKER_UNAVAILABLE)
    tensors = arrays(0)
    report = stage.client.acquire(KEY, tensors)
    assert holds(tensors, 5)
    assert report.size_bytes == 3 << 18
    assert "did not confirm" in caplog.text


def test_a_report_that_is_not_heard_does_not_unmake_a_success(stage: Stage) -> None:
    """Nor is the broker waited for, which says no more: it has no report."""
    stage.broker.refusals["ReportTransfer"] = [Reason.INTERNAL]
    over = threading.Event()

    def grant_and_say_no_more(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        yield stage.grant("transfer-1", stage.sound)
        over.wait()

    stage.broker.on_acquire = grant_and_say_no_more
    tensors = arrays(0)
    try:
        stage.client.acquire(KEY, tensors, timeout=600)
    finally:
        over.set()
    assert holds(tensors, 5)


def test_the_brokers_verdict_on_a_verified_transfer_is_obeyed(stage: Stage) -> None:
    stage.script(stage.grant("transfer-1", stage.sound), Reason.INTEGRITY_ERROR)
    with pytest.raises(IntegrityError) as caught:
        stage.client.acquire(KEY, arrays(0))
    assert caught.value.touched


def test_an_interrupt_frees_the_slot_and_closes_everything(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(destination: int, source: int, count: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(copying, "_copy", interrupt)
    stage.script(stage.grant("transfer-1", stage.sound), done("transfer-1", 1))
    with pytest.raises(KeyboardInterrupt):
        stage.client.acquire(KEY, arrays(0))
    assert stage.broker.acquire_ended.wait(60)
    assert open_memfds() == stage.baseline


def functions_of(thread: int | None) -> set[str]:
    """Names of the functions that a thread is in."""
    frame, names = sys._current_frames().get(thread or 0), set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_an_interrupt_while_waiting_ends_the_wait(stage: Stage) -> None:
    waiting = pb.AcquireResponse(waiting=pb.Waiting(reason=pb.Waiting.REASON_SOURCES_BUSY))
    ended = stage.broker.acquire_ended
    caller = threading.get_ident()
    in_call = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if in_call.is_set():
            raise KeyboardInterrupt

    def interrupt_until_the_call_ends() -> None:
        """Again and again, because an interrupt that comes in a destructor or the collector's callback is lost."""
        while not ended.wait(1):
            if "_follow" in functions_of(caller):
                signal.pthread_kill(caller, signal.SIGUSR1)

    stage.script(waiting, interrupt_until_the_call_ends)
    before = signal.signal(signal.SIGUSR1, interrupt)
    in_call.set()
    try:
        with pytest.raises(KeyboardInterrupt):
            stage.client.acquire(KEY, arrays(0), timeout=600)
        in_call.clear()
        assert ended.wait(60)
    finally:
        in_call.clear()
        signal.signal(signal.SIGUSR1, before)
