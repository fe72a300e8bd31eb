"""Paths that clients get slightly wrong, mostly by a base URL with a slash or a /v1 too many."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "/v1/"

_SLASHES = re.compile("/{2,}")


class TidyPaths:
    """Takes doubled slashes, and those at the end, out of paths below /v1/, for which others would need a redirect that
    many clients do not follow. No other path: a proxy in front may protect it by its name."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app = app
        self._paths = frozenset(path for path in paths if path.startswith(PREFIX))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._paths:
            tidy = _SLASHES.sub("/", scope["path"]).removesuffix("/")
            if tidy in self._paths:
                scope = {**scope, "path": tidy, "raw_path": tidy.encode()}
        await self._app(scope, receive, send)


def meant(path: str, paths: Collection[str]) -> str | None:
    """Return the path below /v1/ that ends as `path` does, such as that of /chat/completions or /v1/v1/messages."""
    parts = list(filter(None, path.split("/")))[-4:]
    known = (PREFIX + "/".join(parts[i:]) for i in range(len(parts)))
    return next((one for one in known if one in paths), None)
