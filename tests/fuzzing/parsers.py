"""Every parser of foreign bytes, as a function of bytes: it returns, or raises an error that its documentation names.

Any other exception is a defect. Used by hypothesis (test_parsers.py) and by atheris (guided.py).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from google.protobuf.message import DecodeError

from support.attach_room import RecordingAttendance
from weight_broker.cli import explain
from weight_broker.cli.failure import CommandError
from weight_broker.errors import InvalidArgument
from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_digest
from weight_broker.integrations.engine import options
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import digests_from_wire, key_from_wire, layout_from_wire
from weight_brokerd.api import fields as api_fields
from weight_brokerd.attach.conversation import Conversation
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.cards.messages import CODEC
from weight_brokerd.config.loading import Config, ConfigError, environment_variable, load
from weight_brokerd.config.settings import CardSettings
from weight_brokerd.datasystem.leftover import WorkerDirectory
from weight_brokerd.kinds.npu.settings import offers_peer_copy
from weight_brokerd.processes.packets import Joiner, Packet


@dataclass(frozen=True)
class Parser:
    """One parser."""

    parse: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = ()
    """The errors that it may raise, each with a text."""
    samples: tuple[bytes, ...] = ()
    """What it accepts, to begin with."""
    language: str = "bytes"
    """`json`, `toml` or `bytes`."""
    spared: frozenset[str] = frozenset()
    """Names of hostile documents that it is not asked to parse."""


SETTINGS = [
    environment_variable(section.name, setting.name)
    for section in fields(Config)
    for setting in fields(getattr(Config(), section.name))
]
HEADER = b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
_PEER = PeerCredentials(pid=1, uid=0, gid=0, groups=frozenset())


def configuration(data: bytes) -> object:
    return load(_file("broker.toml", data), {})


def environment(data: bytes) -> object:
    """The first byte says which setting, the others are its value."""
    variable = SETTINGS[data[0] % len(SETTINGS)] if data else SETTINGS[0]
    return load(None, {variable: os.fsdecode(data[1:].replace(b"\0", b""))})


def attach_request(data: bytes) -> object:
    """Two packets, as the first and the second of a connection. `answer` raises nothing at all."""
    conversation = Conversation(RecordingAttendance(), _PEER, host_id="host", broker_version="1")
    answers = [conversation.answer(Packet(data, [])), conversation.answer(Packet(data, []))]
    for answer in answers:
        assert answer.response.WhichOneof("response"), "every answer says something"
        assert answer.response.refused.message != "internal error", data
    return answers


def key_on_the_wire(data: bytes) -> object:
    return key_from_wire(weight_set_pb2.WeightSetKey.FromString(data))


def layout_on_the_wire(data: bytes) -> object:
    return layout_from_wire(weight_set_pb2.Layout.FromString(data))


def digests_on_the_wire(data: bytes) -> object:
    granted = pb.Granted.FromString(data)
    return digests_from_wire(granted.digests, len(granted.placements), pass_over_unknown=True)


def arrival_on_the_wire(data: bytes) -> object:
    return api_fields.arrival(pb.TransferSucceeded.FromString(data))


def group_on_the_wire(data: bytes) -> object:
    return api_fields.rank_of_group(weight_set_pb2.LoadGroup.FromString(data))


def child_message(data: bytes) -> object:
    return CODEC.decode(data)


def joined_packets(data: bytes) -> object:
    """Packets of 7 bytes."""
    joiner = Joiner()
    return [joiner.add(data[begin : begin + 7]) for begin in range(0, len(data), 7)]


def key_of_the_command_line(data: bytes) -> object:
    return explain.key_of(_key_options("{" + os.fsdecode(data)[1:]))


def loader_options(data: bytes) -> object:
    return options.parse(data.decode("utf-8", "surrogateescape"))


def safetensors_header(data: bytes) -> object:
    """A file whose header is the data."""
    return _checkpoint({"model.safetensors": struct.pack("<Q", len(data)) + data + bytes(16)})


def safetensors_file(data: bytes) -> object:
    """The data are the whole file."""
    return _checkpoint({"model.safetensors": data})


def safetensors_index(data: bytes) -> object:
    one = struct.pack("<Q", len(HEADER)) + HEADER + bytes(16)
    return _checkpoint({"model.safetensors.index.json": data, "one.safetensors": one})


def checkpoint_configuration(data: bytes) -> object:
    one = struct.pack("<Q", len(HEADER)) + HEADER + bytes(16)
    return _checkpoint({"config.json": data, "model.safetensors": one})


def proof(data: bytes) -> object:
    return offers_peer_copy(CardSettings(peer_copy="auto", proof=str(_file("proof.json", data))))


def leftover_record(data: bytes) -> object:
    """The boot that is written in it is never this one: no process is looked for."""
    path = _file("worker.pid", data)
    directory = WorkerDirectory(path.parent)
    try:
        return asyncio.run(directory.end_leftover(0.0))
    finally:
        directory.close()


def _checkpoint(files: Mapping[str, bytes]) -> str:
    with tempfile.TemporaryDirectory(dir=_scratch()) as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        return checkpoint_digest(directory, cache=False)


def _file(name: str, content: bytes) -> Path:
    path = _scratch() / name
    path.write_bytes(content)
    return path


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzzing-"))


def _key_options(key: str) -> argparse.Namespace:
    names = ("model", "revision", "dtype", "checkpoint_digest", "quantization", "role", "stage")
    return argparse.Namespace(key=key, model_dir=None, attribute=None, memory=None, **dict.fromkeys(names))


_KEY = weight_set_pb2.WeightSetKey(model="m", dtype="bfloat16", role=1, stage=1)  # type: ignore[arg-type]
_WIRE = (DecodeError, InvalidArgument)
_DIGEST = (CheckpointError, OSError)
PARSERS: Mapping[str, Parser] = {
    "configuration": Parser(
        configuration, (ConfigError,), (b"[limits]\npublications = 7\n[log]\nlevel = 'debug'\n",), "toml"
    ),
    "environment": Parser(environment, (ConfigError,), tuple(bytes([i]) + b"7" for i in range(len(SETTINGS)))),
    "attach request": Parser(attach_request, (), (b"\x0a\x06\x08\x01\x12\x02me", b"\x12\x05\x0a\x01r\x10\x07")),
    "key on the wire": Parser(key_on_the_wire, _WIRE, (_KEY.SerializeToString(),)),
    "layout on the wire": Parser(layout_on_the_wire, _WIRE, (b"\x0a\x08\x0a\x01w\x12\x03F32",)),
    "digests on the wire": Parser(digests_on_the_wire, _WIRE, (b"\x0a\x00",)),
    "arrival on the wire": Parser(arrival_on_the_wire, _WIRE, (b"\x08\x01",)),
    "group on the wire": Parser(group_on_the_wire, _WIRE, (b"\x0a\x01g\x18\x02",)),
    "child message": Parser(child_message, (ValueError,), (b'[1,"Done",{}]',), "json"),
    "joined packets": Parser(joined_packets, (ValueError,), (b"\x01abcdef\x00ghijkl",)),
    "key of the command line": Parser(
        key_of_the_command_line,
        (CommandError,),
        (b'{"model":"m","rank":{"tensor_parallel_size":2},"engine_attributes":{"a":"b"}}',),
        "json",
    ),
    "loader options": Parser(loader_options, (InvalidArgument,), (b'{"timeout":3,"stage":"auto"}',), "json"),
    "safetensors header": Parser(safetensors_header, _DIGEST, (HEADER,), "json"),
    "safetensors file": Parser(safetensors_file, _DIGEST, (struct.pack("<Q", len(HEADER)) + HEADER,)),
    "safetensors index": Parser(
        safetensors_index, _DIGEST, (b'{"weight_map":{"w":"one.safetensors"}}',), "json"
    ),
    "checkpoint configuration": Parser(
        checkpoint_configuration, _DIGEST, (b'{"model_type":"qwen2"}',), "json"
    ),
    "proof": Parser(proof, (), (b'{"rows":[{"id":"x","verdict":"proved"}]}',), "json"),
    "leftover record": Parser(
        leftover_record, (), (b'{"pid":1,"start_time":2,"boot_id":"never"}',), "json"
    ),
}  # fmt: skip


def feed(parser: Parser, data: bytes) -> str:
    """What came of it: "" for a value, else the text of the refusal. Raises everything else."""
    try:
        parser.parse(data)
    except parser.refusals as error:
        refusal = str(error)
    else:
        return ""
    assert refusal, "a refusal says what is wrong"
    return refusal
