"""The doctor's checks of devices: whether the broker serves them; and on an Ascend host the runtime, the driver, the
datasystem worker, and those settings of instances that decide how their memory can be shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from weight_broker.cli import output
from weight_broker.cli.doctor import ascend_driver, ascend_versions, ascend_worker, occupation
from weight_broker.cli.doctor.findings import Finding, ok, problem, warning
from weight_broker.cli.inspector import State
from weight_broker.drivers import hdk
from weight_broker.v1 import resources_pb2 as pb
from weight_broker.v1 import weight_set_pb2

_PROBE_SECONDS = 120.0
_SHARED_NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")
_RESTART = (
    "see `npu-smi info` (or `nvidia-smi`) and the broker's log; the broker asks the driver again when it is restarted"
)
_LOOK_AGAIN = "it is tried again; if it stays, see the broker's log"


def findings(state: State | None, *, devices: Path = Path("/dev"), driver: Path = hdk.VERSION_FILE) -> list[Finding]:
    """`devices`: where device nodes are; `driver`: the driver's version file."""
    nodes = sorted([*devices.glob("davinci[0-9]*"), *devices.glob("vdavinci[0-9]*")])
    probed = _probe()
    cards = _cards(state)
    served = state is not None and (state.host.HasField("datasystem_worker") or bool(_npus(state)))
    if not (nodes or served or probed.get("runtime")):
        return [*cards, ok("Ascend", "no Ascend devices here")]
    version = hdk.installed_version(driver)
    found = [_runtime(probed), _driver(version), _nodes(devices, nodes, int(probed.get("devices", 0)))]
    found += ascend_versions.findings(probed, nodes, is_served=_is_ready(state))
    found += occupation.findings(state.host.pid if state is not None else 0)
    found += ascend_driver.groups() if nodes else ()
    if probed.get("devices"):
        found.append(ascend_driver.numbers(_probe("card_probe")))
    found += _torch_npu(probed)
    found += cards
    if state is not None and not _npus(state) and not state.host.device_problem:
        found.append(
            warning(
                "cards",
                "the broker serves no NPU",
                "set datasystem.managed = true or datasystem.worker_address, and cards.library_path if its environment "
                "has no CANN; then restart it",
            )
        )
    found.append(ascend_worker.finding(state))
    return found + _settings(state, version)


def _probe(module: str = "probe") -> dict[str, Any]:
    """What a process of its own sees, because a broken installation may end whoever loads it."""
    environment = dict(os.environ)
    if path := environment.get("WEIGHT_BROKER_CARDS_LIBRARY_PATH"):  # as a broker started from here would do
        environment["LD_LIBRARY_PATH"] = path
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"weight_broker.cli.doctor.{module}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=_PROBE_SECONDS,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"problem": f"Ascend's runtime does not answer within {_PROBE_SECONDS:.0f} s"}
    except (ValueError, IndexError):
        words = done.stderr.strip().splitlines()
        return {"problem": f"whoever loads it ends with {done.returncode}" + (f": {words[-1]}" if words else "")}
    return answer


def _runtime(probed: dict[str, Any]) -> Finding:
    if missing := probed.get("missing"):
        return problem(
            "Ascend runtime",
            f"it does not have {', '.join(missing)}",
            "upgrade CANN: 8.3.RC1 is the oldest that shares memory of an instance (vLLM Ascend 0.11.0)",
        )
    if words := probed.get("problem"):
        return problem("Ascend runtime", str(words), "source CANN's set_env.sh for this process and for the broker")
    return ok("Ascend runtime", f"libascendcl is found; it sees {probed.get('devices', 0)} devices")


def _driver(version: str | None) -> Finding:
    name = "Ascend driver"
    if version is None:
        return warning(
            name,
            f"its version cannot be seen: {hdk.VERSION_FILE} is not there",
            f"mount that file into the container; the oldest driver that shares memory is {hdk.SHARING_FLOOR}",
        )
    if hdk.is_below(version, hdk.SHARING_FLOOR):
        return problem(
            name, f"{version} cannot share memory between processes", f"upgrade to {hdk.SHARING_FLOOR} or newer"
        )
    if hdk.is_below(version, hdk.CHUNK_SHARING_FLOOR):
        return warning(
            name,
            f"{version} cannot share expandable segments",
            f"upgrade to {hdk.CHUNK_SHARING_FLOOR}, or set PYTORCH_NPU_ALLOC_CONF=expandable_segments:False",
        )
    return ok(name, f"{version} shares plain allocations and expandable segments")


def _nodes(devices: Path, nodes: list[Path], seen: int) -> Finding:
    name = "device nodes"
    if not nodes:
        fix = f"start the container with --device={devices}/davinciN for each card, and {', '.join(_SHARED_NODES)}"
        found = f"there is no {devices}/davinci*"
        return warning(name, f"{found}, although the runtime sees devices", fix) if seen else problem(name, found, fix)
    all_nodes = [*nodes, *(devices / shared for shared in _SHARED_NODES)]
    missing = [str(node) for node in all_nodes if not node.exists()]
    if missing:
        return problem(name, f"{', '.join(missing)} missing", "add --device= for each to the container")
    refused = [str(node) for node in all_nodes if not os.access(node, os.R_OK | os.W_OK)]
    if refused:
        return problem(
            name,
            f"uid {os.geteuid()} may not use {', '.join(refused)}",
            "add the user to the group that owns them (HwHiAiUser); for the broker see deploy/systemd/npu.conf",
        )
    return ok(name, f"{', '.join(node.name for node in nodes)} can be used")


def _torch_npu(probed: dict[str, Any]) -> list[Finding]:
    if words := probed.get("torch_npu_problem"):
        return [problem("torch_npu", f"it cannot be imported: {words}", "install the one that fits torch and CANN")]
    if version := probed.get("torch_npu"):
        return [ok("torch_npu", f"{version} can be imported")]
    return []


def _npus(state: State) -> list[pb.Card]:
    return [card for card in state.host.cards if card.device_kind == weight_set_pb2.DEVICE_KIND_NPU]


def _is_ready(state: State | None) -> bool:
    return state is not None and any(card.state == pb.Card.STATE_READY for card in _npus(state))


def _cards(state: State | None) -> list[Finding]:
    """Of every kind."""
    if state is None:
        return []
    found = []
    if state.host.device_problem:
        found.append(problem("devices", f"the broker does not serve them: {state.host.device_problem}", _RESTART))
    for card in state.host.cards:
        name, soc = f"card {card.device_id}", output.plain(card.soc)
        if card.state == pb.Card.STATE_READY:
            found.append(ok(name, f"{soc}, ready; {card.region_count} regions are mapped"))
        else:
            fix = _RESTART if card.state == pb.Card.STATE_FAILED else _LOOK_AGAIN
            found.append(problem(name, f"{output.state(pb.Card.State.Name(card.state))}: {card.problem}", fix))
    return found


def _settings(state: State | None, version: str | None) -> list[Finding]:
    """Of this process and of every attached instance that this user may look at."""
    found = _settings_of("this process", dict(os.environ), "", version)
    for instance in state.instances if state is not None else ():
        try:
            entries = Path(f"/proc/{instance.pid}/environ").read_bytes().decode(errors="replace").split("\0")
            command = Path(f"/proc/{instance.pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        variables = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        who = output.plain(instance.name or instance.instance_id)
        found += _settings_of(who, variables, command, version)
        found += ascend_driver.ports(who, variables)
    return found


def _settings_of(who: str, variables: dict[str, str], command: str, version: str | None) -> list[Finding]:
    found = []
    allocation = variables.get("PYTORCH_NPU_ALLOC_CONF", "")
    if "expandable_segments:true" in allocation.lower().replace(" ", ""):
        check = "expandable segments"
        if version is not None and hdk.is_below(version, hdk.CHUNK_SHARING_FLOOR):
            found.append(
                problem(
                    check,
                    f"{who} uses them, and driver {version} cannot share them",
                    "set PYTORCH_NPU_ALLOC_CONF=expandable_segments:False for it, or upgrade the driver to "
                    f"{hdk.CHUNK_SHARING_FLOOR}",
                )
            )
        else:
            found.append(ok(check, f"{who} uses them: shared where they are, chunk by chunk"))
    if "--enable-sleep-mode" in command:
        found.append(
            warning(
                "sleep mode",
                f"{who} was started with it: memory of a pool that sleeps cannot be shared where it is",
                "start it without, or see docs/ASCEND.md for what cards.path does about it",
            )
        )
    if (nz := variables.get("VLLM_ASCEND_ENABLE_NZ")) is not None:
        found.append(
            ok(
                "FRACTAL_NZ",
                f"{who} has VLLM_ASCEND_ENABLE_NZ={nz}: source and receiver need the same, or layouts differ",
            )
        )
    return found
