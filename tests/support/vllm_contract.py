"""What of vLLM's source the plugin relies on, read off a wheel: `python -m support.vllm_contract WHEEL...`.

Prints the record that `vllm_contracts.json` keeps for each supported version, so that versions that cannot be imported
here (builds for CUDA) are checked too.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("vllm_contracts.json")
_LOADERS = "vllm/model_executor/model_loader/"
_GROUPS = ("get_tp_group", "get_pp_group", "get_dp_group", "get_ep_group", "get_node_count")


def read(wheel: Path) -> dict[str, Any]:
    """The record of one wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

        def tree(*candidates: str) -> ast.Module:
            found = [name for name in names if name in candidates]
            return ast.parse("\n".join(archive.read(name).decode() for name in found))

        base = _class(tree(_LOADERS + "base_loader.py"), "BaseModelLoader")
        load_model = _function(base, "load_model")
        calls = [ast.unparse(node) for node in ast.walk(load_model) if isinstance(node, ast.Call)]
        order = sorted(
            (node.lineno, ast.unparse(node.func))
            for node in ast.walk(load_model)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in _ORDER
        )
        configurations = tree(*[name for name in names if name.startswith("vllm/config") and name.endswith(".py")])
        functions = {
            node.name for node in ast.walk(tree(_LOADERS + "__init__.py")) if isinstance(node, ast.FunctionDef)
        }
        state = {
            node.name for node in tree("vllm/distributed/parallel_state.py").body if isinstance(node, ast.FunctionDef)
        }
        workers = tree(*[name for name in names if name.startswith("vllm/v1/worker/") and name.endswith("_worker.py")])
        eplb = tree("vllm/distributed/eplb/eplb_state.py")
        return {
            "registry": "register_model_loader" in functions,
            "get_model_loader": "get_model_loader" in functions,
            "abstract": sorted(
                node.name for node in base.body if isinstance(node, ast.FunctionDef) and _is_abstract(node)
            ),
            "load_model_arguments": [one.arg for one in load_model.args.args],
            "load_model_calls": [name for _, name in order],
            "loads_with": next(one for one in calls if one.startswith("self.load_weights(")),
            "load_formats_are_an_enumeration": any(
                isinstance(node, ast.ClassDef) and node.name == "LoadFormat" for node in ast.walk(configurations)
            ),
            "instance_id": "instance_id" in _fields(_class(configurations, "VllmConfig")),
            "groups": sorted(state & set(_GROUPS)),
            "worker_methods": sorted(_functions(workers) & _WORKER_METHODS),
            "eplb_rearranges": "rearrange" in _functions(eplb),
        }


_ORDER = ("self.load_weights", "process_weights_after_loading")
_WORKER_METHODS = {"sleep", "wake_up", "reload_weights", "update_weights", "start_weight_update"}


def _class(tree: ast.AST, name: str) -> ast.ClassDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def _functions(tree: ast.AST) -> set[str]:
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def _function(tree: ast.AST, name: str) -> ast.FunctionDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def _fields(tree: ast.ClassDef) -> Iterator[str]:
    return (ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign))


def _is_abstract(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "abstractmethod" for decorator in node.decorator_list)


if __name__ == "__main__":
    records = {Path(name).name.split("-")[1]: read(Path(name)) for name in sys.argv[1:]}
    print(json.dumps(records, indent=1, sort_keys=True))
