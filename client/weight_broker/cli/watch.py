"""`weight-broker watch`: the state, then every change as it happens."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator

from weight_broker.cli import output
from weight_broker.cli.failure import ExitCode
from weight_broker.cli.inspector import Inspector
from weight_broker.cli.status import path_name
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import resources_pb2


def run(options: argparse.Namespace) -> ExitCode:
    """Prints a line for each change until interrupted; with --json, each message of the stream."""
    with Inspector(options.runtime_directory) as inspector:
        for response in inspector.watch():
            if options.json:
                output.print_json(output.message_to_json(response), line=True)
                continue
            for line in lines(response):
                now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
                print(f"{now} {line}", flush=True)
    return ExitCode.DONE


def lines(response: pb.WatchResponse) -> Iterator[str]:
    """One line for each change; "=" in a full state, "+" for a change, "-" for a removal."""
    sign = "=" if response.snapshot else "+"
    if response.snapshot_start:
        yield "= full state"
    for change in response.changes:
        match change.WhichOneof("change"):
            case "weight_set":
                yield f"{sign} {_weight_set(change.weight_set)}"
            case "removed_weight_set_id":
                yield f"- weight set {change.removed_weight_set_id}"
            case "instance":
                instance = change.instance
                state = output.state(resources_pb2.Instance.State.Name(instance.state))
                name = output.plain(instance.name)
                yield f"{sign} instance {instance.instance_id} {name} (pid {instance.pid}): {state}"
            case "removed_instance_id":
                yield f"- instance {change.removed_instance_id}"
            case "transfer":
                yield f"{sign} {_transfer(change.transfer)}"
            case _:  # from a newer broker
                pass


def _weight_set(row: resources_pb2.WeightSet) -> str:
    states = [
        f"{output.plain(source.instance_name or source.instance_id)} "
        f"{output.state(resources_pb2.Publication.State.Name(source.state))}"
        for source in row.publications
    ]
    parts = [f"sources: {', '.join(states) or 'none'}"]
    if row.HasField("cold_load_lease"):
        holder = row.cold_load_lease.instance_name or row.cold_load_lease.instance_id
        parts.append(f"loading: {output.plain(holder)}")
    if row.waiting_count:
        parts.append(f"waiting: {row.waiting_count}")
    return f"weight set {row.weight_set_id} {output.plain(row.key.model)}: {'; '.join(parts)}"


def _transfer(row: resources_pb2.Transfer) -> str:
    state = output.state(resources_pb2.Transfer.State.Name(row.state))
    failure = f" ({output.plain(row.failure)})" if row.failure else ""
    return (
        f"transfer {row.transfer_id} of {row.weight_set_id}, {output.size(row.size_bytes)}, {path_name(row.path)}, "
        f"{row.source_instance_id} to {row.receiver_instance_id}: {state}{failure}"
    )
