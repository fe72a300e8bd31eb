"""The cost of a step beside the model's pass: the engine's own work, by phase, and the messages to the server.

    python benchmarks/step_overhead.py --sequences 8 --max-tokens 128
    python benchmarks/step_overhead.py --idle-model --sequences 64

Decodes the built-in prompts (server/cli/prompts.jsonl) with n-gram speculation in this process. Steps count if all
sequences decode and no prompt is prefilled. "messages" is encoding a step's Outputs as MessagePack, which the engine
process does, and decoding it, which the server does. "own work" is the step without the model's pass, plus messages.

--idle-model measures what a GPU would wait for: the model does nothing, because its hidden states and logits exist
beforehand, and the drafter proposes the tokens that it will predict. Then "forward" is packing the spans and making
their tensors, and "host work" is the whole step, with this, with drawing tokens from a vocabulary of 512, and with
encoding the message to the server (not decoding it). Measured without drafts, and with --draft-tokens verified in each
step, without and with the controller.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from itertools import cycle, islice
from pathlib import Path

import msgspec
import torch
from llguidance import LLTokenizer

from pilotfish.checkpoints.catalog import Progress, resolve
from pilotfish.engine.build import Engine
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.core import EngineCore
from pilotfish.engine.draft import Draft
from pilotfish.engine.execution.runner import ModelRunner
from pilotfish.engine.layers.attention.backend import AttentionBatch, LayerCache
from pilotfish.engine.layers.communicator import ALONE
from pilotfish.engine.llm import LLM
from pilotfish.engine.memory.block_pool import BlockPool
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.process.messages import FromEngine, Outputs
from pilotfish.engine.request import EngineInfo, Request
from pilotfish.engine.sequence import Sequence
from pilotfish.engine.speculation.control.controller import Controller
from pilotfish.engine.speculation.drafters.drafter import DraftRequest
from pilotfish.engine.speculation.speculator import Speculator
from pilotfish.engine.verification.coupled import CoupledVerifier
from pilotfish.errors import ModelError
from pilotfish.server.cli.prompts import encode, read_prompts
from pilotfish.text.grammar.matcher import Compiler
from pilotfish.text.tokenizer import load_tokenizer

PROMPTS = Path(__file__).parents[1] / "server" / "cli" / "prompts.jsonl"
PHASES = ("draft", "plan", "forward", "sample", "commit")
TOKEN = 7
"""The token that the idle model always predicts."""


def main() -> None:
    gc.collect()
    gc.freeze()  # as the engine process does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--speculation", default="ngram", help='a drafter, or "off"')
    parser.add_argument("--idle-model", action="store_true")
    parser.add_argument("--draft-tokens", type=int, default=4, help="with --idle-model")
    parser.add_argument("--profile", action="store_true", help="with --idle-model: where the time goes, by function")
    args = parser.parse_args()
    if args.idle_model:
        idle_model(args.sequences, args.max_tokens, args.temperature, args.draft_tokens, args.profile)
    else:
        real_model(args)


def real_model(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(resolve(args.model))
    texts = islice(cycle(read_prompts(PROMPTS)), args.sequences)
    prompts = [encode(tokenizer, text) for text in texts]
    params = SamplingParams(temperature=args.temperature, seed=1, max_tokens=args.max_tokens, ignore_eos=True)
    with LLM(model=args.model) as llm:
        for request in llm.requests(prompts, params, speculation=args.speculation):
            llm.core.add(request)
        report(args.speculation, measure(llm.core, args.sequences))


def idle_model(sequences: int, max_tokens: int, temperature: float, drafted: int, profile: bool) -> None:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=max_tokens, ignore_eos=True)
    arms = {
        "vanilla": ("off", 0, False),
        f"{drafted} drafted": ("idle", drafted, False),
        f"{drafted} drafted, with the controller": ("idle", drafted, True),
    }
    for name, (speculation, length, controlled) in arms.items():
        core = idle_core(sequences, length, controlled)
        for i in range(sequences):
            prompt = tuple(range(i, i + 100))
            core.add(Request(id=f"request-{i}", prompt_ids=prompt, params=params, speculation=speculation))
        profiler = cProfile.Profile() if profile else None
        report(name, measure(core, sequences, profiler))
        if profiler is not None:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(32)


class IdleModel:
    """A model that predicts TOKEN for any input, without computing anything."""

    def __init__(self, config: ModelConfig, most_rows: int) -> None:
        self.config, self.comm = config, ALONE
        self._hidden = torch.zeros(most_rows, config.hidden_size)
        self._logits = torch.zeros(most_rows, config.vocab_size)
        self._logits[:, TOKEN] = 100.0

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: FeatureTap | None = None,
    ) -> torch.Tensor:
        return self._hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden)]


class IdleDrafter:
    """A drafter that drafts the idle model's tokens."""

    name = "idle"

    def propose(self, requests: list[DraftRequest]) -> list[Draft]:
        return [Draft((TOKEN,) * request.limit, None, self.name) for request in requests]

    def release(self, sequence: Sequence) -> None:
        pass


def _no_vocabulary() -> LLTokenizer:
    raise ModelError("the idle model has no vocabulary")


def idle_core(sequences: int, draft_tokens: int, controlled: bool) -> EngineCore:
    rows = sequences * (1 + max(1, draft_tokens))
    config = EngineConfig(max_num_seqs=sequences, max_batch_tokens=max(rows, 128), seed=1)
    shape = ModelConfig(
        architecture="llama",
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        max_position=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
    )

    def build(config: EngineConfig, progress: Progress) -> Engine:
        device, size, blocks = torch.device("cpu"), 16, sequences * 512
        controller = Controller(max(1, draft_tokens), {"idle": 0.9}) if controlled else None
        if controller is not None:
            controller.target.calibrate({1: 20e-3, 64: 21e-3, 512: 30e-3})  # a GPU's
        model = IdleModel(shape, config.max_batch_tokens)
        info = EngineInfo(
            model="idle",
            vocab_size=shape.vocab_size,
            max_model_len=shape.max_position,
            eos_token_ids=(0,),
            num_blocks=blocks,
            block_size=size,
            max_num_seqs=config.max_num_seqs,
            drafters=("idle",),
            default_drafter="off",
            dtype="float32",
            device="cpu",
            kernels="none",
            load_seconds=0.0,
        )
        return Engine(
            info=info,
            runner=ModelRunner(model, [], size, device),  # type: ignore[arg-type]
            pool=BlockPool(blocks, size),
            speculator=Speculator([IdleDrafter()], [], max(1, draft_tokens), shape.max_position, controller),
            verifier=CoupledVerifier((0,), sync_free=True),  # as on a GPU
            grammars=Compiler(_no_vocabulary),
        )

    return EngineCore(config, None, build)


def measure(core: EngineCore, sequences: int, profiler: cProfile.Profile | None = None) -> dict[str, list[float]]:
    """Return the milliseconds of each counted step by phase, and its rows and tokens."""
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FromEngine).decode
    series: dict[str, list[float]] = {}
    while core.has_work():
        if profiler is not None:
            profiler.enable()
        start, spent = time.perf_counter(), time.thread_time()
        result = core.step()
        step = time.perf_counter() - start
        encoded = encode(Outputs(tuple(result.deltas), result.stats))
        encoding = time.perf_counter() - start - step
        spent = time.thread_time() - spent
        if profiler is not None:
            profiler.disable()
        decode(encoded)
        messages = time.perf_counter() - start - step
        stats = result.stats
        if stats.prompt_tokens or stats.running < sequences:
            continue
        counted = {name: stats.seconds[name] for name in PHASES} | {
            "messages": messages,
            "own work": step - stats.seconds["forward"] + messages,
            "step": step,
            "host work": step + encoding,
            "host work, processor time": spent,
        }
        for name, seconds in counted.items():
            series.setdefault(name, []).append(1e3 * seconds)
        series.setdefault("rows", []).append(stats.rows)
        series.setdefault("tokens", []).append(stats.generated_tokens)
    if not series:
        raise SystemExit("no step was counted: raise --max-tokens")
    return series


def report(name: str, series: dict[str, list[float]]) -> None:
    rows, tokens = (statistics.fmean(series.pop(what)) for what in ("rows", "tokens"))
    count = len(series["step"])
    print(f"{name}: {count} steps, {rows:.1f} rows and {tokens:.1f} tokens a step\n")
    print("| phase | mean, ms | p50, ms | p99, ms |\n|---|---|---|---|")
    for phase, times in series.items():
        high = sorted(times)[round(0.99 * (count - 1))]
        print(f"| {phase} | {statistics.fmean(times):.3f} | {statistics.median(times):.3f} | {high:.3f} |")
    print()


if __name__ == "__main__":
    main()
