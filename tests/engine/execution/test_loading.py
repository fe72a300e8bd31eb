"""Loading a rank's part of a model: the right numbers, no byte more than is needed, and in how much memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import Layout
from pilotfish.engine.models.registry import expected_shapes, tensors_of
from pilotfish.engine.weights import dummy, safetensors
from pilotfish.engine.weights.quantization import SCALE
from pilotfish.engine.weights.read_ahead import Job, read_ahead
from pilotfish.engine.weights.tensors import Part, whole_parts
from pilotfish.errors import ModelError
from pilotfish.tools.planner.published import PUBLISHED
from tests.support.fp8_checkpoints import LAYOUTS, publish
from tests.support.tiny import KINDS, build_model, make_tiny
from tests.support.tiny_gguf import write_gguf

Tiny = Callable[[str], Path]

SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 12, "head_dim": 16}


def shape(kind: str, size: int) -> dict[str, Any]:
    own = {"hidden_size": 192} if kind == "phi3" else {}  # which has no head_dim
    return SHAPE | own | {"num_key_value_heads": 1 if kind == "gemma3" else {2: 4, 3: 3, 4: 2}[size]}


def folder_files(folder: Path) -> ModelFiles:
    return ModelFiles(folder.name, "huggingface", folder)


def random_weights(
    config: ModelConfig, dtype: torch.dtype, parts: Mapping[str, Part] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = tensors_of(config)
    return dummy.iter_weights(tensors, dtype, torch.device("cpu"), whole_parts(tensors) if parts is None else parts)


def assert_slices(files: ModelFiles, size: int, dtype: torch.dtype) -> None:
    """Each rank's weights, read alone, are slices of the whole ones."""
    config = read_config(files)
    whole = dict(iter_weights(files, config, dtype))
    for rank in range(size):
        parts = Layout(config, rank, size).parts()
        pairs = list(iter_weights(files, config, dtype, parts))
        found = dict(pairs)
        assert len(found) == len(pairs)
        assert {name for name in found if not name.endswith(SCALE)} == parts.keys()
        for name, tensor in found.items():
            part = parts[name] if name in parts else parts[name.removesuffix(SCALE)][:1]
            wanted = whole[name][part]
            assert tensor.dtype == wanted.dtype
            torch.testing.assert_close(tensor.float(), wanted.float(), rtol=0, atol=0, msg=f"{name} on rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int) -> None:
    """In chunks that are smaller than most tensors and larger than others, on the way to another dtype."""
    monkeypatch.setattr(safetensors, "CHUNK", 1000)
    folder = make_tiny(kind, tmp_path / "model", max_shard_size="60KB", **shape(kind, size))
    assert len(list(folder.glob("*.safetensors"))) > 2
    for dtype in (torch.float32, torch.bfloat16):
        assert_slices(resolve(str(folder)), size, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_slices_with_their_scales(tmp_path: Path, layout: str) -> None:
    fp8, _ = publish(make_tiny("llama", tmp_path / "model", **shape("llama", 3)), tmp_path, layout)
    assert_slices(resolve(str(fp8)), 3, torch.bfloat16)


@pytest.mark.parametrize("stored", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("kind", ["llama", "llama-biased", "qwen2", "gemma3"])
def test_gguf_slices(tmp_path: Path, kind: str, stored: Kind) -> None:
    """Blocks of 32 do not end where slices of 192 / 4 columns do."""
    path = write_gguf(build_model(kind, **shape(kind, 4)), tmp_path / "model.gguf", stored)
    for size in (2, 4):
        assert_slices(resolve(str(path)), size, torch.float32)


def test_gguf_dequantizes_only_rows_that_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(build_model("qwen2", **shape("qwen2", 4)), tmp_path / "model.gguf", Kind.Q8_0)
    files, values = resolve(str(path)), []

    def dequantize(raw, kind, original=gguf.dequantize):
        values.append(original(raw, kind).size)
        return original(raw, kind)

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    config = read_config(files)
    matrices = {name: size for name, size in expected_shapes(config).items() if len(size) == 2}
    for rank in range(4):
        list(iter_weights(files, config, torch.float32, Layout(config, rank, 4).parts()))
    replicated = sum(a * b for name, (a, b) in matrices.items() if ".k_proj" in name or ".v_proj" in name)
    cut = 4 * config.num_layers * config.hidden_size * 32  # a row of down_proj at each cut within a block
    assert sum(values) <= sum(a * b for a, b in matrices.values()) + replicated + cut


@pytest.mark.parametrize("kind", ["llama-biased", "gemma3"])
def test_random_weights_are_slices_of_the_whole_ones(tmp_path: Path, kind: str) -> None:
    config = read_config(resolve(str(make_tiny(kind, tmp_path / "model", **shape(kind, 4)))))
    whole = dict(random_weights(config, torch.float32))
    assert not torch.equal(whole["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.gate_proj.weight"])
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == expected_shapes(config)
    for rank in range(4):
        parts = Layout(config, rank, 4).parts()
        found = dict(random_weights(config, torch.float32, parts))
        assert found.keys() == parts.keys()
        assert all(torch.equal(tensor, whole[name][parts[name]]) for name, tensor in found.items())


# What is read of the files


def write_checkpoint(folder: Path, config: ModelConfig, shards: int) -> Path:
    """Random weights in bfloat16, in files of about the same size, in the order of the computation."""
    folder.mkdir()
    weights = list(random_weights(config, torch.bfloat16))
    total, done = sum(tensor.nbytes for _, tensor in weights), 0
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in weights:
        files[done * shards // total][name] = tensor
        done += tensor.nbytes
    names: dict[str, str] = {}
    for i, tensors in enumerate(files):
        file = f"model-{i}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, f'"{file}"')
    listed = ", ".join(f'"{name}": {file}' for name, file in names.items())
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{listed}}}}}')
    return folder


@pytest.fixture(scope="module")
def smollm2_sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's shapes in 4 files, 269 MB together."""
    return write_checkpoint(tmp_path_factory.mktemp("loading") / "model", PUBLISHED["smollm2-135m"], 4)


Reads = dict[str, list[tuple[int, int]]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """(start, end) of what is read from now on, by the file's name."""
    seen: Reads = {}

    def preadv(file: int, buffers: list[memoryview], offset: int, original=os.preadv) -> int:
        count = original(file, buffers, offset)
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        seen.setdefault(name, []).append((offset, offset + count))
        return count

    monkeypatch.setattr(safetensors.os, "preadv", preadv)
    return seen


def bytes_asked_of_the_system() -> int:
    """By read, pread and the like, in all of this process: the system's own count."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.slow
def test_all_ranks_together_read_each_byte_once(smollm2_sized: Path, reads: Reads) -> None:
    """But for norms, which are everywhere. Counted read by read, and by the system."""
    config = PUBLISHED["smollm2-135m"]
    before = bytes_asked_of_the_system()
    for rank in range(3):
        for _ in iter_weights(folder_files(smollm2_sized), config, torch.bfloat16, Layout(config, rank, 3).parts()):
            pass
    asked = bytes_asked_of_the_system() - before
    norms = sum(size[0] for name, size in expected_shapes(config).items() if "norm" in name) * 2
    total = sum(a * b for a, b in (size for size in expected_shapes(config).values() if len(size) == 2)) * 2
    for path in smollm2_sized.glob("*.safetensors"):
        spans = sorted(reads[path.name])
        with safe_open(path, framework="pt") as file:
            replicated = sum(file.get_tensor(name).nbytes for name in file.keys() if "norm" in name)  # noqa: SIM118
        twice = sum(max(0, end - start) for (_, end), (start, _) in pairwise(spans))
        assert twice == 2 * replicated
        assert sum(end - start for start, end in spans) == (
            path.stat().st_size - _header_size(path) + 2 * replicated
        )  # no byte of a tensor is left out
    assert sum(end - start for spans in reads.values() for start, end in spans) == total + 3 * norms
    headers = 3 * sum(_header_size(path) for path in smollm2_sized.glob("*.safetensors"))
    assert total + 3 * norms + headers <= asked < total + 3 * norms + headers + 100_000


def _header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_column_slice_does_not_bring_whole_rows_from_the_disk(tmp_path: Path) -> None:
    rows, width, taken = 256, 1 << 15, 1 << 12  # rows of 64 KiB, of which 8 KiB are wanted
    path = tmp_path / "model.safetensors"
    save_file({"matrix": torch.zeros(rows, width, dtype=torch.bfloat16)}, path)
    with ExitStack() as stack:
        (place,) = safetensors._open(path, stack)
        os.fsync(place.file)
        os.posix_fadvise(place.file, 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(path) > 0.01:
            pytest.skip("this file system keeps files in memory")
        safetensors._read(place, (slice(0, rows), slice(3 * taken, 4 * taken)), torch.bfloat16, torch.device("cpu"))
    assert 2 / 16 <= resident(path) < 4 / 16  # of a row's 16 pages 2, or 3 that hold them


def resident(path: Path) -> float:
    """The share of the file's pages that are in memory."""
    with path.open("rb+") as file, mmap.mmap(file.fileno(), 0) as data:
        pages = -(-len(data) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        buffer = (ctypes.c_char * len(data)).from_buffer(data)
        assert ctypes.CDLL(None).mincore(ctypes.byref(buffer), ctypes.c_size_t(len(data)), states) == 0
        del buffer
        return sum(state & 1 for state in states) / pages


def test_several_files_are_read_at_a_time_each_in_the_order_of_the_computation(smollm2_sized: Path) -> None:
    config = PUBLISHED["smollm2-135m"]
    places: dict[str, str] = {}
    for path in smollm2_sized.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    names = [name for name, _ in iter_weights(folder_files(smollm2_sized), config, torch.bfloat16)]
    assert len({places[name] for name in names[:4]}) == 4
    order = list(expected_shapes(config))
    for file in set(places.values()):
        places_of = [order.index(name) for name in names if places[name] == file]
        assert places_of == sorted(places_of)


PEAK = """
import sys
from pathlib import Path
import torch
from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.models.checkpoint import iter_weights
from pilotfish.engine.models.layout import Layout
from pilotfish.tools.planner.published import PUBLISHED
from pilotfish.engine.weights import safetensors

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

config = PUBLISHED["smollm2-135m"]
files = ModelFiles("", "huggingface", Path(sys.argv[1]))
rank, size = int(sys.argv[2]), int(sys.argv[3])
torch.empty(1).to(torch.bfloat16)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
for _ in iter_weights(files, config, torch.bfloat16, Layout(config, rank, size).parts()):
    pass  # as if it were on its device now
print(peak() - before)
"""


@pytest.mark.process
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_memory_while_loading_stays_under_the_largest_file(smollm2_sized: Path, rank: int) -> None:
    """Of what passes through the host: 19 MB of a rank's part are one tensor, its slice of the embedding."""
    command = [sys.executable, "-c", PEAK, str(smollm2_sized), str(rank), "3"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert 0 < int(output) < max(path.stat().st_size for path in smollm2_sized.glob("*.safetensors"))


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny("llama2", tmp_path / "model")
    config = read_config(resolve(str(folder)))

    def cut(path: Path, stack, original=safetensors._open):
        places = original(path, stack)
        os.truncate(path, path.stat().st_size - 10)
        return places

    monkeypatch.setattr(safetensors, "_open", cut)
    with pytest.raises(ModelError, match=r"model\.safetensors ends within tensor .*: it was cut short"):
        list(iter_weights(folder_files(folder), config, torch.float32))


# Reading ahead


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 10), max_size=20),
    limit=st.integers(0, 25),
    threads=st.integers(1, 4),
    slow=st.booleans(),
)
def test_results_come_in_order_and_no_more_of_them_wait_than_the_limit(sizes, limit, threads, slow) -> None:
    lock, started, over = threading.Lock(), [], []
    found: list[int] = []

    def job(i: int) -> Job[int]:
        def run() -> int:
            with lock:
                started.append(i)
                waiting = [j for j in started if j not in found]
                if sum(sizes[j] for j in [*waiting, *found[-1:]]) > limit and len(waiting) > 1:
                    over.append(waiting)
            if slow:
                time.sleep(0.0005)
            return i

        return Job(run, sizes[i])

    for i in read_ahead([job(i) for i in range(len(sizes))], threads, limit):
        with lock:
            found.append(i)
    assert found == list(range(len(sizes)))
    assert not over


def readers() -> list[threading.Thread]:
    """The threads that read ahead; others come and go, as earlier tests have left them."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_a_jobs_error_is_raised_and_the_rest_is_not_done() -> None:
    done: list[int] = []

    def work(i: int) -> int:
        done.append(i)
        return 1 // (i - 3)

    def jobs() -> Iterator[Job[int]]:
        for i in range(100):
            yield Job(partial(work, i), 1)

    with pytest.raises(ZeroDivisionError):
        list(read_ahead(jobs(), 2, 4))
    assert len(done) < 12
    assert not readers()


def test_one_who_stops_early_leaves_nothing_running() -> None:
    results = read_ahead([Job(partial(int, i), 1) for i in range(100)], 4, 10)
    assert next(results) == 0
    results.close()
    assert not readers()
