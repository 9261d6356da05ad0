"""The broker's settings: a TOML file, the environment (which wins) and the defaults.

Every setting `key` of a table `[section]` is also the environment variable `WEIGHT_BROKER_SECTION_KEY`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weight_broker.errors import shown
from weight_brokerd.config import rules
from weight_brokerd.config.service_variables import without_service_variables
from weight_brokerd.config.settings import (
    CREDENTIAL_FILES_TOGETHER,
    BrokerSettings,
    CardSettings,
    CudaSettings,
    DatasystemSettings,
    LimitSettings,
    LogSettings,
    MetricsSettings,
)

ENVIRONMENT_PREFIX = "WEIGHT_BROKER_"
MAXIMUM_FILE_BYTES = 1 << 20
"""A path that names a device has no end."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One setting that is wrong."""

    key: str
    """The setting, for example `limits.publications`."""
    value: object
    expected: str
    source: str
    """Origin of the value: the file's path or the environment variable."""
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.key} is {shown(self.value)} ({self.source}); expected {self.expected}"
        return f"{text}. {self.hint}" if self.hint else text


class ConfigError(ValueError):
    """Settings are wrong. `problems` lists every problem."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Config:
    """All settings."""

    broker: BrokerSettings = field(default_factory=BrokerSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    log: LogSettings = field(default_factory=LogSettings)
    cards: CardSettings = field(default_factory=CardSettings)
    cuda: CudaSettings = field(default_factory=CudaSettings)
    datasystem: DatasystemSettings = field(default_factory=DatasystemSettings)


_SECTIONS: Mapping[str, type] = {
    "broker": BrokerSettings,
    "limits": LimitSettings,
    "metrics": MetricsSettings,
    "log": LogSettings,
    "cards": CardSettings,
    "cuda": CudaSettings,
    "datasystem": DatasystemSettings,
}


def load(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """The settings from a file (none if None) and the environment; raises `ConfigError`."""
    document = _read(path) if path is not None else {}
    environment = without_service_variables(environment)
    problems = _unknown_in_file(document, str(path)) + _unknown_in_environment(environment)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for section, settings in _SECTIONS.items():
        table = document.get(section, {})
        configured: dict[str, Any] = {}
        for setting in fields(settings):
            key = f"{section}.{setting.name}"
            rule: rules.Rule = setting.metadata["rule"]
            try:
                if (variable := _variable(section, setting.name, setting.metadata["also"], environment)) is not None:
                    source, raw = f"environment variable {variable}", environment[variable]
                    configured[setting.name] = rule.check(rule.parse(raw))
                elif isinstance(table, dict) and setting.name in table:
                    source, raw = str(path), table[setting.name]
                    configured[setting.name] = rule.check(raw)
            except rules.UnfitValueError as unfit:
                problems.append(Problem(key, raw, rule.expected, source, str(unfit)))
            else:
                sources[key] = source if setting.name in configured else "the default"
        values[section] = settings(**configured)
    config = Config(**values)
    if problems := problems or list(_contradictions(config, sources)):
        raise ConfigError(problems)
    return config


def _contradictions(config: Config, sources: Mapping[str, str]) -> Iterator[Problem]:
    """Settings that are valid alone but not together."""
    datasystem = config.datasystem

    def problem(name: str, expected: str, hint: str) -> Problem:
        section, key = name.split(".")
        return Problem(name, getattr(getattr(config, section), key), expected, sources[name], hint)

    if datasystem.managed and datasystem.worker_address:
        address = f"datasystem.worker_address is {datasystem.worker_address!r} ({sources['datasystem.worker_address']})"
        hint = "Either the broker runs a worker or it uses the worker at that address: remove one of the two settings"
        yield problem("datasystem.managed", f"false, because {address}", hint)
    if config.cards.enabled == "on" and not datasystem.is_configured:
        hint = "Set datasystem.worker_address, or datasystem.managed = true on a host by itself"
        yield problem("cards.enabled", "'auto' or 'off' without a datasystem worker", hint)
    if 0 < datasystem.managed_port == datasystem.metastore_port:
        yield problem("datasystem.metastore_port", "another port than datasystem.managed_port", "0 takes a free one")
    for together in CREDENTIAL_FILES_TOGETHER:
        missing = [key for key in together if not getattr(datasystem, key)]
        if 0 < len(missing) < len(together):
            others = ", ".join(f"datasystem.{key}" for key in together if key not in missing)
            yield problem(f"datasystem.{missing[0]}", "a file, because it goes with " + others, "Set all or none")


def environment_variable(section: str, key: str) -> str:
    """The environment variable of a setting."""
    return f"{ENVIRONMENT_PREFIX}{section}_{key}".upper()


def _variable(section: str, key: str, also: str, environment: Mapping[str, str]) -> str | None:
    names = [environment_variable(section, key)] + ([also] if also else [])
    return next((name for name in names if name in environment), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_FILE_BYTES + 1)
        if len(content) <= MAXIMUM_FILE_BYTES:
            return tomllib.loads(content.decode().replace("\r\n", "\n"))
        problem = Problem("--config", str(path), f"a file of at most {MAXIMUM_FILE_BYTES} bytes", "command line")
    except OSError as error:
        problem = Problem(
            "--config", str(path), "a file that can be read", "command line", error.strerror or str(error)
        )
    except UnicodeDecodeError as error:
        problem = Problem(
            "--config", str(path), "a TOML file in UTF-8", "command line", f"byte {error.start} is not UTF-8"
        )
    except ValueError as error:  # also a number of thousands of digits
        problem = Problem("--config", str(path), "a TOML file", "command line", str(error))
    except RecursionError:
        problem = Problem("--config", str(path), "a TOML file", "command line", "its values are nested too deeply")
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
            names = [setting.name for setting in fields(_SECTIONS[section])]
            known = ", ".join(names)
            problems += [
                Problem(f"{section}.{key}", value, f"one of the keys {known}", source, "Remove or rename it")
                for key, value in table.items()
                if key not in names
            ]
    return problems


def _unknown_in_environment(environment: Mapping[str, str]) -> list[Problem]:
    """Variables that look like a setting but are unknown, most likely misspelt. The client reads other variables."""
    problems = []
    for section, settings in _SECTIONS.items():
        known = [environment_variable(section, setting.name) for setting in fields(settings)]
        problems += [
            Problem(name, value, f"one of {', '.join(known)}", "environment", "Unset or rename it")
            for name, value in environment.items()
            if name.startswith(environment_variable(section, "")) and name not in known
        ]
    return problems
