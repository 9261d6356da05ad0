"""Which room may import which: the dependency rule of docs/ARCHITECTURE.md, read off the source.

An import at module level runs when the module is imported; one inside a function does not. `if TYPE_CHECKING:` blocks
are for type checkers and count as neither.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = (REPOSITORY / "client", REPOSITORY / "broker")
OURS = {"weight_broker", "weight_brokerd"}

CORE_MAY_IMPORT_OF_OURS = {
    "weight_broker.errors",
    "weight_broker.key",
    "weight_broker.layout",
    "weight_brokerd.core",
}
CORE_MAY_NOT_IMPORT = {"asyncio", "google", "grpc", "numpy", "os", "socket", "structlog", "threading", "time", "torch"}

FRAMEWORKS = {"numpy", "safetensors", "torch", "transformers"}
RPC = {"google", "grpc", "weight_broker.v1"}
MODULES_WITH_RPC = {
    "weight_broker.transfers.acquisition",
    "weight_broker.transfers.calls",
    "weight_broker.connection.channel",
    "weight_broker.wire",
}
"""Client modules that import gRPC or protobuf at module level. All others import these only when they need them."""


class Import(NamedTuple):
    name: str
    at_module_level: bool


class Module(NamedTuple):
    name: str
    imports: list[Import]


def load_modules() -> dict[str, Module]:
    trees = {}
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if "v1" not in parts:
                trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return {name: Module(name, list(imports_in(tree.body, trees.keys()))) for name, tree in trees.items()}


def imports_in(nodes: Iterable[ast.AST], ours: Iterable[str] = (), *, at_module_level: bool = True) -> Iterator[Import]:
    """The modules that `nodes` import; `from package import module` means the module if it is one of `ours`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (Import(name if name in ours else base, at_module_level) for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports_in(node.orelse, ours, at_module_level=at_module_level)
        else:
            runs_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_in(ast.iter_child_nodes(node), ours, at_module_level=at_module_level and not runs_later)


def is_within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def modules_in(*packages: str) -> list[Module]:
    found = [module for name, module in MODULES.items() if is_within(name, packages)]
    assert found, f"no module in {packages}"
    return found


def forbidden_imports(modules: Iterable[Module], forbidden: Iterable[str], *, ever: bool) -> list[str]:
    """What is imported although it is forbidden `ever`, or only at module level, as "module imports name"."""
    packages = set(forbidden)
    return sorted(
        f"{module.name} imports {name}"
        for module in modules
        for name, at_module_level in module.imports
        if is_within(name, packages) and (ever or at_module_level)
    )


MODULES = load_modules()


def test_core_imports_nothing_of_ours_but_the_key_the_layout_the_errors_and_itself() -> None:
    assert [
        f"{module.name} imports {name}"
        for module in modules_in("weight_brokerd.core")
        for name, _ in module.imports
        if is_within(name, OURS) and not is_within(name, CORE_MAY_IMPORT_OF_OURS)
    ] == []


def test_core_does_no_input_or_output_reads_no_clock_and_knows_no_framework() -> None:
    assert forbidden_imports(modules_in("weight_brokerd.core"), CORE_MAY_NOT_IMPORT, ever=True) == []


def test_only_the_application_imports_the_api() -> None:
    others = [
        module
        for module in modules_in("weight_broker", "weight_brokerd")
        if module.name != "weight_brokerd.daemon.application" and not is_within(module.name, ["weight_brokerd.api"])
    ]
    assert forbidden_imports(others, ["weight_brokerd.api"], ever=True) == []


def test_the_client_does_without_the_daemon() -> None:
    library = [module for module in modules_in("weight_broker") if not is_within(module.name, ["weight_broker.cli"])]
    assert forbidden_imports(library, ["weight_brokerd"], ever=True) == []


def test_the_client_imports_grpc_and_protobuf_only_where_it_speaks_to_the_broker() -> None:
    others = [
        module
        for module in modules_in("weight_broker")
        if module.name not in MODULES_WITH_RPC and not is_within(module.name, ["weight_broker.cli"])
    ]
    assert forbidden_imports(others, RPC | MODULES_WITH_RPC, ever=False) == []


@pytest.mark.parametrize("name", sorted(MODULES_WITH_RPC))
def test_each_module_with_rpc_needs_it(name: str) -> None:
    assert forbidden_imports([MODULES[name]], RPC, ever=False)


def test_only_integrations_and_commands_import_a_framework_before_it_is_used() -> None:
    others = [
        module
        for module in modules_in("weight_broker", "weight_brokerd")
        if not is_within(module.name, ["weight_broker.integrations", "weight_broker.cli"])
    ]
    assert forbidden_imports(others, FRAMEWORKS | {"weight_broker.integrations"}, ever=False) == []


def test_an_integration_imports_at_module_level_only_what_it_integrates() -> None:
    integrates = {
        "weight_broker.integrations": set(),
        "weight_broker.integrations.torch": {"torch"},
        "weight_broker.integrations.transformers": {"torch", "transformers"},
        # Engines call their plugins in every process: the rest comes when a model is loaded.
        **{
            f"weight_broker.integrations.engine.{name}": {"torch"}
            for name in ("completeness", "stage", "tensors", "load")
        },
        **{
            f"weight_broker.integrations.{engine}.{name}": {"torch", engine}
            for engine in ("vllm", "sglang")
            for name in ("engine", "loader")
        },
    }
    for module in modules_in("weight_broker.integrations"):
        assert forbidden_imports([module], FRAMEWORKS - integrates.get(module.name, set()), ever=False) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", [("torch.nn", True)]),
        ("from grpc import aio", [("grpc", True)]),
        ("from ours import module, name", [("ours.module", True), ("ours", True)]),
        ("def load():\n    import torch", [("torch", False)]),
        ("class Loader:\n    import torch", [("torch", True)]),
        ("try:\n    import torch\nexcept ImportError:\n    import numpy", [("torch", True), ("numpy", True)]),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy", [("numpy", True)]),
    ],
)
def test_imports_are_found_where_they_are(source: str, expected: list[tuple[str, bool]]) -> None:
    assert list(imports_in(ast.parse(source).body, {"ours.module"})) == expected
