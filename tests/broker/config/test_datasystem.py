"""The settings of cards and datasystem: what is refused together, files with secrets, flags for a managed worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_brokerd.config.loading import Config, ConfigError, Problem, load


def problems_of(file: Path | None, environment: dict[str, str] | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(file, environment or {})
    return caught.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


def test_the_datasystems_own_variable_says_where_the_worker_is(file: Path) -> None:
    file.write_text('[datasystem]\nworker_address = "127.0.0.1:1"\n')
    assert load(file, {"DS_WORKER_ADDR": "10.0.0.1:31501"}).datasystem.worker_address == "10.0.0.1:31501"
    ours = {"DS_WORKER_ADDR": "10.0.0.1:31501", "WEIGHT_BROKER_DATASYSTEM_WORKER_ADDRESS": "10.0.0.2:31501"}
    assert load(file, ours).datasystem.worker_address == "10.0.0.2:31501"


def test_a_worker_is_either_managed_or_somebody_elses(file: Path) -> None:
    file.write_text("[datasystem]\nmanaged = true\n")
    (problem,) = problems_of(file, {"DS_WORKER_ADDR": "10.0.0.1:31501"})
    assert str(problem).startswith(f"datasystem.managed is True ({file}); expected false")
    assert "datasystem.worker_address is '10.0.0.1:31501' (environment variable DS_WORKER_ADDR)" in str(problem)


def test_cards_cannot_be_switched_on_without_a_worker(file: Path) -> None:
    file.write_text('[cards]\nenabled = "on"\n')
    (problem,) = problems_of(file)
    assert problem.key == "cards.enabled"
    assert "datasystem.worker_address" in problem.hint
    assert load(file, {"DS_WORKER_ADDR": "127.0.0.1:31501"}).cards.enabled == "on"
    assert load(file, {"WEIGHT_BROKER_DATASYSTEM_MANAGED": "true"}).cards.enabled == "on"


def test_the_managed_worker_and_its_metastore_have_different_ports(file: Path) -> None:
    file.write_text("[datasystem]\nmanaged_port = 31501\nmetastore_port = 31501\n")
    assert [problem.key for problem in problems_of(file)] == ["datasystem.metastore_port"]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["client_public_key_file"], "client_private_key_file"),
        (["client_public_key_file", "server_public_key_file"], "client_private_key_file"),
        (["access_key_file"], "secret_key_file"),
        (["secret_key_file"], "access_key_file"),
    ],
)
def test_keys_that_mean_nothing_alone_are_asked_for(file: Path, tmp_path: Path, given: list[str], missing: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    file.write_text("[datasystem]\n" + "".join(f'{name} = "{secret}"\n' for name in given))
    (problem,) = problems_of(file)
    assert problem.key == f"datasystem.{missing}"
    assert all(f"datasystem.{name}" in problem.expected for name in given)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "No such file"),
        (b"", "It is empty"),
        (b"\n", "It is empty"),
        (b"s3cret\ns3cret\n", "more than one line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"s3cret\0", "no secret"),
        (b"x" * 70_000, "no secret"),
    ],
)
def test_a_file_without_a_secret_is_refused_and_what_is_in_it_is_not_told(
    file: Path, tmp_path: Path, content: bytes | None, hint: str
) -> None:
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_bytes(content)
    file.write_text(f'[datasystem]\ntoken_file = "{secret}"\n')
    (problem,) = problems_of(file)
    assert problem.value == str(secret)
    assert hint in problem.hint
    assert "s3cret" not in str(problem)


def test_a_directory_is_no_secret(file: Path, tmp_path: Path) -> None:
    file.write_text(f'[datasystem]\ntoken_file = "{tmp_path}"\n')
    (problem,) = problems_of(file)
    assert "Is a directory" in problem.hint


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--worker_address=0.0.0.0:1", "set datasystem.managed_port"),
        ("--log_dir=/tmp", "set datasystem.directory"),
        ("--etcd_address=10.0.0.1:2379", "datasystem.worker_address"),
        ("--system_secret_key=x", "no secret may be there"),
        ("--etcd_password=x", "no secret may be there"),
        ("--oc_thread_num", "is none"),
        ("oc_thread_num=4", "is none"),
        ("-x=4", "is none"),
    ],
)
def test_flags_that_the_broker_sets_that_are_secret_or_no_flags_are_refused(
    file: Path, argument: str, hint: str
) -> None:
    file.write_text(f'[datasystem]\nextra_arguments = ["--v=1", "{argument}"]\n')
    (problem,) = problems_of(file)
    assert hint in problem.hint


def test_flags_in_the_environment_are_split_as_in_a_shell() -> None:
    variable = "WEIGHT_BROKER_DATASYSTEM_EXTRA_ARGUMENTS"
    given = {variable: "--oc_thread_num=4 '--kv_events_config={\"a b\": 1}'"}
    assert load(None, given).datasystem.extra_arguments == ("--oc_thread_num=4", '--kv_events_config={"a b": 1}')
    (problem,) = problems_of(None, {variable: "--v='1"})
    assert "quotation" in problem.hint


def test_without_anything_there_is_no_worker() -> None:
    assert not Config().datasystem.is_configured
