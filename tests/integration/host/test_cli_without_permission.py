"""Commands of a user whom the broker's sockets do not admit: exit status 5, which group it takes, and no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.broker_process import BrokerProcess

NOBODY = 65534
COMMANDS = {
    "status": [],
    "explain": ["00" * 16],
    "watch": [],
    "drain": [],
    "evict": ["publication-1"],
    "quarantine": ["publication-1", "--reason", "test"],
}
AS_ANOTHER_USER = """
import os, shutil, sys
import rich.console
from weight_broker.cli import drain, explain, set_aside, status, watch
from weight_broker.cli.main import main
import weight_broker.v1.attach_pb2
uid = int(sys.argv[1])
os.setgroups([])
os.setegid(uid)
os.seteuid(uid)
sys.exit(main(sys.argv[2:]))
"""
"""That user may not read the interpreter's files, which are imported before."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerProcess]:
    """Its directory and its sockets admit root and root's group; others reach the directory's name."""
    directory = Path(tempfile.mkdtemp(prefix="weight-broker-test-"))
    directory.chmod(0o755)
    broker = BrokerProcess(directory / "run")
    try:
        yield broker.start()
    finally:
        broker.close()
        shutil.rmtree(directory)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("denied", ["directory", "socket"])
def test_it_is_not_permitted_and_says_which_group_and_which_command(
    broker: BrokerProcess, command: str, denied: str
) -> None:
    broker.runtime_directory.chmod(0o750 if denied == "directory" else 0o755)
    arguments = [command, *COMMANDS[command], "--runtime-directory", str(broker.runtime_directory)]
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER, str(NOBODY), *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert "no permission" in line
    assert "`sudo usermod -aG root nobody`" in line
    assert f"`sudo weight-broker {command}`" in line
