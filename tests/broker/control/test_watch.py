"""What is kept for a watcher: which things changed, and never more than a bounded number of them."""

from __future__ import annotations

import asyncio

from weight_brokerd.control.watch import MAXIMUM_CHANGES, Changes, Watcher, WatchHub


def take(watcher: Watcher) -> Changes:
    return asyncio.run(asyncio.wait_for(watcher.next(), 5))


def test_a_watcher_hears_once_of_what_changed_often_in_the_order_of_the_first_change() -> None:
    hub = WatchHub()
    watcher = hub.open()
    for weight_set_id in ("b", "a", "b"):
        hub.mark_weight_set(weight_set_id)
    hub.mark_instance("instance-1")
    changes = take(watcher)
    assert list(changes.weight_sets) == ["b", "a"]
    assert list(changes.instances) == ["instance-1"]


def test_a_watcher_that_misses_too_much_is_told_to_look_at_everything_and_then_hears_of_changes_again() -> None:
    hub = WatchHub()
    watcher = hub.open()
    for number in range(MAXIMUM_CHANGES):
        hub.mark_weight_set(f"{number}")
    hub.mark_instance("instance-1")
    assert len(watcher._changes.weight_sets) == MAXIMUM_CHANGES
    hub.mark_weight_set("one too many")
    hub.mark_weight_set("and another")
    changes = take(watcher)
    assert changes.too_many
    assert not changes.weight_sets
    assert not changes.instances
    hub.mark_weight_set("later")
    assert take(watcher) == Changes(weight_sets={"later": None})


def test_who_left_hears_nothing_and_who_comes_after_the_end_is_sent_away() -> None:
    hub = WatchHub()
    left, stays = hub.open(), hub.open()
    hub.leave(left)
    hub.mark_instance("instance-1")
    assert not left._changes.instances
    hub.close()
    assert stays.closed
    assert list(take(stays).instances) == ["instance-1"], "what changed before the end is told"
    assert hub.open().closed
