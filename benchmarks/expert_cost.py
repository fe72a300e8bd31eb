"""The cost of a mixture of experts: its passes beside those of a dense model of its active size, with random weights.

    python benchmarks/expert_cost.py --rows 1,2,5,9

Both have SmolLM2-135M's shape; the mixture has 64 experts of 192 inner features, of which a row takes 8, in the place
of the dense model's 1536. A span of k + 1 rows verifies k drafted tokens. Each round visits every case, so that ratios
hold on a noisy machine. Figures are medians of the rounds; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pilotfish.engine.build import Engine, build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.server.cli.command import positives

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True, "hidden_act": "silu", "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 192,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip


def engine_of(folder: Path, config: dict[str, Any]) -> Engine:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | config))
    settings = EngineConfig(model=str(folder), load_format="dummy", kv_cache_memory=64 << 20)
    return build(settings, lambda what, share: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=positives, default=[1])
    parser.add_argument("--rows", type=positives, default=[1, 2, 5, 9])
    parser.add_argument("--context", type=int, default=100, help="tokens before the span")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        engines = {name: engine_of(Path(scratch) / name, config) for name, config in MODELS.items()}
    tables = {}
    for name, engine in engines.items():
        blocks = -(-(args.context + max(args.rows)) // engine.info.block_size)
        tables[name] = [engine.pool.allocate(blocks) or [] for _ in range(max(args.streams))]
    print("| streams | rows each | dense, ms | experts, ms | dense / experts |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(1)
    for streams in args.streams:
        for rows in args.rows:
            rounds = []
            for _ in range(args.rounds + 1):
                tokens = torch.randint(49152, (streams, rows), generator=generator).tolist()  # other experts each time
                times = {}
                for name, engine in engines.items():
                    spans = [
                        Span(own, args.context, table, logit_rows=rows)
                        for own, table in zip(tokens, tables[name], strict=False)
                    ]
                    start = time.perf_counter()
                    engine.runner.run(spans)
                    times[name] = 1e3 * (time.perf_counter() - start)
                rounds.append(times)
            del rounds[0]  # warm-up
            dense, experts = (statistics.median(times[name] for times in rounds) for name in MODELS)
            ratio = statistics.median(times["dense"] / times["experts"] for times in rounds)
            print(f"| {streams} | {rows} | {dense:.1f} | {experts:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
