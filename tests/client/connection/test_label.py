"""Names and reasons that are only shown never fail a call."""

from __future__ import annotations

import pytest

from weight_broker.connection.label import MAX_NAME_CHARACTERS, name_label, shortened


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("", ""),
        ("Qwen/Qwen2-0.5B-target-tp0pp0", "Qwen/Qwen2-0.5B-target-tp0pp0"),
        ("模型/千问", "模型/千问"),
        ("two\nlines\x1b[1m", "two�lines�[1m"),
        ("mod\udce8le", "mod�le"),
        ("x" * MAX_NAME_CHARACTERS, "x" * MAX_NAME_CHARACTERS),
        ("x" * 129, "x" * 127 + "…"),
    ],
)
def test_a_name_is_printable_and_short(name: str, label: str) -> None:
    assert name_label(name) == label
    assert label.isprintable()


def test_a_reason_with_a_file_name_that_is_not_utf_8_can_be_sent() -> None:
    assert shortened("/models/mod\udce8le is damaged", 1024) == r"/models/mod\udce8le is damaged"
    assert shortened("x" * 2000, 1024).encode() == b"x" * 1023 + "…".encode()
