"""Model files from anywhere: a ModelError or what they say, never a crash, nor more memory than they are worth."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.checkpoints.gguf_header import Header, read_header
from pilotfish.checkpoints.patterns import module_pattern
from pilotfish.checkpoints.safetensors_header import BITS
from pilotfish.checkpoints.safetensors_header import read_header as read_safetensors
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.registry import tensors_of
from pilotfish.engine.weights.safetensors import shards
from pilotfish.errors import ModelError
from tests.support import hostile_files as hostile
from tests.support.tiny import KINDS, build_model
from tests.support.tiny_gguf import write_gguf

Tiny = Callable[[str], Path]

OWN = 24 << 20
"""Bytes beside twice a file's size that its reader may take: what the bounds on a header's parts allow."""


def bounded(read: Callable[[], Any], size: int, seconds: float = 20.0) -> Any:
    """What `read` returns, or the ModelError that it raises; `size` is that of the files that it reads."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        found = read()
    except ModelError as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 2 * size + OWN
    assert time.thread_time() - start < seconds
    return found


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# GGUF


@settings(max_examples=200)
@given(content=hostile.gguf_files())
def test_gguf_headers(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = written(tmp_path_factory.getbasetemp() / "hostile.gguf", content)
    found = bounded(lambda: read_header(path), len(content))
    if isinstance(found, Header):
        places = sorted((each.offset, each.offset + each.size) for each in found.tensors.values())
        assert all(begin < end <= len(content) for begin, end in places)
        assert all(before[1] <= after[0] for before, after in pairwise(places))
    read = bounded(lambda: read_config(ModelFiles("m", "gguf", path)), len(content))
    assert isinstance(read, ModelError), "none of these is a model"


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(build_model("llama2"), path, rope_factors=[1.0] * 8)


edits = st.lists(
    st.tuples(
        st.integers(0, 1500),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8)])),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200)
@given(edits=edits, cut=st.one_of(st.none(), st.none(), st.integers(0, 4000)))
def test_gguf_files_with_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, whole_gguf: Path, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    """The metadata of a model, some of whose bytes are others, or whose end is missing."""
    content = bytearray(whole_gguf.read_bytes())
    for at, new in edits:
        content[at : at + len(new)] = new
    path = written(tmp_path_factory.getbasetemp() / "mutated.gguf", bytes(content[:cut]))
    bounded(lambda: read_config(ModelFiles("m", "gguf", path)), len(content))


def u32(name: str, number: int) -> bytes:
    return hostile.value(name, 4, struct.pack("<I", number))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (hostile.gguf([], [], bytes(1 << 20), (2**40, 0)), "left for 1099511627776 tensors"),
        (hostile.gguf([], [], bytes(1 << 20), (0, 2**63)), "metadata values"),
        (hostile.gguf([], [], bytes(20 << 20), (0, 10**6)), "has 1000000 metadata values, but may have"),
        (hostile.gguf([], [], bytes(1 << 20), (0, 2)), "has the key '' twice"),
        (hostile.gguf([u32("general.alignment", 0)], []), "general.alignment is 0, but must be"),
        (hostile.gguf([hostile.value("general.alignment", 8, hostile.text(b"x"))], []), "general.alignment is 'x'"),
        (hostile.gguf([hostile.value("a", 9, hostile.nested(2000))], []), "nested more than 4 deep"),
        (hostile.gguf([hostile.value("a", 9, struct.pack("<IQ", 8, 2**60))], []), "values in a list of string"),
        (hostile.gguf([hostile.value("a", 9, struct.pack("<IQ", 0, 2**60))], []), "values in a list of uint8"),
        (
            hostile.gguf([hostile.value("a", 9, struct.pack("<IQ", 8, 300) + bytes(2400 - 8) + b"\xff" * 8)], []),
            "cannot read",
        ),
        (hostile.gguf([], [hostile.tensor("t", [8], 0, 0), hostile.tensor("t", [8], 0, 32)], bytes(64)), "'t' twice"),
        (hostile.gguf([], [hostile.tensor("s", [16], 0, 0), hostile.tensor("t", [8], 0, 32)], bytes(96)), "overlap"),
        (hostile.gguf([], [hostile.tensor("t", [8], 0, 1)], bytes(64)), "not a multiple of 32"),
        (hostile.gguf([], [hostile.tensor("t", [0], 0, 0)], bytes(64)), "does not have rows"),
        (hostile.gguf([], [hostile.tensor("t", [16, 2], 2, 0)], bytes(64)), "rows of blocks of 32"),
        (hostile.gguf([], [hostile.tensor("t", [1] * 5, 0, 0)], bytes(64)), "5 dimensions"),
        (hostile.gguf([], [hostile.tensor("t", [2**62, 2**62], 0, 0)], bytes(64)), "cut short"),
    ],
)
def test_gguf_headers_say_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    path = written(tmp_path / "hostile.gguf", content)
    found = bounded(lambda: read_header(path), len(content), 2.0)
    assert isinstance(found, ModelError)
    assert said in str(found)


@pytest.mark.parametrize(
    "content",
    [
        hostile.gguf([hostile.value(f"{i:x}", 0, b"x") for i in range(60_000)], []),
        hostile.gguf([], [hostile.tensor(f"{i:x}", [1], 0, 32 * i) for i in range(60_000)], bytes(32 * 60_000)),
        hostile.gguf([hostile.value(str(i), 9, struct.pack("<IQ", 0, 256) + bytes(256)) for i in range(255)], []),
        hostile.gguf([hostile.value("a", 8, hostile.text("😀".encode() + b"x" * (3 << 20)))], []),
        hostile.gguf([hostile.value(str(i), 8, hostile.text("😀".encode() + b"x" * 10**6)) for i in range(9)], []),
        hostile.gguf([hostile.value("a", 9, struct.pack("<IQ", 9, 60_000) + hostile.nested(0) * 60_000)], []),
        hostile.gguf([hostile.value("a", 9, struct.pack("<IQ", 8, 2**20) + bytes(2**23))], []),
    ],
)
def test_gguf_headers_that_swell(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "hostile.gguf", content)
    bounded(lambda: read_header(path), len(content))


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("llama.rope.freq_base", "x", "llama.rope.freq_base is 'x'"),
        ("llama.block_count", 2**32 - 1, "llama.block_count is 4294967295"),
        ("llama.attention.key_length", 0, "llama.attention.key_length is 0"),
        ("llama.rope.dimension_count", 7, "must rotate an even number"),
        ("tokenizer.ggml.eos_token_id", "x", "tokenizer.ggml.eos_token_id is 'x'"),
        ("llama.attention.layer_norm_rms_epsilon", "x", "layer_norm_rms_epsilon is 'x'"),
        ("llama.expert_count", "x", "llama.expert_count is 'x'"),
    ],
)
def test_gguf_values_of_wrong_types_are_named(tmp_path: Path, name: str, wrong: str | int, said: str) -> None:
    path = gguf_with(tmp_path, {name: wrong})
    found = bounded(lambda: read_config(ModelFiles("m", "gguf", path)), path.stat().st_size, 5.0)
    assert isinstance(found, ModelError)
    assert said in str(found)


def test_gguf_rope_factors_of_four_dimensions_are_refused(tmp_path: Path) -> None:
    path = gguf_with(tmp_path, {}, hostile.tensor("rope_freqs.weight", [1, 1, 2, 4], 0, EMBEDDING))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight' has shape \(4, 2, 1, 1\)"):
        read_config(ModelFiles("m", "gguf", path))


EMBEDDING = 64 * 512 * 4


def gguf_with(folder: Path, changes: dict[str, str | int], *more: bytes) -> Path:
    """A file with the tiny model's metadata, but these values, and its embedding, `more` tensors behind that."""
    header = read_header(write_gguf(build_model("llama2"), folder / "model.gguf"))
    entries = []
    for key, each in (header.metadata | changes).items():
        match each:
            case str():
                entries.append(hostile.value(key, 8, hostile.text(each.encode())))
            case int():
                entries.append(u32(key, each))
            case float():
                entries.append(hostile.value(key, 6, struct.pack("<f", each)))
    tensors = [hostile.tensor("token_embd.weight", [64, 512], 0, 0), *more]
    return written(folder / "changed.gguf", hostile.gguf(entries, tensors, bytes(EMBEDDING + 32)))


# safetensors


@settings(max_examples=300)
@given(content=hostile.safetensors_files())
def test_safetensors_headers(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """What the safetensors package refuses is refused, and what it takes is read as it reads it."""
    path = written(tmp_path_factory.getbasetemp() / "hostile.safetensors", content)
    found = bounded(lambda: read_safetensors(path), len(content))
    try:
        with safe_open(path, framework="np") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        assert isinstance(found, ModelError)
        return
    if isinstance(found, ModelError):
        assert "dimensions" in str(found) or "which is none" in str(found), found
        return
    assert {each.name: each.shape for each in found} == theirs


@pytest.mark.parametrize("cut", [0, 4, 8, 60, -1])
def test_safetensors_files_that_were_cut_short(tiny: Tiny, tmp_path: Path, cut: int) -> None:
    content = (tiny("llama2") / "model.safetensors").read_bytes()
    path = written(tmp_path / "model.safetensors", content[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_safetensors(path)


ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "content",
    [
        hostile.safetensors({f"{i:x}": ENTRY for i in range(60_000)}),
        hostile.safetensors({f"{i:x}": ENTRY for i in range(200_000)}),
        hostile.safetensors({"__metadata__": {f"{i:x}": "" for i in range(200_000)}}),
        hostile.safetensors(b"{" + b'"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
        hostile.safetensors(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
        hostile.safetensors(bytes(1 << 20)),
        hostile.safetensors({}, length=2**63),
    ],
)
def test_safetensors_headers_that_swell(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "hostile.safetensors", content)
    bounded(lambda: read_safetensors(path), len(content))


def test_dtypes_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    for name, bits in BITS.items():
        content = hostile.safetensors({"a": {"dtype": name, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits))
        path = written(tmp_path / "one.safetensors", content)
        with safe_open(path, framework="np") as file:
            assert list(file.keys()) == ["a"]
        assert read_safetensors(path)[0].size == bits


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../other/model.safetensors"}}, "must name files of the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must name files of the folder"),
        ({"weight_map": {"a": 5}}, "Expected `str`"),
        ({"weight_map": 5}, "Expected `object`"),
        ({"weight_map": {}}, "names no files"),
        ([], "Expected `object`"),
    ],
)
def test_index_that_is_none(tmp_path: Path, index: Any, said: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said):
        shards(tmp_path)


# config.json


@settings(max_examples=200)
@given(kind=st.sampled_from(sorted(KINDS)), edits=hostile.config_edits)
def test_configurations(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, kind: str, edits: hostile.Edits) -> None:
    config = json.loads((tiny(kind) / "config.json").read_text())
    changed = hostile.edited(hostile.EXTRA | config, edits)
    folder = tmp_path_factory.getbasetemp() / "hostile"
    folder.mkdir(exist_ok=True)
    content = json.dumps(changed)
    (folder / "config.json").write_text(content)
    found = bounded(lambda: read_config(ModelFiles("m", "huggingface", folder)), len(content))
    if not isinstance(found, ModelError):
        assert found.num_layers <= 2048
        if found.num_layers * (found.experts.count if found.experts else 1) < 1000:
            assert len(tensors_of(found)) > found.num_layers


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": 5}, "architectures is 5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"max_position_embeddings": 10**12}, "max_position"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "factor is 'x'"),
        ({"rope_parameters": 5}, "rope_parameters is 5"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "rope_type is"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_key_value_heads": 3}, "num_kv_heads, 3"),
        ({"model_type": []}, "model_type is"),
    ],
)
def test_configurations_name_what_is_wrong(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    config = json.loads((tiny("llama2") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as caught:
        read_config(resolve(str(tmp_path)))
    assert said in str(caught.value)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5, "5", "{", "[]", '{"a": "' + "x" * 2**22 + '"}'])
def test_configurations_that_are_no_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(resolve(str(tmp_path)))


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", ".*.*.*x", r"(?=a)a", r"(a)\1", "a" * 2000, "(", "a{1,99}{1,99}{1,99}"]
)
def test_patterns_that_could_take_long_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        module_pattern(pattern)


@pytest.mark.parametrize("pattern", ["q_proj", r".*\.mlp\..*_proj", "layers.(0|1).self_attn", r"^lm_head$", ".*"])
def test_patterns_as_they_are_published(pattern: str) -> None:
    assert module_pattern(pattern).pattern == pattern
