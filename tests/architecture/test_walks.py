"""The walks of docs/ARCHITECTURE.md are those that really happen: function by function, in that order."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from support.control_room import NOWHERE, ControlRoom
from weight_broker.key import WeightSetKey
from weight_brokerd.control.mailboxes import Granted
from weight_brokerd.core import decisions as decide

OTHER = WeightSetKey("other")
REPOSITORY = Path(__file__).parents[2]
DAEMON = REPOSITORY / "broker"
BEGINNINGS = ("weight_brokerd/control/", "weight_brokerd/core/", "weight_brokerd/kinds/", "weight_brokerd/directory/")
"""A walk is followed from where the servicers and the attach socket hand it over."""
MOST_ROOMS = 12


def documented(title: str) -> list[str]:
    """The daemon's functions of a walk, as FILE:FUNCTION, in the order in which the document names them."""
    text = (REPOSITORY / "docs" / "ARCHITECTURE.md").read_text()
    [walk] = re.findall(rf"\*\*{re.escape(title)}\*\*\n(.*?)(?=\n\*\*|\n## )", text, flags=re.DOTALL)
    walk = re.sub(r"; without a source .*", "", walk)
    return [name for name in re.findall(r"`(weight_brokerd/[\w/]+\.py:[\w.]+)`", walk) if name.startswith(BEGINNINGS)]


async def walked(step: Callable[[], Coroutine[Any, Any, object]]) -> list[str]:
    """The daemon's functions in the order in which `step` first calls them."""
    entered: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{DAEMON}/"):
            entered.setdefault(f"{code.co_filename.removeprefix(f'{DAEMON}/')}:{code.co_qualname}", None)

    sys.setprofile(note)
    try:
        await step()
    finally:
        sys.setprofile(None)
    return list(entered)


async def acquire(room: ControlRoom) -> list[str]:
    await room.control.publishing.publish(room.offer("source"), NOWHERE)
    acquisition = room.acquisition("receiver")

    async def step() -> None:
        granted = await room.control.acquiring.begin(acquisition).get()
        assert isinstance(granted, Granted)

    return await walked(step)


async def publish(room: ControlRoom) -> list[str]:
    offer = room.offer("source")
    return await walked(lambda: room.control.publishing.publish(offer, NOWHERE))


async def cold_load(room: ControlRoom) -> list[str]:
    acquisition = room.acquisition("loader")

    async def step() -> None:
        answer = await room.control.acquiring.begin(acquisition).get()
        assert isinstance(answer, decide.LoadFromDisk)

    return await walked(step)


async def death(room: ControlRoom) -> list[str]:
    """Of an instance that has published one weight set and loads another one."""
    loading = await room.control.acquiring.begin(room.acquisition("dying", OTHER)).get()
    assert isinstance(loading, decide.LoadFromDisk)
    room.control.acquiring.confirm_lease("dying")
    waiting = room.control.acquiring.begin(room.acquisition("waiting", OTHER))
    assert isinstance(await waiting.get(), decide.Wait)
    instance_id = loading.lease.holder.instance_id
    await room.control.publishing.publish(replace(room.offer("dying"), instance_id=instance_id), NOWHERE)

    async def step() -> None:
        room.control.sessions.departed(instance_id, "test")
        assert isinstance(await waiting.get(), decide.LoadFromDisk)

    return await walked(step)


@pytest.mark.parametrize(
    ("title", "scenario"),
    [
        ("Acquire, in host memory", acquire),
        ("Publish", publish),
        ("Cold load", cold_load),
        ("Death of a publisher", death),
    ],
)
def test_a_walk_goes_through_the_rooms_that_the_document_names_in_that_order(
    title: str, scenario: Callable[[ControlRoom], Coroutine[Any, Any, list[str]]]
) -> None:
    async def run() -> list[str]:
        room = ControlRoom()
        try:
            return await asyncio.wait_for(scenario(room), 60)
        finally:
            room.control.close()

    entered = asyncio.run(run())
    named = documented(title)
    assert named, "the document has no such walk"
    rooms = {str(Path(name).parent) for name in entered}
    assert len(rooms) <= MOST_ROOMS
    assert [name for name in entered if name in named] == named, entered
