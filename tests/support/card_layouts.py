"""Weight sets to move between cards, and where their tensors lie."""

from __future__ import annotations

import random

from support import acl
from support.cards import Owned
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.blobs import BlobList

KIB, MIB = 1 << 10, 1 << 20


def small_layout(number: int, size: int) -> Layout:
    """Equal tensors, none of them worth a send of its own."""
    return Layout([TensorSpec(f"t{index:05}", "uint8", (size,), (1,), size) for index in range(number)])


def sides(rounds: list[plan.Round], source: Owned, destination: Owned) -> list[tuple[BlobList, BlobList]]:
    """The blobs of each round on both sides."""
    ids = (source.region.region_id,), (destination.region.region_id,)
    return [(BlobList(ids[0], given), BlobList(ids[1], taken)) for given, taken in rounds]


def mixed_layout(number: int) -> Layout:
    """So many large, small and tiny tensors, one with gaps, one that is tied."""
    generator = random.Random(8)
    sizes = [
        generator.choice([64, 4 * KIB, 100 * KIB, 700 * KIB, 3 * MIB]) + generator.randrange(64) for _ in range(number)
    ]
    specs = [TensorSpec(f"t{index:05}", "uint8", (size,), (1,), size) for index, size in enumerate(sizes)]
    specs.append(TensorSpec("u-gapped", "bfloat16", (33, 100), (128, 1), (32 * 128 + 100) * 2))
    specs.append(TensorSpec("v-tied", "uint8", (sizes[0],), (1,), sizes[0], alias_of="t00000"))
    return Layout(specs)


def placements(layout: Layout, seed: int) -> tuple[list[plan.Placement], int]:
    """One after the other in an order of `seed`, and how much they take."""
    order = [index for index, spec in enumerate(layout) if not spec.alias_of]
    random.Random(seed).shuffle(order)
    found, at = [(0, 0)] * len(layout), 0
    for index in order:
        found[index] = (0, at)
        at += -(-layout[index].storage_bytes // 512) * 512
    return found, -(-at // acl.CHUNK) * acl.CHUNK
