"""Compiles the one piece of C in the client while a wheel is built, if there is a C compiler.

Without one the wheel is a plain one for every platform, and copying and verifying take longer: see
client/weight_broker/memory/streaming.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("client/native/streaming_copy.c")
LIBRARY = Path("client/weight_broker/memory/host/streaming_copy.so.1")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-shared")


class CompileStreamingCopy(BuildHookInterface[Any]):
    """The build hook."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before files are collected, for wheels and editable installations alike."""
        root = Path(self.root)
        (root / LIBRARY).unlink(missing_ok=True)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if not compiler or shutil.which(compiler[0]) is None:
            self.app.display_warning("no C compiler (set CC to name one): copying and verifying will take longer")
            return
        command = [*compiler, *FLAGS, "-o", str(LIBRARY), str(SOURCE)]
        outcome = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if outcome.returncode:
            self.app.display_warning(
                f"copying and verifying will take longer, because this failed: {shlex.join(command)}\n{outcome.stderr}"
            )
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
