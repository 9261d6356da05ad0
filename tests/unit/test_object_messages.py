"""What the daemon and the process for host objects say to each other, and the values that travel beside it."""

from __future__ import annotations

import fcntl
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.datasystem import object_messages as messages
from weight_brokerd.datasystem.object_messages import CODEC
from weight_brokerd.datasystem.object_value import ObjectValue

ALL: list[messages.Message] = [
    messages.Connect("localhost", 31501, 500, 200, {"tenant_id": "t"}),
    messages.PutObject("k", 1 << 40, 60),
    messages.GetObject("k"),
    messages.ExistsObjects(("a", "b")),
    messages.DeleteObjects(()),
    messages.Stop(),
    messages.Done(),
    messages.Value(1 << 40),
    messages.Existence((True, False)),
    messages.Refusal("why: \u2603", is_missing=True),
]


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_way(message: messages.Message) -> None:
    assert CODEC.decode(CODEC.encode(5, message)) == (5, message)


@pytest.mark.parametrize(
    "data",
    [
        b'[1, "Ping", {}]',
        b'[1, "ExistsObjects", {"keys": "ab"}]',
        b'[1, "ExistsObjects", {"keys": [1]}]',
        b'[1, "Existence", {"found": [1]}]',
        b'[1, "Value", {"size_bytes": true}]',
    ],
)
def test_what_is_no_message_is_not_taken_for_one(data: bytes) -> None:
    with pytest.raises(ValueError):
        CODEC.decode(data)


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(messages.Connect("h", 1, 1, 1, {"secret_key": "hidden"}))


@given(st.binary(max_size=10_000))
def test_a_value_is_what_it_was_made_of(content: bytes) -> None:
    with ObjectValue.of(content) as value:
        assert value.size_bytes == len(content)
        assert value.read() == content


def test_a_value_cannot_be_changed() -> None:
    with ObjectValue.of(b"value") as value:
        for change in (lambda: os.pwrite(value.descriptor, b"x", 0), lambda: os.ftruncate(value.descriptor, 1)):
            with pytest.raises(PermissionError):
                change()
        assert fcntl.fcntl(value.descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_memory_that_ends_early_is_not_taken_for_a_value() -> None:
    with ObjectValue.of(b"value") as value:
        value.size_bytes += 1
        with pytest.raises(OSError, match="ends after 5 of 6 bytes"):
            value.read()
