"""What the client imports before it is needed. Which package may import which is import-linter's (test_floors.py).

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

FRAMEWORKS = {"numpy", "safetensors", "torch", "transformers"}
RPC = {"google", "grpc", "weight_broker.v1"}
MODULES_WITH_RPC = {
    "weight_broker.transfers.acquisition",
    "weight_broker.transfers.calls",
    "weight_broker.transfers.imports",
    "weight_broker.connection.channel",
    "weight_broker.wire",
}
"""Client modules that import gRPC or protobuf at module level. All others import these only when they need them."""


LOADERS = {"weight_broker.integrations.torch", "weight_broker.integrations.engine.load"}
"""They belong to a process that loads a model, whose first acquire has nothing left to import."""
PROGRAMS = {"weight_broker.cli", "weight_broker.demo"}
"""Their modules are imported by `cli.main` once a command is chosen, and may need gRPC from the beginning."""
ENTRIES = {"weight_broker.cli", "weight_broker.cli.main", "weight_broker.cli.failure", "weight_broker.demo"}
"""What every command line imports, also `--help`."""


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


def test_the_client_imports_grpc_and_protobuf_only_where_it_speaks_to_the_broker() -> None:
    others = [
        module
        for module in modules_in("weight_broker")
        if module.name not in MODULES_WITH_RPC | LOADERS
        and (module.name in ENTRIES or not is_within(module.name, PROGRAMS))
    ]
    assert forbidden_imports(others, RPC | MODULES_WITH_RPC, ever=False) == []


@pytest.mark.parametrize("name", sorted(MODULES_WITH_RPC))
def test_each_module_with_rpc_needs_it(name: str) -> None:
    assert forbidden_imports([MODULES[name]], RPC, ever=False)


def test_only_integrations_import_a_framework_before_it_is_used() -> None:
    others = [
        module
        for module in modules_in("weight_broker", "weight_brokerd")
        if not is_within(module.name, ["weight_broker.integrations"])
    ]
    assert forbidden_imports(others, FRAMEWORKS, ever=False) == []


def test_only_the_demo_imports_an_integration_before_it_is_used() -> None:
    others = [
        module
        for module in modules_in("weight_broker", "weight_brokerd")
        if not is_within(module.name, ["weight_broker.integrations", "weight_broker.demo"])
    ]
    assert forbidden_imports(others, ["weight_broker.integrations"], ever=False) == []


def test_an_integration_imports_at_module_level_only_what_it_integrates() -> None:
    integrates = {
        "weight_broker.integrations": set(),
        "weight_broker.integrations.torch": {"torch"},
        "weight_broker.integrations.transformers": {"torch", "transformers"},
        **{
            f"weight_broker.integrations.modules.{name}": {"torch"}
            for name in ("digests", "replacing", "tensors", "walk")
        },
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
