"""Who has not said Hello gives way, and first of all to others."""

from __future__ import annotations

from weight_brokerd.attach.strangers import MAXIMUM_STRANGERS, MAXIMUM_STRANGERS_OF_PROCESS, Strangers


def crowd(strangers: Strangers[str], process: str, count: int) -> None:
    for number in range(count):
        strangers.add(process, f"{process} {number}")


def test_the_oldest_connection_of_a_process_with_many_gives_way_to_its_next() -> None:
    strangers: Strangers[str] = Strangers()
    strangers.add("other", "other")
    crowd(strangers, "flood", MAXIMUM_STRANGERS_OF_PROCESS)
    assert strangers.one_too_many("flood") == "flood 0"
    assert strangers.one_too_many("other") is None


def test_where_there_is_no_room_the_process_with_the_most_gives_way() -> None:
    strangers: Strangers[str] = Strangers()
    strangers.add("honest", "honest")
    for number in range(MAXIMUM_STRANGERS // 4):
        crowd(strangers, f"flood {number}", 4)
    assert strangers.one_too_many("newcomer") == "flood 0 0"


def test_who_has_said_hello_is_no_stranger() -> None:
    strangers: Strangers[str] = Strangers()
    crowd(strangers, "a", 2)
    strangers.discard("a 0")
    strangers.discard("a 0")
    assert list(strangers) == ["a 1"]
    assert "a 0" not in strangers
