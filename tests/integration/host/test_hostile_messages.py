"""Bytes, descriptors and tokens of a hostile process: the broker answers with a reason of its own or hangs up, keeps
nothing, and serves the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.broker_process import BrokerProcess
from support.proto_strategies import broken_bytes, mutations
from support.raw_client import REGION_BYTES, connect, exchange, hello, sealed_memory
from support.rpc_errors import assert_no_defect
from support.scene import ATTACHED_ONLY, METHODS, Scene
from support.waiting import eventually
from weight_broker.errors import Reason
from weight_broker.v1 import attach_pb2 as pb

EXAMPLES = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
REQUESTS = (
    hello("hostile"),
    pb.AttachRequest(offer_region=pb.OfferRegion(region_id="hostile", size_bytes=REGION_BYTES)),
    pb.AttachRequest(withdraw_region=pb.WithdrawRegion(region_id="hostile")),
    pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id="transfer-1", region_index=1)),
    pb.AttachRequest(serve_stage=pb.ServeStage(session_token=bytes(32))),
)
DESCRIPTORS: dict[str, Callable[[], int]] = {
    "sealed memory": sealed_memory,
    "memory that may shrink": lambda: sealed_memory(seals=0),
    "empty memory": lambda: sealed_memory(0),
    "a directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "a path": lambda: os.open("/", os.O_PATH),
    "a device": lambda: os.open("/dev/zero", os.O_RDWR),
    "an endless pipe": lambda: os.pipe()[0],
    "an event": lambda: os.eventfd(1),
    "a process": lambda: os.pidfd_open(os.getpid()),
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "its own memory": lambda: os.open("/proc/self/mem", os.O_RDONLY),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    broker = BrokerProcess(tmp_path_factory.mktemp("hostile") / "run")
    try:
        with Scene(broker.start()) as scene:
            yield scene
        assert_no_defect(broker.log)
        assert broker.terminate() == 0
    finally:
        broker.close()


def say(scene: Scene, packets: list[tuple[bytes, list[str]]]) -> list[pb.AttachResponse]:
    """The answers to packets of one connection, each with descriptors; fewer if the broker hung up."""
    answers = []
    with ExitStack() as stack:
        connection = stack.enter_context(connect(scene.broker.runtime_directory))
        for packet, kinds in packets:
            descriptors = [DESCRIPTORS[kind]() for kind in kinds]
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            try:
                answers.append(exchange(connection, packet, descriptors))
            except OSError:
                break
        goodbye = pb.AttachRequest(goodbye=pb.Goodbye()).SerializeToString()
        with suppress(OSError):
            exchange(connection, goodbye)
    return answers


def others(scene: Scene) -> object:
    """What belongs to the scene's instances. A hostile one whose connection ended is an instance until its process ends
    (test_attach_socket.py)."""
    known = {scene.publisher.instance_id, scene.client.instance_id}
    instances = known & {one.instance_id for one in scene.broker.instances()}
    publications = [(one.publication_id, one.state) for one in scene.broker.publications()]
    return instances, publications, scene.broker.host().cold_load_lease_count


@st.composite
def packets(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    request: Message = draw(st.sampled_from(REQUESTS))
    kinds = draw(st.lists(st.sampled_from(sorted(DESCRIPTORS)), max_size=3))
    how = draw(st.sampled_from(["right", "one field wrong", "broken"]))
    if how == "right":
        return request.SerializeToString(), kinds
    if how == "broken":
        return draw(broken_bytes(request)) or b"\0", kinds
    return draw(mutations(request)).message.SerializeToString()[:16_000] or b"\0", kinds


@EXAMPLES
@given(later=st.lists(packets(), min_size=1, max_size=4), says_hello=st.booleans())
def test_any_packets_with_any_descriptors_are_answered_or_end_the_connection_and_harm_no_other(
    scene: Scene, later: list[tuple[bytes, list[str]]], says_hello: bool
) -> None:
    begin = [(hello("hostile").SerializeToString(), list[str]())] if says_hello else []
    before = others(scene)
    for answer in say(scene, begin + later):
        assert answer.WhichOneof("response"), "an answer says something"
        if answer.HasField("refused"):
            assert Reason(answer.refused.reason) is not Reason.INTERNAL, answer.refused.message
            assert answer.refused.message
    assert others(scene) == before


@pytest.mark.parametrize("kind", [kind for kind in DESCRIPTORS if kind != "sealed memory"])
def test_no_descriptor_but_sealed_memory_is_a_region(scene: Scene, kind: str) -> None:
    offer = (REQUESTS[1].SerializeToString(), [kind])
    _, answer = say(scene, [(hello("hostile").SerializeToString(), []), offer])
    assert answer.refused.reason in (Reason.REGION_REFUSED, Reason.INVALID_ARGUMENT), answer


def test_no_descriptor_of_a_hostile_process_stays_open_in_the_broker(scene: Scene) -> None:
    before = len(scene.broker.descriptors())
    for kind in DESCRIPTORS:
        say(scene, [(hello("hostile").SerializeToString(), []), (REQUESTS[1].SerializeToString(), [kind, kind])])
        say(scene, [(REQUESTS[1].SerializeToString(), [kind])])
    eventually(lambda: len(scene.broker.descriptors()) <= before)


@EXAMPLES
@given(token=st.binary(max_size=200), name=st.sampled_from(ATTACHED_ONLY))
def test_no_token_but_its_own_lets_a_process_in(scene: Scene, token: bytes, name: str) -> None:
    before = scene.state()
    refusal = scene.call(name, b"", metadata=(("weight-broker-session-bin", token),))
    assert refusal is not None
    assert refusal.reason is Reason.NOT_ATTACHED
    assert scene.state() == before


# Drain does not end; a lease that was given up as unpublishable stays so; the others have no fields.
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"Drain", "ReportLoad", "GetHost", "Watch"}))
@EXAMPLES
@given(data=st.data())
def test_a_request_with_several_wrong_fields_is_refused_or_taken_and_leaves_the_broker_whole(
    scene: Scene, name: str, data: st.DataObject
) -> None:
    """`Scene.call` fails for an error that is not documented."""
    message = scene.valid_request(name)
    for _ in range(data.draw(st.integers(2, 5))):
        message = data.draw(mutations(message)).message
    before = scene.state()
    if scene.call(name, message.SerializeToString()) is None:
        scene.reset()
    else:
        assert scene.state() == before
