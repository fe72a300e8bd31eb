"""A KV cache that there is no memory for is refused before anything is allocated."""

from __future__ import annotations

import pytest

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.memory.kv_cache import CacheRoom, check_room
from pilotfish.errors import ConfigError


def test_more_memory_than_there_is_is_refused() -> None:
    room = CacheRoom(free=1000, block_bytes=10)
    for memory, rooms, sharing in [(0, [room], 1), (1000, [room], 1), (500, [room] * 2, 2), (1000, [room] * 2, 1)]:
        check_room(EngineConfig(kv_cache_memory=memory), rooms, sharing)
    with pytest.raises(ConfigError, match="kv_cache_memory is 1001 bytes, but 1000 are free"):
        check_room(EngineConfig(kv_cache_memory=1001), [room], 1)
    with pytest.raises(ConfigError, match="on each of 2 ranks of this machine, but 1000 are free"):
        check_room(EngineConfig(kv_cache_memory=501), [room] * 2, 2)
