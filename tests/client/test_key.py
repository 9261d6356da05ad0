"""The key of a weight set: its canonical id, pinned, and the refusal of what is not a key."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_broker.errors import InvalidArgument
from weight_broker.key import (
    MAX_ENGINE_ATTRIBUTES,
    MAX_PARALLEL_SIZE,
    MAX_TEXT_CHARACTERS,
    ParallelRank,
    Role,
    Stage,
    WeightSetKey,
)

PLAIN = WeightSetKey("Qwen/Qwen2.5-7B")
STRANGE = WeightSetKey(
    'modèle/../🦙 "v1"\\\x00\n\u2028',
    revision="refs/pr/1",
    checkpoint_digest="sha256:00ff",
    dtype="float8_e4m3fn",
    quantization="ascend:1f",
    role=Role.DRAFT,
    stage=Stage.RUNTIME,
    rank=ParallelRank(1, 2, 3, 4, 5, 6, 7, 8),
    engine_attributes={"z": "", "a.b": "é/"},
)
# Other implementations have to arrive at the same: never change these, add a form with another number instead.
VECTORS = [
    (
        PLAIN,
        '{"checkpoint_digest":"","dtype":"bfloat16","engine_attributes":{},"form":"weight-set-key/1",'
        '"model":"Qwen/Qwen2.5-7B","quantization":"","rank":{"data_parallel_rank":0,"data_parallel_size":1,'
        '"expert_parallel_rank":0,"expert_parallel_size":1,"pipeline_parallel_rank":0,"pipeline_parallel_size":1,'
        '"tensor_parallel_rank":0,"tensor_parallel_size":1},"revision":"","role":"target","stage":"loaded"}',
        "7c0a595c163c5bedae6f5322ba787a36",
    ),
    (
        STRANGE,
        '{"checkpoint_digest":"sha256:00ff","dtype":"float8_e4m3fn","engine_attributes":{"a.b":"é/","z":""},'
        '"form":"weight-set-key/1","model":"modèle/../🦙 \\"v1\\"\\\\\\u0000\\n\u2028","quantization":"ascend:1f",'
        '"rank":{"data_parallel_rank":7,"data_parallel_size":8,"expert_parallel_rank":5,"expert_parallel_size":6,'
        '"pipeline_parallel_rank":3,"pipeline_parallel_size":4,"tensor_parallel_rank":1,"tensor_parallel_size":2},'
        '"revision":"refs/pr/1","role":"draft","stage":"runtime"}',
        "a71d9a8e99947733ae9ced426566fb7f",
    ),
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize(("key", "canonical", "expected"), VECTORS)
def test_the_canonical_form_and_the_id_are_what_they_always_were(
    key: WeightSetKey, canonical: str, expected: str
) -> None:
    assert key.canonical == canonical
    assert hashlib.sha256(canonical.encode()).hexdigest()[:32] == expected
    assert key.id == expected


@pytest.mark.parametrize(
    "changed",
    [
        replace(STRANGE, model=STRANGE.model + "/"),
        replace(STRANGE, revision="refs/pr/2"),
        replace(STRANGE, checkpoint_digest="sha256:00fe"),
        replace(STRANGE, dtype="bfloat16"),
        replace(STRANGE, quantization=""),
        replace(STRANGE, role=Role.TARGET),
        replace(STRANGE, stage=Stage.LOADED),
        *(
            replace(STRANGE, rank=replace(STRANGE.rank, **{one.name: getattr(STRANGE.rank, one.name) + step}))
            for one in fields(ParallelRank)
            for step in ((-1,) if one.name.endswith("rank") else (1,))
        ),
        replace(STRANGE, engine_attributes={"z": " ", "a.b": "é/"}),
        replace(STRANGE, engine_attributes={"z": ""}),
        replace(STRANGE, engine_attributes={"z": "é/", "a.b": ""}),
    ],
    ids=lambda key: "-".join(key.differing_fields(STRANGE)),
)
def test_every_field_changes_the_id_and_is_named_as_the_difference(changed: WeightSetKey) -> None:
    assert changed.id != STRANGE.id
    assert changed != STRANGE
    (difference, *more) = changed.differing_fields(STRANGE)
    if difference.startswith("engine_attributes["):
        assert changed.engine_attributes != STRANGE.engine_attributes
    else:
        assert more == []
        holder = (STRANGE.rank, changed.rank) if hasattr(STRANGE.rank, difference) else (STRANGE, changed)
        assert getattr(holder[0], difference) != getattr(holder[1], difference)


@given(TEXTS.filter(bool), TEXTS, st.dictionaries(TEXTS.filter(bool), TEXTS, max_size=5))
def test_any_characters_make_a_key_that_survives_pickling(
    model: str, revision: str, attributes: dict[str, str]
) -> None:
    key = WeightSetKey(model, revision, engine_attributes=attributes)
    copy = pickle.loads(pickle.dumps(key))
    assert (copy, copy.id, hash(copy)) == (key, key.id, hash(key))
    assert (copy.model, copy.revision, dict(copy.engine_attributes)) == (model, revision, attributes)


@given(TEXTS.filter(bool), TEXTS, TEXTS.filter(bool), TEXTS)
def test_keys_with_different_texts_have_different_ids(model: str, revision: str, other: str, another: str) -> None:
    same = (model, revision) == (other, another)
    assert (WeightSetKey(model, revision).id == WeightSetKey(other, another).id) == same


def test_the_order_of_engine_attributes_does_not_matter() -> None:
    assert replace(STRANGE, engine_attributes={"a.b": "é/", "z": ""}).id == STRANGE.id


def test_a_key_does_not_change_with_the_mapping_it_was_made_from() -> None:
    attributes = {"backend": "eager"}
    key = WeightSetKey("model", engine_attributes=attributes)
    before = key.id
    attributes["backend"] = "other"
    assert WeightSetKey("model", engine_attributes=key.engine_attributes).id == before
    with pytest.raises(TypeError):
        key.engine_attributes["backend"] = "other"  # type: ignore[index]


def test_roles_and_stages_may_be_given_by_name() -> None:
    key = WeightSetKey("model", role="draft", stage="runtime")  # type: ignore[arg-type]
    assert (key.role, key.stage) == (Role.DRAFT, Stage.RUNTIME)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("key.model", {"model": ""}),
        ("key.model", {"model": None}),
        ("key.model", {"model": b"model"}),
        ("key.model", {"model": "x" * (MAX_TEXT_CHARACTERS + 1)}),
        ("key.model", {"model": "undecodable \udc80"}),
        ("key.revision", {"revision": None}),
        ("key.revision", {"revision": "\ud800"}),
        ("key.checkpoint_digest", {"checkpoint_digest": 7}),
        ("key.dtype", {"dtype": ""}),
        ("key.quantization", {"quantization": None}),
        ("key.role", {"role": "teacher"}),
        ("key.role", {"role": None}),
        ("key.stage", {"stage": ["loaded"]}),
        ("key.rank", {"rank": 0}),
        ("key.engine_attributes", {"engine_attributes": [("a", "b")]}),
        ("key.engine_attributes", {"engine_attributes": {str(i): "" for i in range(MAX_ENGINE_ATTRIBUTES + 1)}}),
        ("key.engine_attributes name", {"engine_attributes": {"": "b"}}),
        ("key.engine_attributes name", {"engine_attributes": {1: "b"}}),
        ("key.engine_attributes['a']", {"engine_attributes": {"a": None}}),
        ("key.engine_attributes['a']", {"engine_attributes": {"a": "\udfff"}}),
    ],
)
def test_a_wrong_field_is_refused_by_name(field: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        WeightSetKey(**{"model": "model", **values})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert field in str(caught.value)
    assert (caught.value.touched, caught.value.quiesced) == (False, True)


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "expert", "data"])
@pytest.mark.parametrize(
    ("part", "rank", "size"),
    [
        ("rank", -1, 4),
        ("rank", 4, 4),
        ("rank", 0.0, 4),
        ("rank", False, 4),
        ("size", 0, 0),
        ("size", 0, -1),
        ("size", 0, True),
        ("size", 0, MAX_PARALLEL_SIZE + 1),
    ],
)
def test_a_rank_outside_its_group_is_refused_by_name(kind: str, part: str, rank: object, size: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ParallelRank(**{f"{kind}_parallel_rank": rank, f"{kind}_parallel_size": size})  # type: ignore[arg-type]
    assert caught.value.field == f"rank.{kind}_parallel_{part}"


def test_the_largest_group_and_the_longest_text_are_allowed() -> None:
    assert ParallelRank(MAX_PARALLEL_SIZE - 1, MAX_PARALLEL_SIZE)
    assert WeightSetKey("🦙" * MAX_TEXT_CHARACTERS).id
