"""Weight sets of one tensor and of thousands arrive bit for bit, in another order than they were sent."""

from __future__ import annotations

import pytest

from support import datasystem_actions as engine
from support.card_layouts import mixed_layout, placements, sides, small_layout
from support.cards import CardScene, Owned, move
from weight_broker.layout import Layout
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(small_layout(1, 64 * MIB), id="1 tensor"),
        pytest.param(mixed_layout(400), id="400 mixed tensors"),
        # More than the engine merges in its pool of 100 MiB (H9).
        pytest.param(small_layout(5000, 30 * KIB), id="5000 small tensors", marks=pytest.mark.slow),
    ],
)
def test_every_tensor_arrives_where_it_belongs(scene: CardScene, layout: Layout) -> None:
    (source_at, size), (destination_at, _) = placements(layout, 1), placements(layout, 2)
    source, destination = scene.own(0, size, seed=3), scene.own(1, size)
    rounds = plan.rounds(plan.pieces(layout, source_at, destination_at))

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination, sides(rounds, source, destination), timeout=200)

    scene.run(scenario, source)
    assert digest(layout, destination, destination_at) == digest(layout, source, source_at)


def digest(layout: Layout, owned: Owned, placed: list[plan.Placement]) -> str:
    """Of the dense tensors in the layout's order."""
    spans = [
        (owned.address + offset, spec.storage_bytes)
        for spec, (_, offset) in zip(layout, placed, strict=True)
        if spec.is_dense and not spec.alias_of
    ]
    return owned.process.call(engine.digest, spans)
