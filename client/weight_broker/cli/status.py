"""`weight-broker status`: weight sets, instances, leases, transfers and devices of this host."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from weight_broker.cli import output, status_cards
from weight_broker.cli.failure import ExitCode
from weight_broker.cli.inspector import Inspector, State, age_seconds
from weight_broker.v1 import resources_pb2 as pb
from weight_broker.wire import lease_end

if TYPE_CHECKING:
    from rich.console import RenderableType

_SHORT_ID = 12


def run(options: argparse.Namespace) -> ExitCode:
    with Inspector(options.runtime_directory, options.timeout) as inspector:
        state = inspector.state(transfer_limit=options.transfers)
    if options.json:
        output.print_json(state_to_json(state))
    else:
        console = output.console()
        from rich.text import Text

        for row in renderables(state):
            # A line that is not for a terminal stays one line, however long it is.
            console.print(row, soft_wrap=isinstance(row, Text) and not console.is_terminal)
    return ExitCode.DONE


def state_to_json(state: State) -> dict[str, Any]:
    """The state in protobuf's JSON form, and `residency`: which instance has what on which device."""
    return {
        "host": output.message_to_json(state.host),
        "weight_sets": [output.message_to_json(row) for row in state.weight_sets],
        "instances": [output.message_to_json(row) for row in state.instances],
        "cold_load_leases": [output.message_to_json(row) for row in state.leases],
        "transfers": [output.message_to_json(row) for row in state.transfers],
        "residency": status_cards.residency(state),
    }


def renderables(state: State) -> list[RenderableType]:
    """A line about the host, then tables; empty tables are left out."""
    from rich.text import Text

    tables = [_weight_sets(state), _publications(state), _instances(state), _leases(state), _transfers(state)]
    found: list[RenderableType] = [Text(host_line(state.host), style="bold red" if state.host.draining else "")]
    found += status_cards.renderables(state)
    found += [row for row in tables if row.row_count]
    return found


def host_line(host: pb.Host) -> str:
    return (
        f"{output.plain(host.hostname)}: broker {host.version}, pid {host.pid}, "
        f"up {output.age(_since(host, 'uptime', 'start_time'))}"
        f"{', DRAINING' if host.draining else ''}; directory {host.directory}; "
        f"{host.instance_count} instances, {host.publication_count} publications, "
        f"{output.size(host.region_bytes)} in {host.region_count} regions, "
        f"{host.running_transfer_count} transfers running, {host.waiting_acquisition_count} waiting"
    )


def _weight_sets(state: State) -> Any:
    table = output.table("Weight sets", "id|model|revision|dtype|rank|>size|>sources|>waiting|loading")
    for row in state.weight_sets:
        resident = [source for source in row.publications if source.state == pb.Publication.STATE_RESIDENT]
        largest = max((source.size_bytes for source in row.publications), default=0)
        table.add_row(
            row.weight_set_id[:_SHORT_ID],
            output.plain(row.key.model),
            output.plain(row.key.revision)[:_SHORT_ID],
            output.plain(row.key.dtype),
            rank(row),
            output.size(largest) if row.publications else "",
            str(len(resident)),
            str(row.waiting_count),
            output.plain(row.cold_load_lease.instance_name or row.cold_load_lease.instance_id),
        )
    return table


def _publications(state: State) -> Any:
    table = output.table("Publications", "id|weight set|instance|state|memory|>tensors|>readers|>served|>age")
    for weight_set in state.weight_sets:
        for row in weight_set.publications:
            reason = f": {output.plain(row.quarantine_reason)}" if row.quarantine_reason else ""
            table.add_row(
                row.publication_id,
                row.weight_set_id[:_SHORT_ID],
                output.plain(row.instance_name or row.instance_id),
                output.state(pb.Publication.State.Name(row.state)) + reason + (", in check" * row.being_checked),
                status_cards.device(row),
                str(row.tensor_count),
                f"{row.reader_count}/{row.reader_limit}",
                str(row.served_count),
                output.age(_since(row, "age", "publish_time")),
            )
    return table


def _instances(state: State) -> Any:
    table = output.table("Instances", "id|name|>pid|>uid|state|>publications|>attached for")
    for row in state.instances:
        table.add_row(
            row.instance_id,
            output.plain(row.name),
            str(row.pid) if row.pid else "?",
            str(row.uid),
            output.state(pb.Instance.State.Name(row.state)) + _suspicion(row),
            str(row.publication_count),
            output.age(_since(row, "age", "attach_time")),
        )
    return table


def _suspicion(row: pb.Instance) -> str:
    return f", suspect: {row.false_damage_reports} false reports of damage, its own memory?" if row.suspect else ""


def _leases(state: State) -> Any:
    table = output.table("Cold-load leases", "weight set|holder|>fencing token|>held for|>ends in")
    for row in state.leases:
        table.add_row(
            row.weight_set_id[:_SHORT_ID],
            output.plain(row.instance_name or row.instance_id),
            str(row.fencing_token),
            output.age(_since(row, "age", "acquire_time")),
            output.age(max(lease_end(row) - time.time(), 0.0)),
        )
    return table


def _transfers(state: State) -> Any:
    names = {row.instance_id: output.plain(row.name or row.instance_id) for row in state.instances}
    table = output.table("Transfers, newest first", "id|weight set|from|to|by|path|state|>size|>duration|failure")
    for row in state.transfers:
        duration = _since(row, "elapsed", "start_time")
        table.add_row(
            row.transfer_id,
            row.weight_set_id[:_SHORT_ID],
            names.get(row.source_instance_id, row.source_instance_id),
            names.get(row.receiver_instance_id, row.receiver_instance_id),
            output.state(pb.DataPlane.Name(row.data_plane)).removeprefix("plane "),
            path_name(row.path),
            output.state(pb.Transfer.State.Name(row.state)),
            output.size(row.size_bytes),
            output.seconds(max(duration, 0.0)),
            output.plain(row.failure),
        )
    return table


def rank(weight_set: pb.WeightSet) -> str:
    """For example "tp 1/4"; empty for a model on one device."""
    ranks = weight_set.key.rank
    found = [
        f"{short} {getattr(ranks, f'{kind}_parallel_rank')}/{getattr(ranks, f'{kind}_parallel_size')}"
        for short, kind in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"), ("dp", "data"))
        if getattr(ranks, f"{kind}_parallel_size") > 1
    ]
    return " ".join(found)


def path_name(path: pb.TransferPath.ValueType) -> str:
    """How bytes reach the receiver, for example "zero copy"."""
    return output.state(pb.TransferPath.Name(path)).removeprefix("path ")


def _since(row: Message, measured: str, begun: str) -> float:
    """Seconds as the broker measured them, also 0. An older broker measured none: then a clock that was set shows."""
    if row.HasField(measured):
        return float(getattr(row, measured).ToNanoseconds() / 1e9)
    return age_seconds(getattr(row, begun).ToNanoseconds() / 1e9)
