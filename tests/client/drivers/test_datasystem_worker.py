"""Which process is the datasystem worker of an address, and of which wheel its program is."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_broker.drivers.datasystem_worker import RunningWorker, find

ADDRESS = "127.0.0.1:31501"


class Host:
    """A /proc, and wheels."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        self.add(1, "/sbin/init")
        (self.proc / "self").symlink_to("1")

    def wheel(self, version: str, name: str = "wheel") -> Path:
        """The program of a wheel."""
        directory = self.root / name
        directory.mkdir()
        (directory / "VERSION").write_text(f"{version}\n")
        return directory / "datasystem_worker"

    def add(self, pid: int, *command: str, nested: int = 1) -> Path:
        """A process of another user; `nested`: in how many pid namespaces."""
        process = self.proc / str(pid)
        process.mkdir(parents=True)
        (process / "cmdline").write_bytes("".join(f"{word}\0" for word in command).encode())
        (process / "status").write_text(f"Name:\tx\nNSpid:{f'{chr(9)}{pid}' * nested}\n")
        return process

    def add_own(self, pid: int, program: Path | str, *flags: str, root: str = "/") -> None:
        """A process of this user: the kernel says which program it runs."""
        process = self.add(pid, "datasystem_worker", *flags)
        (process / "exe").symlink_to(program)
        (process / "root").symlink_to(root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ("--worker_address=127.0.0.1:31501",),
        ("-worker_address=127.0.0.1:31501", "--v=0"),
        ("--worker_address", "127.0.0.1:31501"),
        ("--worker_address=localhost:31501",),
        (),
    ],
    ids=["one word", "one dash", "two words", "a name of this host", "the default"],
)
def test_the_worker_of_an_address_has_the_version_of_the_wheel_that_its_program_lies_in(
    host: Host, flags: tuple[str, ...]
) -> None:
    host.add_own(7, host.wheel("0.7.7", "other"), "--worker_address=127.0.0.1:31502")
    host.add_own(8, host.wheel("0.8.1"), *flags)
    assert find(ADDRESS, host.proc) == RunningWorker(8, "0.8.1")


def test_a_process_that_only_names_the_worker_is_none(host: Host) -> None:
    host.add(7, "vi", "/opt/datasystem_worker", "--worker_address=127.0.0.1:31501")
    host.add(8)
    assert find(ADDRESS, host.proc) is None


def test_a_wheel_that_was_replaced_under_its_worker_says_nothing_of_it(host: Host) -> None:
    program = host.wheel("0.8.1")
    host.add_own(8, f"{program} (deleted)", f"--worker_address={ADDRESS}")
    assert find(ADDRESS, host.proc) == RunningWorker(8, "")


def test_a_worker_in_a_container_has_the_wheel_of_that_container(host: Host) -> None:
    (host.root / "container").mkdir()
    host.wheel("0.8.0", "container/wheel")
    host.add_own(8, "/wheel/datasystem_worker", f"--worker_address={ADDRESS}", root=str(host.root / "container"))
    assert find(ADDRESS, host.proc) == RunningWorker(8, "0.8.0")


@pytest.mark.parametrize(("nested", "version"), [(1, "0.7.7"), (2, "")], ids=["outside containers", "in a container"])
def test_of_another_users_worker_the_command_line_counts_outside_containers(
    host: Host, nested: int, version: str
) -> None:
    host.add(8, str(host.wheel("0.7.7")), f"--worker_address={ADDRESS}", nested=nested)
    assert find(ADDRESS, host.proc) == RunningWorker(8, version)


def test_a_relative_path_of_another_users_worker_is_not_looked_up(host: Host) -> None:
    host.add(8, "./datasystem_worker", f"--worker_address={ADDRESS}")
    assert find(ADDRESS, host.proc) == RunningWorker(8, "")
