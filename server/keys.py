"""The API keys that are accepted, from the settings and from a file that can be read again while the server runs.

A line of the file is KEY or NAME=KEY, and may go on with limits, such as `weight=2 requests_per_minute=60`. Empty lines
and those that begin with # count for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pilotfish.errors import ConfigError
from pilotfish.server.tenants import ApiKey, KeyLimits, parse_key

logger = logging.getLogger(__name__)


class KeyRing:
    """`keys` are those that are accepted now; none: nobody needs one. `given` are those of the settings, `path` is the
    file with more. Raises ConfigError for a file that cannot be read, has no keys, or is wrong."""

    def __init__(self, given: Iterable[str] = (), path: str | None = None) -> None:
        self._given = tuple(map(parse_key, given))
        self._path = path
        self.keys = self._read()

    def reload(self) -> None:
        """Read the file again. Requests in flight go on; if something is wrong with it, the keys stay as they are, and
        the log says why."""
        try:
            keys = self._read()
        except ConfigError as error:
            logger.error("the API keys stay as they are: %s", error)
            return
        old, new = {key.key for key in self.keys}, {key.key for key in keys}
        self.keys = keys
        logger.warning(
            "%d API keys were read again: %d are new, %d have gone", len(keys), len(new - old), len(old - new)
        )

    def _read(self) -> tuple[ApiKey, ...]:
        """An empty file must not open the server to everyone."""
        if self._path is None:
            return self._given
        where = f"api_key_file {self._path}"
        try:
            text = Path(self._path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the keys in {where}: {error}") from error
        keys = [
            _parse_line(line, f"{where}, line {number}")
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        if not keys:
            raise ConfigError(f"{where} has no keys: it must have one per line")
        _check(keys, where)
        return (*self._given, *keys)


def _parse_line(line: str, where: str) -> ApiKey:
    first, *rest = line.split()
    key, limits = parse_key(first), {}
    for word in rest:
        name, _, value = word.partition("=")
        if name not in KeyLimits.__struct_fields__ or name in limits:
            known = ", ".join(KeyLimits.__struct_fields__)
            raise ConfigError(f"{where} has {name!r} after a key, but may have each of {known} once, as in weight=2")
        limits[name] = value
    if limits and key.name is None:
        raise ConfigError(f"{where} has limits for a key without a name: write NAME=KEY before them")
    try:
        return ApiKey(key.key, key.name, msgspec.convert(limits, KeyLimits, strict=False))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check(keys: Iterable[ApiKey], where: str) -> None:
    """Raise ConfigError for a key that stands twice, or a name with several limits. Keys are never shown."""
    known: dict[str, str | None] = {}
    limits: dict[str, KeyLimits] = {}
    for key in keys:
        if key.key in known:
            raise ConfigError(f"{where} has a key twice, of {known[key.key]!r} and of {key.name!r}")
        known[key.key] = key.name
        if key.name is not None and limits.setdefault(key.name, key.limits) != key.limits:
            raise ConfigError(f"{where} has different limits for two keys of {key.name!r}: they are the tenant's")
