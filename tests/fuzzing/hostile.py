"""Documents that break parsers: nested without end, numbers that no machine has, texts that are none."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from fuzzing.parsers import Parser

DEPTH = 100_000
DIGITS = 5000
"""More than Python turns into an integer, or an integer into text."""

JSON: Mapping[str, tuple[bytes, ...]] = {
    "deep": (b"[" * DEPTH, b'{"a":' * DEPTH, b'{"w":' + b"[" * DEPTH + b"]" * DEPTH + b"}"),
    "infinite": (
        b'{"w":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,-1e999]}}',
        b'{"pid":1e999,"start_time":NaN,"boot_id":""}',
        b'[Infinity,"Done",{}]',
        b'{"timeout":1e999}',
        b'{"timeout":1' + b"0" * 400 + b"}",
        b'{"model":"m","rank":{"tensor_parallel_size":1e999}}',
    ),
    "long": (b"9" * DIGITS, b'{"timeout":' + b"9" * DIGITS + b"}", b"1" * DIGITS + b".5"),
    "odd": (
        b"",
        b"null",
        b"[]",
        b"{}",
        b'""',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"\\ud800":"\\udfff"}',
        b'{"model":"\\ud800"}',
        b'{"weight_map":{"a":{}}}',
        b'{"weight_map":{"a":"\\u0000"}}',
        b'{"weight_map":{"a":"\\ud800"}}',
        b'{"weight_map":{"a":"' + b"x" * 5000 + b'"}}',
        b'{"w":{"dtype":[],"shape":{},"data_offsets":"ab"}}',
        b'{"w":null}',
        b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"stage":[]}',
        b'{"stage":{}}',
        b'{"digest_mode":null}',
        b"[1,[],{}]",
        b'[1,"Done",[]]',
        b"[1,{},{}]",
        b'{"rows":{}}',
        b'{"rows":[[]]}',
        b'{"rows":5}',
        b'{"rows":[{"id":[],"verdict":{}}]}',
        b'{"pid":[],"start_time":{},"boot_id":1}',
        b'{"pid":' + b"9" * 30 + b',"start_time":-1,"boot_id":null}',
        b'{"model":5,"rank":[],"engine_attributes":[[]]}',
        b'{"model":"m","engine_attributes":{"a":[]}}',
        b'{"model":"m","role":[],"stage":{}}',
        b'{"model":"m","rank":{"tensor_parallel_size":"x"}}',
        b'{"model":"m","rank":5}',
    ),
}
TOML: Mapping[str, tuple[bytes, ...]] = {
    "deep": (b"a = " + b"[" * DEPTH, b"a = " + b"{b=" * DEPTH, b".".join([b"a"] * 2000) + b" = 1"),
    "long": (
        b"[limits]\npublications = " + b"9" * DIGITS,
        b"[limits]\npublications = 0x" + b"f" * DIGITS,
        b"[log]\nlevel = 0b" + b"1" * 20_000,
        b"unknown = 0x" + b"f" * DIGITS,
        b"[limits]\ndrain_seconds = 0x" + b"f" * DIGITS,
    ),
    "odd": (
        b"",
        b"\xff",
        b"[limits]\ndrain_seconds = nan",
        b"[limits]\ndrain_seconds = inf",
        b"[limits]\npublications = 1979-05-27",
        b"limits = 5",
        b"[[limits]]",
        b"[broker]\nruntime_directory = '/" + b"x" * 5000 + b"'",
        b'[broker]\nruntime_directory = "/a\\u0000b"',
        b'[broker]\nadmin_group = "\\u0000"',
        b"[cards]\nlibrary_path = ':::'",
        b"[datasystem]\nextra_arguments = [[], {}, 5]",
        b"[datasystem]\ntoken_file = '/proc/self/mem'",
        b"[metrics]\nlisten = '[::1]:99999'",
    ),
}
LANGUAGES = {"json": JSON, "toml": TOML, "bytes": {"odd": (b"", b"\0", b"\xff" * 64, b"\x0a" * 5000)}}


def documents(parser: Parser) -> list[bytes]:
    """All hostile documents that a parser is to survive."""
    return [text for name, texts in LANGUAGES[parser.language].items() if name not in parser.spared for text in texts]


def mutated(parser: Parser) -> st.SearchStrategy[bytes]:
    """A sample that was cut, extended, spliced with another or with bytes of it changed; or noise."""
    pieces = st.sampled_from([*parser.samples, *(text for text in documents(parser) if len(text) < 200)])
    noise = st.binary(max_size=64)
    position = st.integers(0, (1 << 16) - 1)
    spliced = st.builds(_splice, pieces, position, st.one_of(pieces, noise), position)
    flips = st.lists(st.tuples(position, st.integers(1, 255)), min_size=1, max_size=6)
    return st.one_of(noise, pieces, spliced, st.builds(_flip, pieces, flips), st.builds(_flip, spliced, flips))


def _splice(head: bytes, end: int, tail: bytes, begin: int) -> bytes:
    return head[: end % (len(head) + 1)] + tail[begin % (len(tail) + 1) :]


def _flip(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for position, difference in changes if data else ():
        changed[position % len(data)] ^= difference
    return bytes(changed)
