"""Reads the settings of `pilotfish serve` from a YAML file, the environment and flags; later sources win.
`server.cli.settings` defines the settings and the form of their values.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import yaml

from pilotfish import __version__
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.speculation.drafters.registry import parse_entries
from pilotfish.errors import ConfigError
from pilotfish.server.cli.settings import Setting, load, read_yaml, settings_of
from pilotfish.server.config import ServerConfig

CONFIGS = (EngineConfig, ServerConfig)
PREFIX = "PILOTFISH_"
API_KEY_VARIABLE = f"{PREFIX}API_KEY"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
OTHER_VARIABLES = (API_KEY_VARIABLE, CONFIG_VARIABLE, f"{PREFIX}CACHE")
"""Known variables that do not hold the value of the setting with their name."""

_SERVICE_LINK = re.compile(r"PILOTFISH_(SERVICE_(HOST|PORT(_.*)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""Variables by which Kubernetes describes a service named pilotfish to containers."""
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class ServeSettings:
    engine: EngineConfig
    server: ServerConfig
    origins: dict[str, str] = field(default_factory=dict)
    """The source of each given setting, by its name; all others have their defaults."""


def read(options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> ServeSettings:
    """Read both configs from the flags that were given, the environment, and the file of --config or PILOTFISH_CONFIG.

    Raises ConfigError for a setting that does not exist, with the nearest that does, and for values that cannot work.
    """
    path = options.get("config") or environment.get(CONFIG_VARIABLE)
    settings = {setting.name: setting for config in CONFIGS for setting in settings_of(config)}
    content = read_yaml(str(path), CONFIGS) if path else {}
    variables = read_environment(environment, settings)
    flags = {name: value for name, value in options.items() if name in settings}
    for name in content:
        _check({name: content[name]}, f"{path}: ")
    for name, (variable, value) in variables.items():
        _check({name: value}, f"{variable}: ")
    origins = dict.fromkeys(content, str(path))
    origins |= {name: variable for name, (variable, _) in variables.items()}
    origins |= {name: _flag(settings[name], value) for name, value in flags.items()}
    sources = (content, {name: value for name, (_, value) in variables.items()}, flags)
    server = load(ServerConfig, *sources)
    if key := environment.get(API_KEY_VARIABLE):
        server = msgspec.structs.replace(server, api_key=(*server.api_key, key))
        origins["api_key"] = ", ".join(filter(None, (origins.get("api_key"), API_KEY_VARIABLE)))
    engine = load(EngineConfig, *sources).check()
    parse_entries(engine.drafter)
    return ServeSettings(engine, server.check(), origins)


def read_environment(environment: Mapping[str, str], settings: Mapping[str, Setting]) -> dict[str, tuple[str, Any]]:
    """Return (variable, value) by the setting's name. Empty variables are ignored. Raises ConfigError."""
    known = {f"{PREFIX}{name.upper()}": setting for name, setting in settings.items()}
    found: dict[str, tuple[str, Any]] = {}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or not text.strip():
            continue
        if _SERVICE_LINK.fullmatch(variable) and (variable not in known or "://" in text):
            continue
        if variable not in known:
            near = difflib.get_close_matches(variable, sorted((*known, *OTHER_VARIABLES)), n=1)
            hint = f"did you mean {near[0]}?" if near else "`pilotfish serve --help` lists the settings"
            raise ConfigError(f"the environment has {variable}, which is not a setting: {hint}")
        setting = known[variable]
        found[setting.name] = (variable, _value(setting, text.strip()))
    return found


def as_yaml(settings: ServeSettings) -> str:
    """Return a --config file with every setting, and the sources of those given. Comments replace secrets."""
    lines = [f"# Pilotfish {__version__}. What is not the default says where it was set."]
    for title, config in (("engine", settings.engine), ("server", settings.server)):
        lines += ["", f"# {title}"]
        for name, value in msgspec.to_builtins(config).items():
            origin = settings.origins.get(name)
            if _secret(name, value):
                count = f"{len(value)} of them" if isinstance(value, tuple) else "set"
                lines.append(f"# {name}: {count}, not shown ({origin or 'given in code'})")
                continue
            line = f"{name}: {_on_one_line(value)}"
            lines.append(line if origin is None else f"{line}  # {origin}")
    return "\n".join(lines) + "\n"


def _on_one_line(value: Any) -> str:
    text = _dump(value, None)
    # splitlines also splits at U+0085 and U+2028, as YAML does
    return _dump(value, '"') if len(text.splitlines()) > 1 else text


def _dump(value: Any, style: str | None) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=2**31, allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")


def _check(values: dict[str, Any], where: str) -> None:
    """Raise ConfigError that begins with `where` for an invalid value."""
    try:
        for config in CONFIGS:
            load(config, values)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _value(setting: Setting, text: str) -> Any:
    """Convert a variable's text to its setting's type; text that cannot be converted is returned, and refused later."""
    match setting.type:
        case msgspec.inspect.BoolType():
            return _SWITCH.get(text.lower(), text)
        case msgspec.inspect.VarTupleType():
            return [part.strip() for part in text.split(",") if part.strip()]
        case msgspec.inspect.IntType() if not setting.is_size and re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        case msgspec.inspect.FloatType():
            try:
                return float(text)
            except ValueError:
                return text
    return text


def _flag(setting: Setting, value: object) -> str:
    return f"--no-{setting.flag[2:]}" if value is False else setting.flag


def _secret(name: str, value: Any) -> bool:
    """Return whether a value is a secret: API keys, and URLs with a password."""
    if name == "api_key":
        return bool(value)
    return isinstance(value, str) and re.search(r"://[^/?#]*:[^/?#]*@", value) is not None
