"""`weight-broker evict` and `weight-broker quarantine`: takes a publication out of service. For administrators."""

from __future__ import annotations

import argparse

from weight_broker.cli import output
from weight_broker.cli.administration import administration
from weight_broker.cli.failure import ExitCode
from weight_broker.v1 import administration_service_pb2 as pb
from weight_broker.v1 import resources_pb2


def run(options: argparse.Namespace) -> ExitCode:
    """Raises `PublicationNotFound`. An evicted publication is gone; a quarantined one stays in the listings."""
    return _evict(options) if options.command == "evict" else _quarantine(options)


def _evict(options: argparse.Namespace) -> ExitCode:
    request = pb.EvictRequest(publication_id=options.publication_id)
    with administration(options.runtime_directory, "evict") as service:
        answer = service.call(lambda stub, who: stub.Evict(request, timeout=options.timeout, metadata=who))
    publication = answer.publication
    if options.json:
        output.print_json({"publication": output.message_to_json(publication)})
    else:
        print(f"evicted {publication.publication_id} of {_holder(publication)}")
    return ExitCode.DONE


def _quarantine(options: argparse.Namespace) -> ExitCode:
    request = pb.QuarantineRequest(publication_id=options.publication_id, reason=options.reason)
    with administration(options.runtime_directory, "quarantine") as service:
        answer = service.call(lambda stub, who: stub.Quarantine(request, timeout=options.timeout, metadata=who))
    publication = answer.publication
    if options.json:
        output.print_json({"publication": output.message_to_json(publication)})
    else:
        reason = output.plain(publication.quarantine_reason)
        print(f"quarantined {publication.publication_id} of {_holder(publication)}: {reason}")
    return ExitCode.DONE


def _holder(publication: resources_pb2.Publication) -> str:
    return output.plain(publication.instance_name or publication.instance_id)
