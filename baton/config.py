"""Settings read: from the command line, the environment and YAML, which are three spellings of the
same fields:

    defaults < --config FILE (YAML) < BATON_* < flags

`--max-num-seqs 8` = `BATON_MAX_NUM_SEQS=8` = `max_num_seqs: 8`. An unknown key or a bad value is a
`ConfigError` of one line.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from baton.settings import (
    ClusterSettings,
    EngineSettings,
    FleetSettings,
    GatewaySettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    Section,
    WorkerSettings,
)

ENV_PREFIX = "BATON_"
_PASSWORD = re.compile(r"(?<=://)[^/?#]*(?=@)|(?<=password=)[^&#]*")  # in a URL


class ConfigError(Exception):
    """A setting is unknown or invalid; the message is one line for the user."""


class OfflineConfig(ModelSettings, EngineSettings):
    """An `LLM` in process."""


class GatewayConfig(GatewaySettings, LimitSettings, ModelSettings, ClusterSettings, LogSettings):
    """What `baton gateway` needs; of the model it uses name, tokenizer and revision."""


class WorkerConfig(WorkerSettings, ModelSettings, EngineSettings, ClusterSettings, LogSettings):
    """What `baton prefill-worker`, `decode-worker` and `pooling-worker` need."""


class ServeConfig(
    FleetSettings,
    GatewaySettings,
    LimitSettings,
    WorkerSettings,
    ModelSettings,
    EngineSettings,
    ClusterSettings,
    LogSettings,
):
    """What `baton serve` needs: all of it."""


Config = TypeVar("Config", bound=Section)


class Setting(NamedTuple):
    """One field, for building a command line from it."""

    name: str
    group: str
    info: FieldInfo

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()


def settings_of(config: type[BaseModel]) -> Iterator[Setting]:
    """Every field of `config` with the group (title of the section) that declares it."""
    for section in config.__mro__:
        if issubclass(section, BaseModel) and section.__bases__ == (Section,):
            for name in section.__annotations__:
                yield Setting(name, (section.__doc__ or "").strip(), config.model_fields[name])


_ALL_ENV = frozenset(setting.env for setting in settings_of(ServeConfig))


def load_config(
    config: type[Config],
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    config_file: str | None = None,
) -> Config:
    """Merge the four sources.

    flags: field → value, only those that were given. env: usually os.environ.

    Raises:
        ConfigError: unknown key or bad value, naming the key and where it came from.
    """
    known = {setting.name: setting for setting in settings_of(config)}
    for name in env:
        if name.startswith(ENV_PREFIX) and name not in _ALL_ENV:
            raise ConfigError(f"the environment: unknown setting {name}{_meant(name, _ALL_ENV)}")
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    sources = (
        (config_file or "", _read_yaml(config_file)),
        # An empty variable counts as unset: compose files pass ${NAME:-} through.
        ("the environment", {n: env[s.env] for n, s in known.items() if env.get(s.env)}),
        ("the command line", dict(flags)),
    )
    for source, values in sources:
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"{source}: unknown setting '{name}'{_meant(name, known)}")
            merged[name] = value
            origin[name] = source
    try:
        return config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where = origin.get(name, "the defaults")
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} ({where}): {_problem(first)}") from None


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _problem(error: ErrorDetails) -> str:
    """pydantic's words, or those of a validator of ours."""
    ours = error.get("ctx", {}).get("error")
    return str(ours) if ours else error["msg"][:1].lower() + error["msg"][1:]


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"--config: {path}{where} is not YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"--config: {path} must hold `setting: value` pairs")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def describe(config: BaseModel) -> str:
    """The resolved settings, a line per group; secrets masked, unset ones left out."""
    groups: dict[str, list[str]] = {}
    for name, group, _ in settings_of(type(config)):
        value = getattr(config, name)
        if value not in (None, ()):
            groups.setdefault(group, []).append(f"{name}={_shown(value)}")
    return "\n".join(f"  {group}: {', '.join(values)}" for group, values in groups.items())


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_shown(item) for item in value)
    return "***" if isinstance(value, SecretStr) else _PASSWORD.sub("***", str(value))


def to_env(config: BaseModel) -> dict[str, str]:
    """Settings as BATON_* variables: how `baton serve` hands its own to its children."""
    env: dict[str, str] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value != field.default and value is not None:
            env[ENV_PREFIX + name.upper()] = _env_value(value)
    return env


def _env_value(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_env_value(item) for item in value)
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value)
