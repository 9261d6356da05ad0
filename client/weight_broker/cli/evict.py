"""`weight-broker evict`: take a publication out of service at once. For administrators."""

from __future__ import annotations

import argparse

from weight_broker.cli import output, text
from weight_broker.cli.administration import administration
from weight_broker.cli.failure import ExitCode
from weight_broker.v1 import administration_service_pb2 as pb


def run(options: argparse.Namespace) -> ExitCode:
    """Evicts; `PublicationNotFound` if there is no such publication."""
    request = pb.EvictRequest(publication_id=options.publication_id)
    with administration(options.runtime_directory, "evict") as service:
        answer = service.call(lambda stub, who: stub.Evict(request, timeout=options.timeout, metadata=who))
    one = answer.publication
    if options.json:
        output.print_json({"publication": output.message_to_json(one)})
    else:
        print(f"evicted {one.publication_id} of {text.plain(one.instance_name or one.instance_id)}")
    return ExitCode.DONE
