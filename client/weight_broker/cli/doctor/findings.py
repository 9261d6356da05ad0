"""What the checks of `weight-broker doctor` find."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """It works, but worse than it could, or it may stop working."""
    PROBLEM = "problem"
    """It does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""
    """What to do; empty if nothing is to be done."""


def ok(check: str, found: str) -> Finding:
    """Nothing is to be done."""
    return Finding(check, Verdict.OK, found)


def warning(check: str, found: str, fix: str) -> Finding:
    """It works, but."""
    return Finding(check, Verdict.WARNING, found, fix)


def problem(check: str, found: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(check, Verdict.PROBLEM, found, fix)
