"""What the daemon and a card process say to each other survives the way, and nothing else is taken for it."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.cards import messages
from weight_brokerd.cards.plan.blobs import Blob, BlobList, Part
from weight_brokerd.processes import packets

BLOBS = BlobList(("a", "b"), (Blob(10, (Part(0, 0, 10),)), Blob(4096, (Part(1, 7, 3), Part(0, 100, 4)))))
ALL: list[messages.Message] = [
    messages.Start("localhost", 31501, 500, {"tenant_id": "t"}),
    messages.Ready(7, "3", "Ascend910B4", {"connect": 0.25}),
    messages.ImportRegion("r", 1 << 40, export_key="00ff"),
    messages.ImportRegion("r", 1 << 21, shareable_handles=((1 << 64) - 1, 0), chunk_bytes=1 << 20),
    messages.CloseRegion("r"),
    messages.MakeStagingBuffer("r", 1 << 22),
    messages.LendStagingBuffer("r"),
    messages.Offer("k", BLOBS, "peer"),
    messages.Withdraw("k", 100),
    messages.Fetch("k", BLOBS, 1000),
    messages.CopyWithinCard(BLOBS, BLOBS),
    messages.Ping(),
    messages.AskFigures(),
    messages.Stop(),
    messages.Done({"dev_mget": 1.5}),
    messages.Figures(1, 2, 3, 4, 5, 6),
    messages.RequestRefused("why: \u2603", started=True),
]


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_way(message: messages.Message) -> None:
    assert messages.CODEC.decode(messages.CODEC.encode(5, message)) == (5, message)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'[1, "Ping"]',
        b'[1, "Nothing", {}]',
        b'["1", "Ping", {}]',
        b'[1, "Ping", {"more": 1}]',
        b'[1, "CloseRegion", {}]',
        b'[1, "CloseRegion", {"region_id": 5}]',
        b'[1, "Withdraw", {"key": "k", "wait_ms": true}]',
        b'[1, "Offer", {"key": "k", "blobs": 5}]',
        b'[1, "Offer", {"key": "k", "blobs": [[], []]}]',
        b'[1, "Offer", {"key": "k", "blobs": [[1], [[5, [[0, 0, 5]]]]]}]',
        b'[1, "Offer", {"key": "k", "blobs": [["a"], [[5, [[0, 0, -5]]]]]}]',
        b'[1, "Offer", {"key": "k", "blobs": [["a"], [[5, [[0, 0, 6]]]]]}]',
        b'[1, "Offer", {"key": "k", "blobs": [["a"], [[5, []]]]}]',
    ],
)
def test_what_is_no_message_is_not_taken_for_one(data: bytes) -> None:
    with pytest.raises(ValueError):
        messages.CODEC.decode(data)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4)))
def test_any_json_is_a_message_or_a_value_error(value: object) -> None:
    for data in (value, [1, value, {}], [1, "Offer", {"key": "k", "blobs": value}]):
        with suppress(ValueError):
            messages.CODEC.decode(json.dumps(data).encode())


@given(
    st.lists(st.sampled_from([0, 1, packets.PACKET_BYTES - 2, packets.PACKET_BYTES - 1, packets.PACKET_BYTES, 100_000]))
)
def test_messages_of_any_length_are_put_together_again(lengths: list[int]) -> None:
    sent = [bytes([index % 256]) * length for index, length in enumerate(lengths)]
    joiner = packets.Joiner()
    received = []
    for message in sent:
        for packet in packets.split(message):
            assert 1 <= len(packet) <= packets.PACKET_BYTES, "an empty packet would mean the end of the connection"
            whole = joiner.add(packet)
            if whole is not None:
                received.append(whole)
    assert received == sent


def test_a_packet_that_split_does_not_make_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with"):
        packets.Joiner().add(b"x")


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(messages.Start("h", 1, 1, {"secret_key": "hidden"}))
