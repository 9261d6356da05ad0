"""What operators set reaches the card processes; whether there are any is decided with a reason."""

from __future__ import annotations

import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from weight_broker.drivers.acl import LIBRARY
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.loading import Config, load
from weight_brokerd.datasystem.credentials import credentials
from weight_brokerd.kinds.npu import settings
from weight_brokerd.kinds.npu.settings import cards_configuration, find_runtime, why_no_cards

STATE = Path("/var/lib/weight-broker")


@pytest.fixture(autouse=True)
def _loader_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(settings, "_in_loader_cache", lambda: None)


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A directory with Ascend's runtime."""
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / LIBRARY).touch()
    return tmp_path / "lib64"


def configured(**values: Any) -> Config:
    return load(None, {f"WEIGHT_BROKER_{name.upper()}": str(value) for name, value in values.items()})


def secret(directory: Path, name: str, content: str, mode: int = 0o600) -> Path:
    path = directory / name
    path.write_text(content)
    path.chmod(mode)
    return path


def test_defaults_are_those_of_the_card_processes() -> None:
    mapped = cards_configuration(Config(), "127.0.0.1", 31501, STATE)
    expected = CardsConfiguration("127.0.0.1", 31501, log_directory=STATE / "datasystem-clients")
    assert replace(mapped, environment={}) == expected


def test_the_ports_of_hccl_are_chosen_for_each_process_unless_the_operator_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_HOST_SOCKET_PORT_RANGE", "61000-61050")
    environment = cards_configuration(Config(), "127.0.0.1", 31501, STATE).child_environment()
    assert environment["HCCL_NPU_SOCKET_PORT_RANGE"] == "auto"
    assert environment["HCCL_HOST_SOCKET_PORT_RANGE"] == "61000-61050"


def test_every_setting_of_the_card_processes_reaches_them() -> None:
    values: dict[str, Any] = {
        "library_path": "/opt/lib64",
        "preload": "/opt/one.so",
        "staging_bytes": 2 << 20,
        "receivers_per_card": 5,
        "transfer_seconds": 11.0,
        "start_seconds": 12.0,
        "request_seconds": 13.0,
        "import_seconds": 14.0,
        "exit_seconds": 15.0,
        "receiver_idle_seconds": 16.0,
        "sender_idle_seconds": 17.0,
        "log_directory": "/var/log/clients",
    }
    assert values.keys() == {setting.name for setting in fields(Config().cards)} - {"enabled", "path"}
    mapped = cards_configuration(
        configured(**{f"cards_{name}": value for name, value in values.items()}), "host", 1, STATE
    )
    assert {name: getattr(mapped, name) for name in values} == {**values, "log_directory": Path("/var/log/clients")}


def test_secrets_are_handed_over_under_the_names_of_the_clients_arguments(tmp_path: Path) -> None:
    names = ["client_public_key", "client_private_key", "server_public_key", "access_key", "secret_key", "token"]
    files = {
        f"datasystem_{name}_file": secret(tmp_path, name, f"the {name}\n" if name != "token" else "the token")
        for name in names
    }
    config = configured(datasystem_tenant_id="tenant", **files)
    mapped = cards_configuration(config, "host", 1, STATE)
    assert mapped.credentials == {"tenant_id": "tenant", **{name: f"the {name}" for name in names}}
    assert "the token" not in repr(mapped)
    assert "the token" not in repr(config)


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)])
def test_a_secret_that_others_may_read_is_told_without_the_secret(tmp_path: Path, mode: int, warnings: int) -> None:
    path = secret(tmp_path, "token", "s3cret", mode)
    with capture_logs() as logs:
        credentials(configured(datasystem_token_file=path).datasystem)
    assert [(entry["event"], entry["path"]) for entry in logs] == [("secret_readable_by_others", str(path))] * warnings
    assert "s3cret" not in str(logs)


def test_a_public_key_may_be_public(tmp_path: Path) -> None:
    config = configured(
        datasystem_client_public_key_file=secret(tmp_path, "a", "a", 0o644),
        datasystem_client_private_key_file=secret(tmp_path, "b", "b"),
        datasystem_server_public_key_file=secret(tmp_path, "c", "c", 0o644),
    )
    with capture_logs() as logs:
        credentials(config.datasystem)
    assert logs == []


def test_a_secret_that_went_away_since_the_settings_were_read_is_an_error_at_the_start(tmp_path: Path) -> None:
    path = secret(tmp_path, "token", "s3cret")
    config = configured(datasystem_token_file=path)
    path.unlink()
    with pytest.raises(StartError, match=r"datasystem\.token_file: .*/token cannot be used any more"):
        cards_configuration(config, "host", 1, STATE)


@pytest.mark.parametrize("enabled", ["auto", "on"])
def test_cards_are_used_where_there_is_a_worker_and_ascends_runtime(libraries: Path, enabled: str) -> None:
    config = configured(cards_enabled=enabled, cards_library_path=libraries, datasystem_managed=True)
    assert why_no_cards(config) == ""


def test_cards_that_are_switched_on_need_no_proof_that_the_runtime_is_there() -> None:
    assert why_no_cards(configured(cards_enabled="on", datasystem_worker_address="127.0.0.1:1")) == ""


def test_why_there_are_no_cards_is_told(libraries: Path, tmp_path: Path) -> None:
    off = configured(cards_enabled="off", cards_library_path=libraries, datasystem_managed=True)
    assert why_no_cards(off) == "cards.enabled is 'off'"
    assert "no datasystem worker" in why_no_cards(configured(cards_library_path=libraries))
    assert LIBRARY in why_no_cards(configured(cards_library_path=tmp_path, datasystem_managed=True))
    assert LIBRARY in why_no_cards(configured(datasystem_managed=True))


def test_the_runtime_is_looked_for_where_a_card_process_would(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{libraries}")
    assert find_runtime("") == libraries / LIBRARY
    assert find_runtime(str(tmp_path)) is None, "its own path replaces the broker's"


def test_the_runtime_is_found_in_the_loaders_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    listed = f"2 libs found in cache\n\t{LIBRARY}.1 (libc6) => /x\n\t{LIBRARY} (libc6,x86-64) => /opt/{LIBRARY}\n"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, stdout=listed)
    )
    assert find_runtime("") == Path("/opt", LIBRARY)
