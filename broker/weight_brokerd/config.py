"""The broker's settings: a TOML file, the environment (which wins) and what holds without either.

Every setting `key` of a table `[section]` is also the environment variable `WEIGHT_BROKER_SECTION_KEY`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weight_broker.runtime_directory import ENVIRONMENT_VARIABLE
from weight_brokerd import config_rules as rules

ENVIRONMENT_PREFIX = "WEIGHT_BROKER_"


@dataclass(frozen=True, slots=True)
class Problem:
    """One setting that is wrong."""

    key: str
    """The setting, for example `limits.publications`."""
    value: object
    expected: str
    source: str
    """Where the value is from: the file's path or the environment variable."""
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.key} is {self.value!r} ({self.source}); expected {self.expected}"
        return f"{text}. {self.hint}" if self.hint else text


class ConfigError(ValueError):
    """The settings are wrong. `problems` has all that is wrong with them, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def _setting(default: Any, rule: rules.Rule, *, also: str = "") -> Any:
    return field(default=default, metadata={"rule": rule, "also": also})


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """[broker]"""

    runtime_directory: str = _setting("", rules.runtime_directory, also=ENVIRONMENT_VARIABLE)
    """Where the sockets and the lock file are; the rule of `weight_broker.runtime_directory` if empty."""
    host_id: str = _setting("", rules.identifier)
    """Identity of this host; derived from the machine id if empty."""
    admin_group: str = _setting("", rules.group)
    """Members of this group may administer the broker, beside root and the broker's own user."""
    socket_group: str = _setting("", rules.group)
    """Group of the runtime directory and the sockets; the broker's own if empty."""
    socket_mode: str = _setting("0660", rules.socket_mode)
    """Permissions of the sockets."""

    @property
    def socket_permissions(self) -> int:
        """`socket_mode` as a number."""
        return int(self.socket_mode, 8)


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """[limits]"""

    readers_per_publication: int = _setting(16, rules.whole_number(1, 4096))
    """Transfers that may read one publication at the same time."""
    publications: int = _setting(20_000, rules.whole_number(1, 1_000_000))
    """Publications in total."""
    regions_per_instance: int = _setting(1024, rules.whole_number(1, 65_536))
    """Regions that one instance may have handed over."""
    instances: int = _setting(4096, rules.whole_number(1, 65_536))
    """Instances in total."""
    cold_load_lease_seconds: float = _setting(1800.0, rules.number(1, 86_400))
    """How long a cold load may take unless its holder extends the lease."""
    maximum_wait_seconds: float = _setting(3600.0, rules.number(1, 86_400))
    """How long an acquisition may wait."""
    drain_seconds: float = _setting(30.0, rules.number(0, 3600))
    """How long running transfers may go on once the broker is told to stop."""


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """[metrics]"""

    listen: str = _setting("", rules.listen_address)
    """HOST:PORT of the Prometheus endpoint; off if empty."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """[log]"""

    level: str = _setting("info", rules.one_of("debug", "info", "warning", "error"))
    """What is not logged: everything below this."""
    format: str = _setting("json", rules.one_of("json", "console"))
    """JSON for machines, console for people."""


@dataclass(frozen=True, slots=True)
class Config:
    """All settings."""

    broker: BrokerSettings = BrokerSettings()
    limits: LimitSettings = LimitSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()


_SECTIONS: Mapping[str, type[BrokerSettings | LimitSettings | MetricsSettings | LogSettings]] = {
    "broker": BrokerSettings,
    "limits": LimitSettings,
    "metrics": MetricsSettings,
    "log": LogSettings,
}


def load(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The settings from a file (none if None) and the environment; raises `ConfigError`."""
    document = _read(path) if path is not None else {}
    problems = _unknown_in_file(document, str(path)) + _unknown_in_environment(environment)
    values: dict[str, Any] = {}
    for section, settings in _SECTIONS.items():
        table = document.get(section, {})
        given: dict[str, Any] = {}
        for setting in fields(settings):
            key = f"{section}.{setting.name}"
            rule: rules.Rule = setting.metadata["rule"]
            try:
                if (variable := _variable(section, setting.name, setting.metadata["also"], environment)) is not None:
                    source, raw = f"environment variable {variable}", environment[variable]
                    given[setting.name] = rule.check(rule.parse(raw))
                elif isinstance(table, dict) and setting.name in table:
                    source, raw = str(path), table[setting.name]
                    given[setting.name] = rule.check(raw)
            except rules.UnfitValueError as unfit:
                problems.append(Problem(key, raw, rule.expected, source, str(unfit)))
        values[section] = settings(**given)
    if problems:
        raise ConfigError(problems)
    return Config(**values)


def environment_variable(section: str, key: str) -> str:
    """The environment variable of a setting."""
    return f"{ENVIRONMENT_PREFIX}{section}_{key}".upper()


def _variable(section: str, key: str, also: str, environment: Mapping[str, str]) -> str | None:
    names = [environment_variable(section, key)] + ([also] if also else [])
    return next((name for name in names if name in environment), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = Problem(
            "--config", str(path), "a file that can be read", "command line", error.strerror or str(error)
        )
    except UnicodeDecodeError as error:
        problem = Problem(
            "--config", str(path), "a TOML file in UTF-8", "command line", f"byte {error.start} is not UTF-8"
        )
    except tomllib.TOMLDecodeError as error:
        problem = Problem("--config", str(path), "a TOML file", "command line", str(error))
    raise ConfigError([problem])


def _unknown_in_file(document: Mapping[str, Any], source: str) -> list[Problem]:
    problems = []
    for section, table in document.items():
        if section not in _SECTIONS:
            known = ", ".join(f"[{name}]" for name in _SECTIONS)
            problems.append(Problem(section, table, f"one of the tables {known}", source, "Remove or rename it"))
        elif not isinstance(table, dict):
            problems.append(Problem(section, table, f"a table: [{section}] on a line of its own", source))
        else:
            known = ", ".join(one.name for one in fields(_SECTIONS[section]))
            problems += [
                Problem(f"{section}.{key}", value, f"one of the keys {known}", source, "Remove or rename it")
                for key, value in table.items()
                if key not in {one.name for one in fields(_SECTIONS[section])}
            ]
    return problems


def _unknown_in_environment(environment: Mapping[str, str]) -> list[Problem]:
    """Variables that look like a setting but are none: most likely misspelt. Other ones are the client's."""
    problems = []
    for section, settings in _SECTIONS.items():
        known = [environment_variable(section, one.name) for one in fields(settings)]
        problems += [
            Problem(name, value, f"one of {', '.join(known)}", "environment", "Unset or rename it")
            for name, value in environment.items()
            if name.startswith(environment_variable(section, "")) and name not in known
        ]
    return problems
