"""Whatever is wrong with a request, the answer says so, and nothing else happens.

Every RPC of the three services is sent valid requests in which one field, however deep, was changed, and bytes that are
no request at all, by an attached instance and as administrator.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.broker_process import BrokerProcess
from support.proto_strategies import Mutation, broken_bytes, certain_mutations, mutations
from support.raw_client import acquire_request
from support.rpc_errors import assert_no_defect
from support.scene import METHODS, Scene
from weight_broker.errors import Reason
from weight_broker.v1 import administration_service_pb2 as administration
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import weight_broker_service_pb2 as pb

EXAMPLES = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# A drain that is begun does not end: it is sent only what must be refused, in tests of its own.
WITHOUT_DRAIN = [name for name in METHODS if name != "Drain"]
WITH_FIELDS = [name for name in WITHOUT_DRAIN if name not in ("GetHost", "Watch")]

# Where a change shows if not in the field that was changed: what depends on it is checked after it.
SHOWS_IN = {
    "key": {"key", "rank", "weight_set"},
    "weight_set_id": {"weight_set_id", "weight_set"},
    "layout": {"layout", "digests", "placements", "regions"},
    "regions": {"regions", "placements"},
    "placements": {"placements", "regions"},
    "succeeded": {"succeeded", "outcome"},
    "failed": {"failed", "outcome"},
    "give_up": {"give_up", "action"},
    "extend": {"extend", "action"},
    "path": {"path", "layout"},
}

# What no request may lack: texts and numbers are emptied, messages left out.
KEY = {"key", "key.model", "key.dtype", "key.rank", "key.rank.tensor_parallel_size", "key.rank.data_parallel_size"}
REQUIRED = {
    "Acquire": KEY | {"layout", "request_id"},
    "ReportTransfer": {"transfer_id", "succeeded"},
    "Publish": KEY
    | {"layout", "request_id", "regions.region_id", "regions.size_bytes", "regions.host_memory", "digests.block_bytes"},
    "Retract": {"publication_id"},
    "ReportLoad": {"weight_set_id", "fencing_token", "extend"},
    "Evict": {"publication_id"},
    "Quarantine": {"publication_id"},
    "GetWeightSet": {"weight_set_id"},
    "Explain": KEY,
}
# What there must be exactly so many of.
COUNTED = {"placements", "digests.values", "regions"}
RANGES = {"seconds": (0, 24 * 3600), "nanos": (0, 10**9 - 1), "page_size": (0, 1000)}
# Whatever is changed in a layout, its fingerprint does not fit any more, except where an instance keeps a tensor.
NOT_IN_THE_FINGERPRINT = "layout.tensors.storage_offset"


def must_be_refused(name: str, mutation: Mutation) -> bool:
    """Whether no request of this kind is right that has been changed so."""
    path, how = mutation.path, mutation.how
    if mutation.is_no_known_value:
        return True
    if path in REQUIRED.get(name, ()) and how in ("missing", "= ''", "= 0"):
        return True
    if path in COUNTED and how != "reversed":
        return True
    if (path, how) in (("digests", "none"), ("digests", "one less"), ("key.engine_attributes", "doubled")):
        return True
    least, most = RANGES.get(path.rpartition(".")[2], (0, 0))
    if most:
        return not least <= mutation.number <= most
    return path.startswith("layout.") and path != NOT_IN_THE_FINGERPRINT


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    broker = BrokerProcess(tmp_path_factory.mktemp("bad") / "run")
    try:
        with Scene(broker.start()) as scene:
            yield scene
        assert_no_defect(broker.log)
        assert broker.terminate() == 0
    finally:
        broker.close()


def first_part(field: str) -> str:
    """`layout` of `layout.tensors[x].dtype`."""
    return field.partition(".")[0].partition("[")[0]


@pytest.mark.parametrize("name", WITH_FIELDS)
@EXAMPLES
@given(data=st.data())
def test_a_request_with_one_wrong_field_is_refused_for_it_and_changes_nothing(
    scene: Scene, name: str, data: st.DataObject
) -> None:
    valid = scene.valid_request(name)
    mutation = data.draw(mutations(valid))
    before = scene.state()
    refusal = scene.call(name, mutation.message.SerializeToString())
    if refusal is None:
        scene.reset()
        assert mutation.message == valid or not must_be_refused(name, mutation), f"{mutation} was taken"
        return
    assert scene.state() == before
    if refusal.reason is Reason.INVALID_ARGUMENT:
        allowed = SHOWS_IN.get(mutation.field, {mutation.field})
        assert first_part(refusal.field) in allowed, f"{mutation}: {refusal}"


@pytest.mark.parametrize("name", WITH_FIELDS)
def test_what_is_always_wrong_is_never_taken(scene: Scene, name: str) -> None:
    """Every field in turn: without a known value, left out, emptied, too many, too few, negative."""
    tried = 0
    for mutation in certain_mutations(scene.valid_request(name)):
        if must_be_refused(name, mutation):
            tried += 1
            refusal = scene.call(name, mutation.message.SerializeToString())
            assert refusal is not None, f"{mutation} was taken"
    assert tried, "a request has something that can be wrong"


@pytest.mark.parametrize("name", WITHOUT_DRAIN)
@EXAMPLES
@given(data=st.data())
def test_bytes_that_are_no_request_are_refused_and_change_nothing(scene: Scene, name: str, data: st.DataObject) -> None:
    wire = data.draw(broken_bytes(scene.valid_request(name)))
    before = scene.state()
    if scene.call(name, wire) is None:
        scene.reset()
    else:
        assert scene.state() == before


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_parsed_is_an_invalid_argument(scene: Scene, name: str) -> None:
    if scene.valid_request(name).DESCRIPTOR.fields:
        refusal = scene.call(name, b"\x0a\x05\xff")
    else:
        refusal = scene.call(name, b"\xff\xff\xff")
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "request")
    assert not scene.broker.host().draining


DURATIONS = st.tuples(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-(1 << 31), (1 << 31) - 1))


@EXAMPLES
@given(duration=DURATIONS.filter(lambda one: not (0 <= one[0] <= 24 * 3600 and 0 <= one[1] < 10**9)))
def test_a_drain_with_a_senseless_timeout_does_not_begin(scene: Scene, duration: tuple[int, int]) -> None:
    request = administration.DrainRequest()
    request.timeout.seconds, request.timeout.nanos = duration
    refusal = scene.call("Drain", request.SerializeToString())
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "timeout")
    assert not scene.broker.host().draining


SENSELESS = [
    (0, 0),
    (-1, 0),
    (1, -1),
    (0, 1_000_000_000),
    (0, -1),
    ((1 << 63) - 1, 0),
    (-(1 << 63), -(1 << 31)),
    (86_401, 0),
]


@pytest.mark.parametrize(("seconds", "nanos"), SENSELESS)
def test_a_lease_is_not_extended_by_a_senseless_duration(scene: Scene, seconds: int, nanos: int) -> None:
    request = scene.valid_request("ReportLoad")
    assert isinstance(request, pb.ReportLoadRequest)
    request.extend.duration.seconds, request.extend.duration.nanos = seconds, nanos
    refusal = scene.call("ReportLoad", request.SerializeToString())
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "extend.duration")


@pytest.mark.parametrize(("seconds", "nanos"), SENSELESS[1:])
def test_a_phase_that_took_a_senseless_time_is_refused(scene: Scene, seconds: int, nanos: int) -> None:
    request = scene.valid_request("ReportTransfer")
    assert isinstance(request, pb.ReportTransferRequest)
    request.succeeded.phase_times[0].duration.seconds, request.succeeded.phase_times[0].duration.nanos = seconds, nanos
    before = scene.state()
    refusal = scene.call("ReportTransfer", request.SerializeToString())
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "succeeded.phase_times[0].duration")
    assert scene.state() == before, "the transfer still runs"


def test_a_text_that_is_not_utf8_is_refused(scene: Scene) -> None:
    wire = acquire_request("resident", request_id="nine char").SerializeToString()
    assert b"nine char" in wire
    refusal = scene.call("Acquire", wire.replace(b"nine char", b"\xff\xfe\x80\xc0\xc1\xf5\xed\xa0\x80"))
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "request")


def emoji_names(count: int) -> Message:
    request = pb.AcquireRequest()
    request.CopyFrom(acquire_request())
    for _ in range(count):
        request.layout.tensors.add(name="🚀" * 5000, dtype="🚀" * 5000)
    return request


def test_an_error_about_something_huge_still_fits_into_headers(scene: Scene) -> None:
    refusal = scene.call("Acquire", emoji_names(1).SerializeToString())
    assert refusal is not None
    assert refusal.reason is Reason.INVALID_ARGUMENT
    assert len(refusal.message.encode()) <= 1024
    assert refusal.metadata["expected"]


def test_reasons_and_details_of_a_thousand_characters_are_taken(scene: Scene) -> None:
    """As long as what the client sends at most: a lease is not to stay because an exception had much to say."""
    request = scene.valid_request("ReportLoad")
    assert isinstance(request, pb.ReportLoadRequest)
    request.give_up.reason = "x" * 1000
    assert scene.call("ReportLoad", request.SerializeToString()) is None
    scene.reset()


@pytest.mark.parametrize("token", ["%%%", "AAAA", "dzo=extra", "🚀", "a" * 10_000, "dDp4", "dDotMQ=="])
@pytest.mark.parametrize("name", ["ListWeightSets", "ListInstances", "ListTransfers"])
def test_a_page_token_that_is_none_is_refused(scene: Scene, name: str, token: str) -> None:
    request = {
        "ListWeightSets": inspection.ListWeightSetsRequest,
        "ListInstances": inspection.ListInstancesRequest,
        "ListTransfers": inspection.ListTransfersRequest,
    }[name](page_token=token)
    refusal = scene.call(name, request.SerializeToString())
    if refusal is None:
        assert (name, token) == ("ListTransfers", "dDotMQ=="), "t:-1 names a transfer, the others nothing"
    else:
        assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "page_token")
