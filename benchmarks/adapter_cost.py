"""The cost of low-rank adapters: a pass over sequences that each have their own, beside the same pass without any.

    python benchmarks/adapter_cost.py --streams 1,8 --rows 1,5

The adapters are random, of one rank, on all dense matrices of all layers. Each round visits every case, so that ratios
hold on a noisy machine. Figures are medians of the rounds; a ratio is taken within its round, to the pass without
adapters. --shape takes another folder's config.json with random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pilotfish.engine.build import build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderModel
from pilotfish.engine.models.registry import tensors_of
from pilotfish.server.cli.command import positives


def write(folder: Path, config: ModelConfig, rank: int, seed: int) -> Path:
    """Write an adapter of all dense matrices in PEFT's form, under Hugging Face's names."""
    generator, stored = torch.Generator().manual_seed(seed), {}
    for name, tensor in tensors_of(config).items():
        if tensor.kind == "weight" and tensor.quantizable and tensor.expert is None:
            rows, columns = tensor.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            stored[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
            stored[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--dummy", action="store_true", help="random weights: --model may be a folder with a config.json"
    )
    parser.add_argument("--kernels", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--streams", type=positives, default=[1, 8])
    parser.add_argument("--rows", type=positives, default=[1])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=100, help="tokens before the span")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    settings = EngineConfig(
        model=args.model,
        kernels=args.kernels,
        load_format="dummy" if args.dummy else "auto",
        lora_updates=True,
        kv_cache_memory=256 << 20,
    )
    engine = build(settings, lambda what, share: None)
    model = engine.runner.model
    assert isinstance(model, DecoderModel)
    assert model.adapters is not None
    most = max(args.streams)
    with tempfile.TemporaryDirectory() as scratch:
        numbers = [model.adapters.load(write(Path(scratch) / str(i), model.config, args.rank, i)) for i in range(most)]
    blocks_each = -(-(args.context + max(args.rows)) // engine.info.block_size)
    tables = [engine.pool.allocate(blocks_each) or [] for _ in range(most)]
    for table in tables:
        engine.runner.run([Span([1] * args.context, 0, table)])
    cases = {"none": [0] * most, "one for all": [numbers[0]] * most, "one for each": numbers}
    print("| streams | rows each | adapters | pass, ms | ratio |\n|---|---|---|---|---|")
    for count in args.streams:
        for rows in args.rows:
            rounds = []
            for _ in range(args.rounds + 1):
                times = {}
                for name, own in cases.items():
                    spans = [
                        Span([1] * rows, args.context, table, logit_rows=rows, adapter=number)
                        for table, number in zip(tables[:count], own, strict=False)
                    ]
                    start = time.perf_counter()
                    engine.runner.run(spans)
                    times[name] = 1e3 * (time.perf_counter() - start)
                rounds.append(times)
            del rounds[0]  # warm-up
            for name in cases:
                ratio = statistics.median(times[name] / times["none"] for times in rounds)
                print(f"| {count} | {rows} | {name} | {statistics.median(r[name] for r in rounds):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
