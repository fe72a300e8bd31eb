"""Fields that a request has and its type has not: ignored with a warning, or refused where that would be wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from pilotfish.server.errors import ApiError, bad_parameter
from pilotfish.server.protocol.common import ApiModel
from pilotfish.server.protocol.foreign import INERT

MOST = 64
"""Unknown fields in one request that are looked at; one with more of them is refused."""
NEAR = 0.84
"""Similarity, by difflib's ratio, from which a name is taken for a misspelling of a known one."""
LONGEST_NAME = 64


def unknown_fields(body: ApiModel, strict: bool) -> tuple[str, ...]:
    """Return the names of the unknown fields that are ignored, such as "foo" and "stream_options.foo".

    Raises ApiError 400 for one that is probably a misspelling, for one that other servers know and that would change
    the answer, and with `strict` for any. null asks for nothing, whatever the name.
    """
    ignored = []
    for path, name, value, known in _extras(body, ""):
        foreign = type(body).foreign.get(name) if not path else None
        if foreign is not None and not foreign.asks_for_nothing(value):
            message = f"{name} is not supported by this server: {foreign.instead}"
            raise bad_parameter(name, message, "unsupported_parameter")
        if foreign is not None:
            continue
        if strict:
            raise _unrecognized(f"{path}{name}", known, name)
        if value is None:
            continue
        if name not in INERT and _nearest(name, known) is not None:
            raise _unrecognized(f"{path}{name}", known, name)
        ignored.append(f"{path}{name}")
        if len(ignored) > MOST:
            raise bad_parameter(name, f"The request has more than {MOST} unknown fields.", "unknown_parameter")
    return tuple(ignored)


def _extras(body: BaseModel, path: str) -> Iterator[tuple[str, str, object, list[str]]]:
    """Yield (path, name, value, known names beside it) for the unknown fields of a body and of the objects in it."""
    if body.model_extra:
        known = list(type(body).model_fields)
        for name, value in body.model_extra.items():
            yield path, name, value, known
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, BaseModel):
            yield from _extras(value, f"{path}{name}.")


def _unrecognized(param: str, known: list[str], name: str) -> ApiError:
    near = _nearest(name, known)
    hint = f". Did you mean {near}?" if near is not None else ""
    return bad_parameter(param, f"Unrecognized request argument supplied: {param}{hint}", "unknown_parameter")


def _nearest(name: str, known: Iterable[str]) -> str | None:
    if len(name) > LONGEST_NAME:
        return None
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=NEAR)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    """Return the name without case and separators: maxTokens and max-tokens are spellings of max_tokens."""
    return name.lower().replace("_", "").replace("-", "")
