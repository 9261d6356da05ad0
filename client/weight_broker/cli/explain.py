"""`weight-broker explain`: what an acquire of a weight set would get now, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from weight_broker.cli import output
from weight_broker.cli.failure import CommandError, ExitCode
from weight_broker.cli.inspector import Inspector
from weight_broker.errors import InvalidArgument
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import DEVICE_KINDS, key_from_wire, key_to_wire

_OPTIONS = ("model", "revision", "dtype", "checkpoint_digest", "quantization", "role", "stage")
_RANKS = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "data_parallel")


def run(options: argparse.Namespace) -> ExitCode:
    key = key_of(options)
    with Inspector(options.runtime_directory, options.timeout) as inspector:
        if key is not None:
            request = pb.ExplainRequest(key=key)
        else:
            request = pb.ExplainRequest(weight_set_id=inspector.resolve(options.key))
        if options.memory is not None:
            request.device_kind = DEVICE_KINDS[options.memory]
        answer = inspector.explain(request)
    if options.json:
        output.print_json(output.message_to_json(answer))
    else:
        _print(answer)
    return ExitCode.DONE


def key_of(options: argparse.Namespace) -> weight_set_pb2.WeightSetKey | None:
    """The key that the options describe; None if they name an id or its start."""
    fields = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    ways = [options.key is not None, options.model_dir is not None, bool(fields)]
    if sum(ways) != 1 and not (ways == [False, True, True] and set(fields) == {"dtype"}):
        raise CommandError(
            "give one of: an id or its start, a key in JSON, --model with its options, --model-dir", ExitCode.USAGE
        )
    if options.model_dir is not None:
        return _key_of_directory(options.model_dir, options.dtype)
    if fields:
        if "model" not in fields:
            raise CommandError("--model is missing: --revision and the like need it", ExitCode.USAGE)
        return parse_key({**fields, "engine_attributes": dict(map(_attribute, options.attribute or ()))})
    if not options.key.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(options.key)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"the key is not JSON: {error}", ExitCode.USAGE) from None
    return parse_key(content)


def parse_key(content: dict[str, Any]) -> weight_set_pb2.WeightSetKey:
    """A key in JSON, as `status --json` prints it or as `WeightSetKey.canonical` writes it; missing fields have their
    defaults."""
    fields = {name: value for name, value in content.items() if name != "form"}
    for name, default in (("role", "target"), ("stage", "loaded")):
        value = str(fields.get(name, default))
        prefix = f"{name.upper()}_"
        fields[name] = value if value.startswith(prefix) else prefix + value.upper()
    fields.setdefault("dtype", "bfloat16")
    rank = fields.get("rank", {})
    if isinstance(rank, dict):
        fields["rank"] = {f"{kind}_size": 1 for kind in _RANKS} | rank
    attributes = fields.get("engine_attributes", {})
    if isinstance(attributes, dict):
        fields["engine_attributes"] = [{"name": name, "value": value} for name, value in attributes.items()]
    try:
        message = ParseDict(fields, weight_set_pb2.WeightSetKey())
        return key_to_wire(key_from_wire(message))
    except (ParseError, InvalidArgument, SystemError) as error:  # SystemError: protobuf's, for names that are no UTF-8
        raise CommandError(f"this is not a key: {error}", ExitCode.USAGE) from None


def _key_of_directory(model_dir: str, dtype: str | None) -> weight_set_pb2.WeightSetKey:
    if not Path(model_dir).is_dir():  # transformers would look for a repository of that name
        raise CommandError(f"{model_dir} is not a directory", ExitCode.USAGE)
    try:
        from weight_broker.integrations.transformers import weight_set_key
    except ImportError as error:
        raise CommandError(f"--model-dir needs the package {error.name}", ExitCode.USAGE) from None
    try:
        return key_to_wire(weight_set_key(model_dir, dtype=dtype))
    except (OSError, ValueError) as error:
        raise CommandError(f"{model_dir}: {error}", ExitCode.USAGE) from None


def _attribute(option: str) -> tuple[str, str]:
    name, separator, value = option.partition("=")
    if not separator:
        raise CommandError(f"--attribute {option}: write NAME=VALUE", ExitCode.USAGE)
    return name, value


def _fields(message: weight_set_pb2.WeightSetKey) -> Iterator[tuple[str, str]]:
    """The key's fields under the names of the options; ranks only where the group has several."""
    key = key_from_wire(message)
    for name in (*_OPTIONS[:2], "checkpoint_digest", "dtype", "quantization", "role", "stage"):
        if value := str(getattr(key, name)):
            yield name, value
    for kind in _RANKS:
        size = getattr(key.rank, f"{kind}_size")
        if size > 1:
            yield f"{kind}_rank", f"{getattr(key.rank, f'{kind}_rank')} of {size}"
    yield from ((f"engine_attributes[{name}]", value) for name, value in key.engine_attributes.items())


def _print(answer: pb.ExplainResponse) -> None:
    console = output.console()
    from rich.text import Text

    outcome = output.state(pb.ExplainResponse.Outcome.Name(answer.outcome))
    console.print(Text.assemble((outcome, "bold"), f": {output.plain(answer.summary)}"))
    console.print(f"weight set {answer.weight_set_id}")
    if answer.HasField("key"):
        for name, value in _fields(answer.key):
            console.print(f"  {name}: {output.plain(value)}", soft_wrap=True)
    if answer.candidates:
        table = output.table("Candidates", "publication|instance|host|generation|>readers|verdict")
        for candidate in answer.candidates:
            source = candidate.publication
            refusal = output.state(pb.Candidate.Refusal.Name(candidate.refusal)).replace("unspecified", "")
            verdict = "chosen" if candidate.chosen else f"{refusal}: {candidate.detail}" if refusal else "could serve"
            table.add_row(
                source.publication_id,
                output.plain(source.instance_name or source.instance_id),
                source.host_id,
                str(source.generation),
                f"{source.reader_count}/{source.reader_limit}",
                output.plain(verdict),
            )
        console.print(table)
    if answer.HasField("cold_load_lease"):
        lease = answer.cold_load_lease
        holder = output.plain(lease.instance_name or lease.instance_id)
        console.print(f"being loaded by {holder} (fencing token {lease.fencing_token}); {answer.waiting_count} wait")
    for miss in answer.near_misses:
        console.print(
            f"near miss: {miss.weight_set_id} differs in {', '.join(miss.differing_fields)}",
            soft_wrap=True,
        )
