"""Which drivers can share memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_broker.drivers.hdk import installed_version, is_below


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("24.1.rc3", "25.0.rc1"),
        ("25.0.rc1", "25.0.RC2"),
        ("25.0.rc2", "25.0.0"),
        ("25.0.0", "25.0.1"),
        ("25.0.1", "25.2.rc1"),
        ("25.2.0", "25.3.rc1"),
        ("25.3.rc1", "25.10.rc1"),
        ("25.5.0", "26.0.rc1"),
    ],
)
def test_versions_are_ordered_with_candidates_before_their_release(older: str, newer: str) -> None:
    assert is_below(older, newer)
    assert not is_below(newer, older)
    assert not is_below(older, older)


@pytest.mark.parametrize("version", ["unknown", "", "25", "7.7.t12"])
def test_what_is_no_version_is_not_refused(version: str) -> None:
    assert not is_below(version, "25.0.rc1")


def test_the_version_is_read_from_the_drivers_file(tmp_path: Path) -> None:
    file = tmp_path / "version.info"
    file.write_text("Version=25.3.rc1.2\nascendhal_version=7.35.23\npackage_version=25.3.rc1.2\n")
    assert installed_version(file) == "25.3.rc1.2"
    file.write_text("nothing")
    assert installed_version(file) is None
    assert installed_version(tmp_path / "absent") is None
