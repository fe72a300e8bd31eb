"""ResponseStore: responses that can be retrieved, and gone on with, in SQLite.

It is bounded in number, bytes and age. A store that fails (a full disk, a broken file) is reported in the log and
forgets; requests go on. Everything runs in one thread of its own, in order.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_log = logging.getLogger(__name__)
_SCHEMA = """CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created REAL NOT NULL, response BLOB NOT NULL, items BLOB NOT NULL,
    own INTEGER NOT NULL)"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A response with all items before it: those of earlier responses, and the last `own` of its own input."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    own: int

    @property
    def history(self) -> list[dict[str, Any]]:
        """The items that a response which goes on from this one begins with."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    """`path`: a file, or ":memory:". Keeps the newest `size` responses, and of these the newest that have `most` bytes
    together, for `age` seconds."""

    def __init__(self, path: str, size: int, age: float, most: int = 256 * 2**20) -> None:
        self._path, self._size, self._age, self._bytes = path, size, age, most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")
        self._connection: sqlite3.Connection | None = None
        self._puts = 0

    @property
    def enabled(self) -> bool:
        return self._size > 0

    def put(self, tenant: str, response: msgspec.Struct, items: list[dict[str, Any]], own: int) -> None:
        """Store a response; nobody waits for it, but what is asked later finds it."""
        if self.enabled:
            encoded = msgspec.json.encode(response)
            self._thread.submit(self._guarded, self._put, tenant, encoded, items, own)

    async def get(self, tenant: str, id: str) -> Stored | None:
        """Return a response of this tenant; None if there is none, or no longer."""
        return await self._run(self._get, tenant, id)

    async def delete(self, tenant: str, id: str) -> bool:
        """Return whether there was such a response."""
        return bool(await self._run(self._delete, tenant, id))

    def close(self) -> None:
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T | None:
        if not self.enabled:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, work, *arguments)

    def _guarded(self, work: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return work(self._open(), *arguments)
        except (sqlite3.Error, OSError) as error:
            _log.warning("the store of responses failed, and what it had is lost to clients: %s", error)
            self._close()
            return None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _put(
        self, connection: sqlite3.Connection, tenant: str, response: bytes, items: list[dict[str, Any]], own: int
    ) -> None:
        id_ = msgspec.json.decode(response)["id"]
        row = (id_, tenant, time.time(), response, msgspec.json.encode(items), own)
        connection.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
        connection.execute("DELETE FROM responses WHERE created < ?", (time.time() - self._age,))
        connection.execute(
            "DELETE FROM responses WHERE id IN (SELECT id FROM responses ORDER BY created DESC, rowid DESC "
            "LIMIT -1 OFFSET ?)",
            (self._size,),
        )
        connection.execute(
            "DELETE FROM responses WHERE id IN (SELECT id FROM (SELECT id, SUM(LENGTH(response) + LENGTH(items)) "
            "OVER (ORDER BY created DESC, rowid DESC) AS bytes FROM responses) WHERE bytes > ?)",
            (self._bytes,),
        )

    def _get(self, connection: sqlite3.Connection, tenant: str, id: str) -> Stored | None:
        found = connection.execute(
            "SELECT response, items, own FROM responses WHERE id = ? AND tenant = ? AND created >= ?",
            (id, tenant, time.time() - self._age),
        ).fetchone()
        if found is None:
            return None
        return Stored(msgspec.json.decode(found[0]), msgspec.json.decode(found[1]), found[2])

    def _delete(self, connection: sqlite3.Connection, tenant: str, id: str) -> bool:
        return connection.execute("DELETE FROM responses WHERE id = ? AND tenant = ?", (id, tenant)).rowcount > 0
