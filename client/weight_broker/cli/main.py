"""The command `weight-broker`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from weight_broker._version import __version__
from weight_broker.cli.encoding import carry_every_character, text_argument
from weight_broker.cli.failure import EXIT_CODES_TEXT, CommandError, ExitCode, exit_code_of, stoppable
from weight_broker.errors import BrokerError
from weight_broker.kinds import TRAITS
from weight_broker.runtime_directory import DENIED_METADATA

_COMMANDS = {
    "demo": "weight_broker.demo.run",
    "doctor": "weight_broker.cli.doctor.run",
    "evict": "weight_broker.cli.set_aside",
    "quarantine": "weight_broker.cli.set_aside",
}
"""Modules of the commands whose module has another name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    carry_every_character()
    options = parser().parse_args(arguments)
    try:
        return _run_demo(options) if options.command == "demo" else _run(options)
    except CommandError as error:
        print(f"weight-broker: {error}", file=sys.stderr)
        return error.code
    except BrokerError as error:
        instead = f", or run `sudo weight-broker {options.command}`" if DENIED_METADATA in error.metadata else ""
        print(f"weight-broker: {error.message}{instead} ({error.reason})", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has ended (`| head`). Without this, Python reports the pipe again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE


def _run(options: argparse.Namespace) -> int:
    # Commands are imported on use: --help needs neither gRPC nor torch.
    module = importlib.import_module(_COMMANDS.get(options.command, f"weight_broker.cli.{options.command}"))
    code: int = module.run(options)
    sys.stdout.flush()
    return code


def _run_demo(options: argparse.Namespace) -> int:
    with stoppable():  # imports included: the demo's take longest
        return _run(options)


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser(
        prog="weight-broker",
        description="Shows and administers this host's weight broker.",
        epilog=EXIT_CODES_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument("--version", action="version", version=f"weight-broker {__version__}")
    commands = command_line.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_status(commands)
    _add_explain(commands)
    _add(commands, "watch", "print the state, then every change as it happens")
    _add_doctor(commands)
    _add_drain(commands)
    _add_evict(commands)
    _add_quarantine(commands)
    _add_demo(commands)
    return command_line


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add(commands: _Commands[argparse.ArgumentParser], name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXIT_CODES_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON (needs no rich)")
    if name != "demo":
        command.add_argument(
            "--runtime-directory",
            type=Path,
            metavar="DIR",
            help="where the broker's sockets are (default: $WEIGHT_BROKER_RUNTIME_DIRECTORY and the usual places)",
        )
    return command


def _add_answer_timeout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timeout", type=_positive, default=10.0, metavar="SECONDS", help="for each answer of the broker (10)"
    )


def _add_status(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "status", "show weight sets, publications, instances, leases and transfers")
    _add_answer_timeout(command)
    command.add_argument(
        "--transfers", type=_count, default=20, metavar="N", help="how many transfers to show, newest first (20)"
    )


def _add_explain(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "explain", "say what an acquire of a weight set would get now, and why")
    _add_answer_timeout(command)
    command.add_argument(
        "key", nargs="?", type=text_argument, metavar="KEY", help="id of a weight set or its start, or a key in JSON"
    )
    command.add_argument("--model-dir", metavar="DIR", help="instead of KEY: the key that loading this directory has")
    command.add_argument(
        "--model", type=text_argument, metavar="NAME", help="instead of KEY: the key's model, with the options below"
    )
    for name in ("revision", "dtype", "checkpoint-digest", "quantization"):
        command.add_argument(f"--{name}", type=text_argument, metavar="TEXT", help="field of the key")
    command.add_argument("--role", choices=("target", "draft"), help="field of the key")
    command.add_argument("--stage", choices=("loaded", "runtime"), help="field of the key")
    command.add_argument(
        "--memory",
        choices=tuple(TRAITS),
        help="kind of memory that receives (default: that in which it is published)",
    )
    command.add_argument(
        "--attribute", type=text_argument, action="append", metavar="NAME=VALUE", help="engine attribute of the key"
    )


def _add_doctor(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "doctor", "check what can be wrong here, and say what to do about it")
    _add_answer_timeout(command)
    command.add_argument(
        "--prove",
        nargs="?",
        const=Path("proof.json"),
        type=Path,
        metavar="FILE",
        help="instead: compare the drivers of this machine's devices with their sources, in processes that use the "
        "devices for some minutes; write FILE (proof.json) to attach to a report",
    )
    command.add_argument(
        "--beside-others", action="store_true", help="with --prove: although other processes use the devices"
    )
    command.add_argument(
        "--as-unit",
        nargs="*",
        metavar="FILE",
        help="with --prove, as root: under systemd with the properties of weight-broker.service as it is installed, or "
        "of these files",
    )


def _add_drain(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "drain", "stop granting new work and wait until no transfer runs (administrators)")
    command.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help="how long to wait for running transfers (default: the broker's drain_seconds)",
    )


def _add_evict(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "evict", "take a publication out of service at once (administrators)")
    _add_answer_timeout(command)
    _add_publication(command)


def _add_quarantine(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "quarantine", "set a publication aside: shown, but never read again (administrators)")
    _add_answer_timeout(command)
    _add_publication(command)
    command.add_argument("--reason", type=text_argument, required=True, metavar="TEXT", help="why; shown in listings")


def _add_publication(command: argparse.ArgumentParser) -> None:
    command.add_argument("publication_id", metavar="PUBLICATION_ID", help="as `weight-broker status` shows it")


def _add_demo(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _add(commands, "demo", "run the main job: one cold load from disk, then instances filled from it")
    command.add_argument(
        "--model-dir", type=Path, metavar="DIR", help="a model to load (default: one with random weights)"
    )
    command.add_argument("--instances", type=_count, metavar="N", help="instances to start at once (3; npu: up to 3)")
    command.add_argument("--size", metavar="SIZE", help="size of the random model, for example 64M (about 1 GB)")
    command.add_argument(
        "--device",
        choices=("cpu", "npu"),
        default="cpu",
        help="memory that the weights are loaded into: of the host, or of Ascend cards, one for each instance (cpu)",
    )
    command.add_argument(
        "--framework",
        choices=("auto", "acl", "torch_npu"),
        default="auto",
        help="npu only: who allocates the tensors, torch_npu or Ascend's runtime alone (torch_npu if it is installed)",
    )
    command.add_argument(
        "--run-in",
        metavar="COMMAND",
        help="npu only: a command that starts each instance, for example in a container: `nsenter --target PID "
        "--mount`; {card} stands for the number of the instance's card",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 3600:
        raise argparse.ArgumentTypeError("must be above 0 and at most a day")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError("must be from 1 to 1000")
    return value


if __name__ == "__main__":
    sys.exit(main())
