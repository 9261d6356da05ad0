"""`weight-broker quarantine`: set a publication aside, so that it is shown but never read again. For administrators."""

from __future__ import annotations

import argparse

from weight_broker.cli import output, text
from weight_broker.cli.administration import administration
from weight_broker.cli.failure import ExitCode
from weight_broker.v1 import administration_service_pb2 as pb


def run(options: argparse.Namespace) -> ExitCode:
    """Quarantines; `PublicationNotFound` if there is no such publication."""
    request = pb.QuarantineRequest(publication_id=options.publication_id, reason=options.reason)
    with administration(options.runtime_directory, "quarantine") as service:
        answer = service.call(lambda stub, who: stub.Quarantine(request, timeout=options.timeout, metadata=who))
    one = answer.publication
    if options.json:
        output.print_json({"publication": output.message_to_json(one)})
    else:
        holder = text.plain(one.instance_name or one.instance_id)
        print(f"quarantined {one.publication_id} of {holder}: {text.plain(one.quarantine_reason)}")
    return ExitCode.DONE
