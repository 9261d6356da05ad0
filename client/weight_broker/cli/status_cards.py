"""The devices in `weight-broker status`: cards, resident weight sets, the datasystem worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weight_broker.cli import output
from weight_broker.cli.inspector import State
from weight_broker.v1 import resources_pb2 as pb
from weight_broker.v1 import weight_set_pb2

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {pb.Card.STATE_DEGRADED: "yellow", pb.Card.STATE_FAILED: "bold red"}


def renderables(state: State) -> list[RenderableType]:
    """Lines and tables; none on a host without devices."""
    from rich.text import Text

    host = state.host
    found: list[RenderableType] = []
    if host.device_problem:
        found.append(Text(f"Devices are not served: {output.plain(host.device_problem)}", style="bold red"))
    if host.HasField("datasystem_worker"):
        worker = host.datasystem_worker
        style = "yellow" if worker.problem else ""
        found.append(Text(worker_line(worker), style=style if worker.reachable else "bold red"))
    if host.cards:
        found += [_cards(host), *([table] if (table := _residency(state)).row_count else [])]
    return found


def worker_line(worker: pb.DatasystemWorker) -> str:
    who = "managed by the broker" if worker.managed else "external"
    state = "reachable" if worker.reachable else "AWAY"
    problem = f": {output.plain(worker.problem)}" if worker.problem else ""
    return f"Datasystem worker {worker.address}, {who}: {state}{problem}"


def residency(state: State) -> list[dict[str, Any]]:
    """A row for each publication, ordered by device and instance."""
    instances = {card.instance_id: card for card in state.instances}
    rows = [
        {
            "device": device(card),
            "instance_id": card.instance_id,
            "instance_name": card.instance_name,
            "pid": instances[card.instance_id].pid if card.instance_id in instances else 0,
            "weight_set_id": card.weight_set_id,
            "model": weight_set.key.model,
            "state": pb.Publication.State.Name(card.state),
            "size_bytes": str(card.size_bytes),
        }
        for weight_set in state.weight_sets
        for card in weight_set.publications
    ]
    return sorted(rows, key=lambda row: (_device_order(str(row["device"])), row["instance_name"], row["weight_set_id"]))


def device(publication: pb.Publication) -> str:
    """The device's identity, or the kind of memory for a kind without devices."""
    kind = output.state(weight_set_pb2.DeviceKind.Name(publication.device_kind)).removeprefix("kind ")
    staged = ", staged" if publication.is_staged else ""
    return (output.plain(publication.device_id) or kind) + staged


def _cards(host: pb.Host) -> Any:
    columns = "card|index|soc|state|>sender|>ending|>receivers|>regions|>offers|>fetches|problem"
    table = output.table("Cards", columns)
    for card in host.cards:
        table.add_row(
            card.device_id,
            str(card.device_index),
            output.plain(card.soc),
            output.state(pb.Card.State.Name(card.state)),
            str(card.sender_pid or "-"),
            _pids(card.retiring_pids),
            _pids(card.receiver_pids),
            str(card.region_count),
            str(card.offer_count),
            str(card.fetch_count),
            output.plain(card.problem),
            style=_STYLES.get(card.state, ""),
        )
    return table


def _residency(state: State) -> Any:
    from rich.text import Text

    table = output.table("Resident, by card", "card|instance|>pid|model|weight set|state|>size")
    shown = ""
    for row in residency(state):
        where = str(row["device"])
        table.add_row(
            where if where != shown else Text(where, style="dim"),
            output.plain(row["instance_name"] or row["instance_id"]),
            str(row["pid"] or "?"),
            output.plain(row["model"]),
            row["weight_set_id"][:12],
            output.state(row["state"]),
            output.size(int(row["size_bytes"])),
        )
        shown = where
    return table


def _pids(pids: Any) -> str:
    return " ".join(map(str, pids)) or "-"


def _device_order(name: str) -> tuple[str, int, str]:
    """npu:10 comes after npu:9."""
    kind, _, number = name.partition(":")
    return kind, int(number) if number.isdecimal() else -1, name
