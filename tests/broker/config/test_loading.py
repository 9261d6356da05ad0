"""The settings: where they come from, and what is said about wrong ones."""

from __future__ import annotations

import grp
import os
import shlex
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.config import loading as config
from weight_brokerd.config.loading import Config, ConfigError, environment_variable, load
from weight_brokerd.config.rules import split_address
from weight_brokerd.config.settings import CREDENTIAL_FILES_TOGETHER

SECTIONS = ("broker", "limits", "metrics", "log", "cards", "cuda", "datasystem")
SETTINGS = [(section, one.name) for section in SECTIONS for one in fields(getattr(Config(), section))]
EXISTING_GROUP = grp.getgrgid(os.getgid()).gr_name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A file with a secret."""
    path = tmp_path / "secret"
    path.write_text("s3cret\n")
    path.chmod(0o600)
    return str(path)


def problems_of(file: Path | None, environment: dict[str, str] | None = None) -> list[config.Problem]:
    with pytest.raises(ConfigError) as caught:
        load(file, environment or {})
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return caught.value.problems


def test_without_anything_the_defaults_hold() -> None:
    assert load(None, {}) == Config()
    assert Config().metrics.listen == ""
    assert Config().broker.socket_permissions == 0o660


def test_the_file_changes_only_what_it_names(file: Path) -> None:
    file.write_text('[limits]\npublications = 7\ndrain_seconds = 2\n[log]\nlevel = "debug"\n')
    loaded = load(file, {})
    assert (loaded.limits.publications, loaded.limits.drain_seconds, loaded.log.level) == (7, 2.0, "debug")
    assert loaded.limits.instances == Config().limits.instances


def test_a_file_without_end_is_refused() -> None:
    [problem] = problems_of(Path("/dev/zero"))
    assert (problem.key, problem.value) == ("--config", "/dev/zero")
    assert f"at most {config.MAXIMUM_FILE_BYTES} bytes" in problem.expected


def test_the_environment_wins_over_the_file(file: Path) -> None:
    file.write_text("[limits]\npublications = 7\ninstances = 8\n")
    loaded = load(file, {"WEIGHT_BROKER_LIMITS_PUBLICATIONS": "9"})
    assert (loaded.limits.publications, loaded.limits.instances) == (9, 8)


def test_the_clients_variable_also_moves_the_broker(file: Path) -> None:
    file.write_text('[broker]\nruntime_directory = "/run/from-file"\n')
    loaded = load(file, {"WEIGHT_BROKER_RUNTIME_DIRECTORY": "/run/from-environment"})
    assert loaded.broker.runtime_directory == "/run/from-environment"


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_every_setting_is_an_environment_variable(section: str, key: str, secret: str) -> None:
    other = {
        "runtime_directory": "/run/other",
        "host_id": "other",
        "admin_group": EXISTING_GROUP,
        "socket_group": EXISTING_GROUP,
        "socket_mode": "0600",
        "listen": "127.0.0.1:9464",
        "level": "error",
        "format": "console",
        "enabled": "off",
        "library_path": "/opt/ascend/lib64:/opt/other",
        "preload": "/opt/one.so",
        "path": "staged",
        "peer_copy": "on",
        "proof": "/var/lib/proof.json",
        "staging_bytes": "2000000",
        "log_directory": "/var/log/other",
        "worker_address": "127.0.0.1:31501",
        "managed": "True",
        "shared_memory_mb": "2048",
        "directory": "/var/lib/other",
        "extra_arguments": "--oc_thread_num=4",
    }.get(key, secret if key.endswith("_file") else "3")
    together = next((names for names in CREDENTIAL_FILES_TOGETHER if key in names), ())
    loaded = load(None, {environment_variable(section, name): other for name in (key, *together)})
    changed = getattr(getattr(loaded, section), key)
    assert changed != getattr(getattr(Config(), section), key)
    assert as_text(changed) in (other, f"{other}.0")


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(FrozenInstanceError):
        load(None, {}).limits.instances = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[limits]\npublications = 0\n", "limits.publications", "a whole number from 1 to 1000000"),
        ("[limits]\npublications = true\n", "limits.publications", "a whole number from 1 to 1000000"),
        ("[limits]\npublications = 1.5\n", "limits.publications", "a whole number from 1 to 1000000"),
        ('[limits]\npublications = "many"\n', "limits.publications", "a whole number from 1 to 1000000"),
        ("[limits]\ndrain_seconds = nan\n", "limits.drain_seconds", "a number of seconds from 0 to 3600"),
        ("[limits]\ndrain_seconds = -1\n", "limits.drain_seconds", "a number of seconds from 0 to 3600"),
        ("[broker]\nsocket_mode = 660\n", "broker.socket_mode", "permissions in octal"),
        ('[broker]\nsocket_mode = "0777"\n', "broker.socket_mode", "permissions in octal"),
        ('[broker]\nsocket_mode = "0066"\n', "broker.socket_mode", "permissions in octal"),
        ('[broker]\nruntime_directory = "relative"\n', "broker.runtime_directory", "an absolute path"),
        (f'[broker]\nruntime_directory = "/{"x" * 107}"\n', "broker.runtime_directory", "at most 95 bytes"),
        ('[broker]\nhost_id = "two words"\n', "broker.host_id", "at most 64 letters"),
        ('[broker]\nadmin_group = "no-such-group"\n', "broker.admin_group", "a group that exists"),
        ('[metrics]\nlisten = "9464"\n', "metrics.listen", "HOST:PORT"),
        ('[metrics]\nlisten = "localhost:99999"\n', "metrics.listen", "HOST:PORT"),
        ('[log]\nlevel = "loud"\n', "log.level", "one of 'debug', 'info', 'warning', 'error'"),
        ("[cards]\nenabled = true\n", "cards.enabled", "one of 'auto', 'on', 'off'"),
        ('[cards]\nlibrary_path = "/opt::/usr"\n', "cards.library_path", "absolute paths with ':'"),
        ("[cards]\ntransfer_seconds = 1801\n", "cards.transfer_seconds", "a number of seconds from 1 to 1800"),
        ("[cards]\nstaging_bytes = 100\n", "cards.staging_bytes", "a whole number from 1048576"),
        ("[datasystem]\nmanaged = 1\n", "datasystem.managed", "true or false"),
        ('[datasystem]\nworker_address = "31501"\n', "datasystem.worker_address", "HOST:PORT"),
        ('[datasystem]\ndirectory = "here"\n', "datasystem.directory", "an absolute path"),
        ('[datasystem]\nextra_arguments = "--v=1"\n', "datasystem.extra_arguments", "each as '--name=value'"),
        ('[datasystem]\ntoken_file = "/nowhere/token"\n', "datasystem.token_file", "the absolute path of a file"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_expected(
    file: Path, text: str, key: str, expected: str
) -> None:
    file.write_text(text)
    (problem,) = problems_of(file)
    assert problem.key == key
    assert expected in problem.expected
    assert key in str(problem)
    assert str(file) in str(problem)
    assert repr(problem.value) in str(problem)


def test_a_wrong_variable_is_named() -> None:
    (problem,) = problems_of(None, {"WEIGHT_BROKER_LIMITS_INSTANCES": "lots"})
    assert str(problem).startswith(
        "limits.instances is 'lots' (environment variable WEIGHT_BROKER_LIMITS_INSTANCES); expected a whole number"
    )


def test_all_problems_are_told_at_once(file: Path) -> None:
    file.write_text('[limits]\npublications = 0\n[log]\nlevel = "loud"\n')
    keys = {problem.key for problem in problems_of(file, {"WEIGHT_BROKER_LOG_FORMAT": "xml"})}
    assert keys == {"limits.publications", "log.level", "log.format"}


def test_an_unknown_key_is_refused_with_the_known_ones(file: Path) -> None:
    file.write_text("[log]\nlevle = 'info'\n")
    (problem,) = problems_of(file)
    assert problem.key == "log.levle"
    assert problem.expected == "one of the keys level, format"


def test_an_unknown_table_is_refused_with_the_known_ones(file: Path) -> None:
    file.write_text("level = 'info'\n[logs]\n")
    problems = problems_of(file)
    assert [problem.key for problem in problems] == ["level", "logs"]
    known = "[broker], [limits], [metrics], [log], [cards], [cuda], [datasystem]"
    assert all(known in problem.expected for problem in problems)


def test_a_table_must_be_a_table(file: Path) -> None:
    file.write_text("log = 'info'\n")
    (problem,) = problems_of(file)
    assert (problem.key, problem.expected) == ("log", "a table: [log] on a line of its own")


def test_a_misspelt_variable_is_refused_and_the_clients_are_left_alone() -> None:
    (problem,) = problems_of(None, {"WEIGHT_BROKER_LOG_LEVLE": "info", "WEIGHT_BROKER_CACHE": "/x"})
    assert problem.key == "WEIGHT_BROKER_LOG_LEVLE"
    assert "WEIGHT_BROKER_LOG_LEVEL" in problem.expected


SERVICE_VARIABLES = {
    "_SERVICE_HOST": "10.96.0.7",
    "_SERVICE_PORT": "9400",
    "_SERVICE_PORT_HTTP_METRICS": "9400",
    "_PORT": "tcp://10.96.0.7:9400",
    "_PORT_9400_TCP": "tcp://10.96.0.7:9400",
    "_PORT_9400_TCP_PROTO": "tcp",
    "_PORT_9400_TCP_PORT": "9400",
    "_PORT_9400_TCP_ADDR": "10.96.0.7",
}
"""What Kubernetes sets for a service, behind the service's name."""


@pytest.mark.parametrize("service", ["WEIGHT_BROKER", "WEIGHT_BROKER_METRICS", "WEIGHT_BROKER_DATASYSTEM_MANAGED"])
def test_the_variables_of_a_service_of_kubernetes_are_no_settings(service: str) -> None:
    assert load(None, {service + end: value for end, value in SERVICE_VARIABLES.items()}) == Config()


def test_a_setting_that_looks_like_a_services_port_is_still_a_setting() -> None:
    loaded = load(None, {"WEIGHT_BROKER_DATASYSTEM_MANAGED_PORT": "9400"})
    assert loaded.datasystem.managed_port == 9400
    (problem,) = problems_of(None, {"WEIGHT_BROKER_METRICS_PORT": "9400"})
    assert "WEIGHT_BROKER_METRICS_LISTEN" in problem.expected


@pytest.mark.parametrize("content", [b"[log", b"\xff\xfe", None])
def test_a_file_that_cannot_be_used_is_named(file: Path, content: bytes | None) -> None:
    if content is not None:
        file.write_bytes(content)
    (problem,) = problems_of(file)
    assert (problem.key, problem.value) == ("--config", str(file))


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("[::1]:1", ("::1", 1)), ("localhost:65535", ("localhost", 65535))],
)
def test_an_address_has_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert split_address(text) == address


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
NAMES = st.sampled_from([*SECTIONS, *(key for _, key in SETTINGS)]) | st.text(max_size=5)


@given(document=st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=4) | VALUES, max_size=4))
def test_whatever_the_file_says_the_settings_are_valid_or_refused(document: dict[str, object]) -> None:
    with patch.object(config, "_read", lambda path: document):
        loaded, problems = outcome(Path("broker.toml"), {})
    assert problems if loaded is None else load(None, as_environment(loaded)) == loaded


@given(values=st.dictionaries(st.sampled_from([environment_variable(*one) for one in SETTINGS]), st.text(max_size=12)))
def test_whatever_the_environment_says_the_settings_are_valid_or_refused(values: dict[str, str]) -> None:
    loaded, problems = outcome(None, values)
    assert {problem.key for problem in problems} <= {f"{section}.{key}" for section, key in SETTINGS}
    assert problems if loaded is None else load(None, as_environment(loaded)) == loaded


def outcome(file: Path | None, environment: dict[str, str]) -> tuple[Config | None, list[config.Problem]]:
    try:
        return load(file, environment), []
    except ConfigError as error:
        return None, error.problems


def as_text(value: object) -> str:
    return shlex.join(value) if isinstance(value, tuple) else str(value)


def as_environment(loaded: Config) -> dict[str, str]:
    return {
        environment_variable(section, key): as_text(getattr(getattr(loaded, section), key)) for section, key in SETTINGS
    }
