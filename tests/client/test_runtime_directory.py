"""Where the sockets are: the rule both sides follow, and how the broker protects the place."""

from __future__ import annotations

import grp
import os
import socket
import stat
from pathlib import Path

import pytest

from weight_broker import runtime_directory as rule
from weight_broker.connection.attach import AttachConnection
from weight_broker.errors import BrokerUnavailable
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.settings import BrokerSettings
from weight_brokerd.daemon.runtime_directory import RuntimeDirectory


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (rule.ENVIRONMENT_VARIABLE, "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rule, "_SYSTEM_DIRECTORY", tmp_path / "run-weight-broker")
    monkeypatch.setattr(rule, "_TEMPORARY_DIRECTORY", tmp_path)


def permissions(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


def test_the_first_that_is_set_or_there_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rule.runtime_directory() == tmp_path / f"weight-broker-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert rule.runtime_directory() == Path("/run/user/7/weight-broker")
    (tmp_path / "run-weight-broker").mkdir()
    assert rule.runtime_directory() == tmp_path / "run-weight-broker"
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/first:/run/second")
    assert rule.runtime_directory(serving=True) == Path("/run/first")
    monkeypatch.setenv("WEIGHT_BROKER_RUNTIME_DIRECTORY", "/run/chosen")
    assert rule.runtime_directory(serving=True) == rule.runtime_directory() == Path("/run/chosen")


def test_an_instances_own_runtime_directory_counts_only_if_a_broker_is_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "engine"
    own.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(own))
    assert rule.runtime_directory() != own
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as broker:
        broker.bind(str(own / "attach.sock"))
        assert rule.runtime_directory() == own


@pytest.mark.parametrize("kind", ["writable by all", "a link", "a file"])
def test_a_temporary_directory_that_somebody_else_could_have_made_is_refused(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / f"weight-broker-{os.geteuid()}"
    if kind == "writable by all":
        directory.mkdir()
        directory.chmod(0o777)
    elif kind == "a link":
        directory.symlink_to(tmp_path)
    else:
        directory.touch()
    with pytest.raises(BrokerUnavailable, match="WEIGHT_BROKER_RUNTIME_DIRECTORY"):
        rule.runtime_directory()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that belongs to somebody else")
def test_a_temporary_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / f"weight-broker-{os.geteuid()}"
    directory.mkdir(mode=0o700)
    os.chown(directory, 65_534, -1)
    with pytest.raises(BrokerUnavailable, match="owner 65534"):
        rule.runtime_directory()


def test_a_temporary_directory_is_only_for_its_user() -> None:
    directory = RuntimeDirectory(BrokerSettings())
    directory.prepare()
    assert permissions(directory.path) == "drwx------"
    assert rule.runtime_directory() == directory.path


@pytest.mark.parametrize(("mode", "expected"), [("0660", "drwxr-x---"), ("0666", "drwxr-xr-x")])
def test_a_configured_directory_lets_in_whom_the_sockets_let_in(tmp_path: Path, mode: str, expected: str) -> None:
    directory = RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path / "run"), socket_mode=mode))
    before = os.umask(0o077)
    try:
        directory.prepare()
        directory.prepare()
    finally:
        os.umask(before)
    assert permissions(directory.path) == expected


@pytest.mark.parametrize("mode", ["0600", "0660", "0666"])
def test_a_socket_has_its_permissions_from_its_first_moment(tmp_path: Path, mode: str) -> None:
    directory = RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path), socket_mode=mode))
    before = os.umask(0o022)
    os.umask(before)
    with socket.socket(socket.AF_UNIX) as bound, directory.binding(directory.attach_socket):
        bound.bind(str(directory.attach_socket))
        assert stat.S_IMODE(directory.attach_socket.stat().st_mode) == int(mode, 8)
    after = os.umask(before)
    assert after == before, "the process's umask changed"


def test_a_socket_lets_nobody_else_in_before_its_group_is_the_configured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = grp.getgrgid(os.getegid()).gr_name
    directory = RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path), socket_group=group))
    seen: list[str] = []
    chown = os.chown

    def watched(path: Path, uid: int, gid: int) -> None:
        seen.append(permissions(path))
        chown(path, uid, gid)

    monkeypatch.setattr(os, "chown", watched)
    with socket.socket(socket.AF_UNIX) as bound, directory.binding(directory.attach_socket):
        bound.bind(str(directory.attach_socket))
    assert seen == ["srw-------"]
    assert permissions(directory.attach_socket) == "srw-rw----"


def test_removing_the_sockets_leaves_the_rest(tmp_path: Path) -> None:
    directory = RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path)))
    for name in ("broker.sock", "attach.sock", "lock"):
        (tmp_path / name).touch()
    directory.remove_sockets()
    directory.remove_sockets()
    assert os.listdir(tmp_path) == ["lock"]


def test_a_directory_that_cannot_be_made_is_refused_with_what_to_do(tmp_path: Path) -> None:
    directory = RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path / "missing" / "run")))
    with pytest.raises(StartError, match=r"No such file or directory\. Make it .* or set broker\.runtime_directory"):
        directory.prepare()


def test_a_path_that_is_too_long_for_a_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_BROKER_RUNTIME_DIRECTORY", "/" + "x" * 96)
    with pytest.raises(StartError, match="109 bytes, the kernel takes 107"):
        RuntimeDirectory(BrokerSettings()).prepare()


def test_what_only_its_owner_may_use_is_not_a_matter_of_groups(tmp_path: Path) -> None:
    private = tmp_path / "run"
    private.mkdir(mode=0o700)
    assert "only " in rule.not_admitted(private).message
    assert "usermod" not in rule.not_admitted(private).message


def test_who_may_not_enter_the_hosts_directory_is_told_which_group_to_join(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run-weight-broker").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode, **_: path != tmp_path / "run-weight-broker")
    group = grp.getgrgid(os.getegid()).gr_name
    with pytest.raises(BrokerUnavailable, match=rf"no permission .* `sudo usermod -aG {group} ") as caught:
        rule.runtime_directory()
    assert caught.value.metadata["denied"] == str(tmp_path / "run-weight-broker")
    assert rule.runtime_directory(serving=True) == tmp_path / f"weight-broker-{os.geteuid()}"
    own = tmp_path / f"weight-broker-{os.geteuid()}"
    own.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as broker:
        broker.bind(str(own / "attach.sock"))
        assert rule.runtime_directory() == own, "a broker of the user's own serves"


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o1777])
def test_a_directory_that_others_may_write_is_refused_by_both_sides(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    before = permissions(tmp_path / "run")
    with pytest.raises(StartError, match=f"chmod go-w {tmp_path}/run"):
        RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path / "run"))).prepare()
    assert permissions(tmp_path / "run") == before
    with pytest.raises(BrokerUnavailable, match=f"chmod go-w {tmp_path}/run"):
        AttachConnection(tmp_path / "run" / "attach.sock").connect()
    inside = RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path / "run" / "inside")))
    inside.prepare()  # as the message says
    assert permissions(inside.path) == "drwxr-x---"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that belongs to another user")
def test_a_configured_directory_of_another_user_is_refused_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 65_534, -1)
    with pytest.raises(StartError, match=rf"belongs to uid 65534.*chown 0 {tmp_path}/run"):
        RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path / "run"))).prepare()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StartError, match="is no directory"):
        RuntimeDirectory(BrokerSettings(runtime_directory=str(tmp_path / "run"))).prepare()
