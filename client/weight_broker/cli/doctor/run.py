"""`weight-broker doctor`: what to look at when something is wrong, each with what to do.

Works without a broker, without devices and without rich. It changes nothing.
"""

from __future__ import annotations

import argparse
import enum
from dataclasses import asdict, dataclass

from weight_broker.cli import output, text
from weight_broker.cli.failure import ExitCode


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


def run(options: argparse.Namespace) -> ExitCode:
    """Runs all checks; FAILED if one of them found a problem."""
    from weight_broker.cli.doctor import ascend as doctor_ascend
    from weight_broker.cli.doctor import broker as doctor_broker
    from weight_broker.cli.doctor import host as doctor_host

    findings, state = doctor_broker.findings(options.runtime_directory, options.timeout)
    findings += doctor_host.findings(state)
    findings += doctor_ascend.findings(state)
    counts = {verdict.value: sum(one.verdict is verdict for one in findings) for verdict in Verdict}
    if options.json:
        output.print_json({"findings": [asdict(one) for one in findings], **counts})
    else:
        width = max(len(one.check) for one in findings)
        for one in findings:
            print(f"{one.verdict:<7}  {one.check:<{width}}  {text.plain(one.found)}")
            if one.fix:
                print(f"{'':<7}  {'':<{width}}  -> {text.plain(one.fix)}")
        print(f"\n{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} checks are fine")
    return ExitCode.FAILED if counts["problem"] else ExitCode.DONE
