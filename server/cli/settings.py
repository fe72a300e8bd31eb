"""Settings: the fields of config structs as flags, YAML and checked values.

Config structs, such as those of `engine.config` and `server.config`, are the only schema. `server.cli.sources` decides
which source of a setting wins for `pilotfish serve`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from pilotfish.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)

_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE_NAMES = ("_memory", "_bytes")


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a config struct."""

    name: str
    type: msgspec.inspect.Type
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_size(self) -> bool:
        """Whether it is a number of bytes, which may have a unit; the end of the name decides."""
        return self.name.endswith(_SIZE_NAMES)

    @property
    def repeatable(self) -> bool:
        return isinstance(self.type, msgspec.inspect.VarTupleType)


def parse_size(text: str | int) -> int:
    """Return the bytes of "512MiB" (2**20), "2GB" (10**9), "1.5G", "4096" or 4096. Raises ConfigError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: write bytes, or a number with a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


@cache
def settings_of(config: type[msgspec.Struct]) -> tuple[Setting, ...]:
    """Return the fields of a config struct; the docstring below each field is its help."""
    info = msgspec.inspect.type_info(config)
    assert isinstance(info, msgspec.inspect.StructType)
    helps = _field_docstrings(config)
    return tuple(
        Setting(field.name, _without_none(field.type), field.default, helps.get(field.name, ""))
        for field in info.fields
    )


def add_flags(
    parser: argparse.ArgumentParser, config: type[msgspec.Struct], title: str, omit: Container[str] = ()
) -> None:
    """Add a flag for each field except those in `omit`. A flag that is not given is absent from the namespace."""
    group = parser.add_argument_group(title)
    for setting in settings_of(config):
        if setting.name in omit:
            continue
        options: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": _help(setting)}
        match setting.type:
            case msgspec.inspect.BoolType():
                options["action"] = argparse.BooleanOptionalAction
            case msgspec.inspect.LiteralType(values=values):
                options["choices"] = values
            case msgspec.inspect.VarTupleType(item_type=msgspec.inspect.IntType()):
                options |= {"type": _integers, "metavar": "N,N,..."}
            case msgspec.inspect.VarTupleType():
                options |= {"action": "append", "metavar": setting.name.rpartition("_")[2].upper()}
            case msgspec.inspect.IntType() if setting.is_size:
                options |= {"type": _size_flag, "metavar": "SIZE"}
            case msgspec.inspect.IntType():
                options |= {"type": int, "metavar": "N"}
            case msgspec.inspect.FloatType():
                options |= {"type": float, "metavar": "X"}
            case _:
                options["metavar"] = setting.name.rpartition("_")[2].upper()
        group.add_argument(setting.flag, **options)


def read_yaml(path: str, configs: tuple[type[msgspec.Struct], ...]) -> dict[str, Any]:
    """Read the settings in a YAML file, a mapping of field names; dashes count as underscores.

    Raises ConfigError for a file that cannot be read, or has a key that none of `configs` has.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of settings, such as `max_num_seqs: 16`")
    known = {setting.name for config in configs for setting in settings_of(config)}
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`pilotfish serve --help` lists them all"
            raise ConfigError(f"{path} has {name!r}, which is not a setting: {hint}")
    return values


def load(config: type[Config], *sources: Mapping[str, Any]) -> Config:
    """Make a config struct of the values that it has fields for; later sources win. Raises ConfigError."""
    values: dict[str, Any] = {}
    for source in sources:
        for setting in settings_of(config):
            if setting.name in source:
                values[setting.name] = _prepared(setting, source[setting.name])
    for name, value in values.items():
        try:  # one by one, to name the wrong one
            msgspec.convert({name: value}, config)
        except msgspec.ValidationError as error:
            expected = re.sub(r" - at `\$.*", "", str(error))
            raise ConfigError(f"{name} is {value!r}: {expected[0].lower()}{expected[1:]}") from None
    return msgspec.convert(values, config)


def not_default(config: msgspec.Struct) -> dict[str, Any]:
    """Return the settings, as JSON values, that differ from their defaults."""
    defaults = msgspec.to_builtins(type(config)())
    return {name: value for name, value in msgspec.to_builtins(config).items() if value != defaults[name]}


def _prepared(setting: Setting, value: Any) -> Any:
    if setting.is_size and isinstance(value, str):
        return parse_size(value)
    if setting.repeatable and isinstance(value, str):
        return [value]
    return value


def _size_flag(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _without_none(type_: msgspec.inspect.Type) -> msgspec.inspect.Type:
    if isinstance(type_, msgspec.inspect.UnionType):
        kinds = [kind for kind in type_.types if not isinstance(kind, msgspec.inspect.NoneType)]
        if len(kinds) == 1:
            return kinds[0]
    return type_


def _help(setting: Setting) -> str:
    text = " ".join(setting.help.split())
    default = setting.default
    if default is not None and default != () and not isinstance(setting.type, msgspec.inspect.BoolType):
        written = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text} (default: {written})" if text else f"default: {written}"
    elif isinstance(setting.type, msgspec.inspect.BoolType):
        text = f"{text} (default: {'on' if default else 'off'})".strip()
    return text.replace("%", "%%")


def _field_docstrings(config: type[msgspec.Struct]) -> dict[str, str]:
    """Return the docstring below each field of a class, which Python discards."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(definition, ast.ClassDef)
    helps = {}
    for field, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            helps[field.target.id] = following.value.value
    return helps
