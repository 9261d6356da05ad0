"""Who may do what: the token says who calls, the kernel has said who that is."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from support.broker_process import BrokerProcess
from support.raw_client import TOKEN, RawClient, acquire_request, copy_of, succeeded
from support.rpc_errors import assert_no_defect
from support.scene import ATTACHED_ONLY, METHODS, Scene
from support.waiting import eventually
from weight_broker.errors import Reason
from weight_broker.v1 import weight_broker_service_pb2 as pb

NOBODY = 65534
FAR_USER = (1 << 32) - 2
"""User namespaces have such ids; the kernel's are unsigned."""


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """A broker whose sockets everybody may use."""
    directory = Path(tempfile.mkdtemp(prefix="weight-broker-test-"))
    directory.chmod(0o755)
    broker = BrokerProcess(directory / "run", WEIGHT_BROKER_BROKER_SOCKET_MODE="0666")
    try:
        with Scene(broker.start()) as scene:
            broker.runtime_directory.chmod(0o755)
            yield scene
        assert_no_defect(broker.log)
    finally:
        broker.close()
        shutil.rmtree(directory)


def metadata(*tokens: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple((TOKEN, token) for token in tokens)


BAD_TOKENS: dict[str, Callable[[bytes], tuple[tuple[str, bytes], ...]]] = {
    "missing": lambda _: (),
    "empty": lambda _: metadata(b""),
    "forged": lambda _: metadata(secrets.token_bytes(32)),
    "truncated": lambda token: metadata(token[:-1]),
    "too long": lambda token: metadata(token + b"\0"),
    "much too long": lambda token: metadata(token * 100),
    "one bit off": lambda token: metadata(bytes([token[0] ^ 1]) + token[1:]),
    "forged before the right one": lambda token: metadata(bytes(32), token),
    "under another name": lambda token: (("weight-broker-session2-bin", token),),
}


@pytest.mark.parametrize("bad", BAD_TOKENS)
@pytest.mark.parametrize("name", ATTACHED_ONLY)
@pytest.mark.parametrize("valid", [True, False], ids=["valid request", "empty request"])
def test_without_the_right_token_nobody_learns_or_changes_anything(
    scene: Scene, name: str, bad: str, valid: bool
) -> None:
    """An empty request is wrong too; the answer is about the token all the same."""
    request = scene.valid_request(name).SerializeToString() if valid else b""
    before = scene.state()
    refusal = scene.call(name, request, metadata=BAD_TOKENS[bad](scene.client.token))
    assert refusal is not None
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.NOT_ATTACHED)
    assert scene.state() == before


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ATTACHED_ONLY])
def test_inspection_needs_no_token_and_minds_no_forged_one(scene: Scene, name: str) -> None:
    for tokens in ((), (b"forged",)):
        assert scene.call(name, scene.valid_request(name).SerializeToString(), metadata=metadata(*tokens)) is None


def test_a_token_ends_with_its_instance(scene: Scene) -> None:
    with RawClient(scene.broker.runtime_directory) as guest:
        token = guest.token
    for name in ATTACHED_ONLY:
        refusal = scene.call(name, b"", metadata=metadata(token))
        assert refusal is not None
        assert refusal.reason is Reason.NOT_ATTACHED


def test_another_instances_publication_transfer_and_lease_are_out_of_reach(scene: Scene) -> None:
    absent = acquire_request("loaded elsewhere", if_absent=pb.IF_ABSENT_LOAD)
    with RawClient(scene.broker.runtime_directory, "owner") as owner:
        stream = owner.acquire("resident")
        transfer_id = next(stream).granted.transfer_id
        [answer] = owner.weight_broker.Acquire(absent, metadata=owner.metadata, timeout=60)
        lease = answer.cold_load.cold_load_lease
        retract = pb.RetractRequest(publication_id=scene.resident.publication_id)
        failed = pb.ReportTransferRequest(transfer_id=transfer_id)
        failed.failed.cause = pb.TransferFailed.CAUSE_DIGEST_MISMATCH
        extend = pb.ReportLoadRequest(weight_set_id=lease.weight_set_id, fencing_token=lease.fencing_token)
        give_up = copy_of(extend)
        extend.extend.SetInParent()
        give_up.give_up.SetInParent()
        before = scene.state()
        for name, request, reason in (
            ("Retract", retract, Reason.PUBLICATION_NOT_FOUND),
            ("ReportTransfer", succeeded(transfer_id), Reason.TRANSFER_NOT_FOUND),
            ("ReportTransfer", failed, Reason.TRANSFER_NOT_FOUND),
            ("ReportLoad", extend, Reason.LEASE_LOST),
            ("ReportLoad", give_up, Reason.LEASE_LOST),
        ):
            refusal = scene.call(name, request.SerializeToString())
            assert refusal is not None
            assert refusal.reason is reason
            assert scene.state() == before
        owner.report_success(transfer_id)
        assert next(stream).HasField("done"), "the owner's own report counts"


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
import grpc
from support.raw_client import RawClient
from support.rpc_errors import refusal_of
from weight_broker.v1 import administration_service_pb2 as pb
uid = int(sys.argv[1])
os.setgroups([])
os.setegid(uid)
os.seteuid(uid)
with RawClient(Path(sys.argv[2]), "another user") as client:
    for call, request in (
        (client.administration.Drain, pb.DrainRequest()),
        (client.administration.Evict, pb.EvictRequest(publication_id=sys.argv[3])),
        (client.administration.Quarantine, pb.QuarantineRequest(publication_id=sys.argv[3], reason="spite")),
        (client.administration.Evict, pb.EvictRequest()),
    ):
        try:
            call(request, metadata=client.metadata, timeout=60)
        except grpc.RpcError as error:
            print(refusal_of(error).reason)
        else:
            print("done")
    print(client.publish("of another user").state, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("uid", [NOBODY, FAR_USER])
def test_another_user_may_publish_but_not_administer(scene: Scene, uid: int) -> None:
    broker = scene.broker
    with subprocess.Popen(
        [sys.executable, "-c", AS_ANOTHER_USER, str(uid), str(broker.runtime_directory), scene.resident.publication_id],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        answers = [child.stdout.readline().strip() for _ in range(5)]
        assert answers == [Reason.NOT_ADMINISTRATOR] * 4 + ["2"]
        [listed] = [one for one in broker.instances() if one.name == "another user"]
        assert (listed.uid, listed.gid, listed.pid) == (uid, uid, child.pid)
    assert not broker.host().draining
    eventually(lambda: all(one.name != "another user" for one in broker.instances()))
