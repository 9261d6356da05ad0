"""`weight-broker doctor`: what to look at when something is wrong, each with what to do.

Works without a broker, without devices and without rich. It changes nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from weight_broker.cli import output
from weight_broker.cli.doctor.findings import Finding as Finding
from weight_broker.cli.doctor.findings import Verdict as Verdict
from weight_broker.cli.failure import ExitCode


def run(options: argparse.Namespace) -> ExitCode:
    """Runs all checks; FAILED if one of them found a problem."""
    from weight_broker.cli.doctor import ascend, broker, host, proof

    if options.prove is not None:
        return proof.run(options)
    findings, state = broker.findings(options.runtime_directory, options.timeout)
    findings += host.findings(state)
    findings += ascend.findings(state)
    counts = {verdict.value: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    if options.json:
        output.print_json({"findings": [asdict(finding) for finding in findings], **counts})
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            print(f"{finding.verdict:<7}  {finding.check:<{width}}  {output.plain(finding.found)}")
            if finding.fix:
                print(f"{'':<7}  {'':<{width}}  -> {output.plain(finding.fix)}")
        print(f"\n{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} checks are fine")
    return ExitCode.FAILED if counts["problem"] else ExitCode.DONE
