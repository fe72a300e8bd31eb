"""`pilotfish plan`: memory, fit and predicted speed of a configuration on any GPUs, present or not. See
docs/planning.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError
from pilotfish.server.cli.command import Command, positive, positives
from pilotfish.server.cli.settings import add_flags, load, read_yaml
from pilotfish.server.cli.table import aligned
from pilotfish.server.config import ServerConfig

if TYPE_CHECKING:
    from pilotfish.tools.planner.plan import Plan, Prediction

CONTEXT, BATCHES, LENGTHS = 2048, (1, 8, 32), (1, 2, 4, 8)
PLANNED = [
    *("model", "dtype", "quantization", "tensor_parallel_size", "draft_tensor_parallel_size", "enforce_eager"),
    *("cuda_graph_memory", "max_model_len", "max_num_seqs", "max_batch_tokens", "kv_cache_dtype", "kv_cache_memory"),
    *("kv_cache_share", "drafter", "num_draft_tokens"),
]
"""Engine settings that a plan depends on."""
NOT_PLANNED = frozenset(EngineConfig.__struct_fields__) - set(PLANNED)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings, as for serve; flags win over it")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="b200, h200, h100, a100, l40s, l4, rtx4090, cpu, or a .json file that describes one (default: h100)",
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"tokens of each sequence (default: {CONTEXT}, or the model's limit)",
    )
    parser.add_argument(
        "--batch",
        type=positives,
        metavar="N,N,...",
        help="sequences in a step (default: 1,8,32, up to max_num_seqs)",
    )
    parser.add_argument(
        "--draft-lengths",
        type=positives,
        metavar="N,N,...",
        help="draft lengths (default: 1,2,4,8, up to num_draft_tokens)",
    )
    parser.add_argument(
        "--acceptance",
        type=_acceptance,
        action="append",
        default=[],
        metavar="[NAME=]X",
        help="chance that a drafted token is accepted after those before it were, of the drafter NAME or of all; "
        "repeatable (default: 0.7 for draft models and EAGLE-3 heads, 0.3 for lookups)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the predictions into a .png, .svg or .pdf file")
    add_flags(parser, EngineConfig, "settings", omit=NOT_PLANNED)


def _run(options: dict[str, Any]) -> int:
    if options["plot"] and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot needs matplotlib: install it with pip install 'pilotfish[bench]'")
    settings = planned_config(options)
    from pilotfish.tools.planner.devices import find_device
    from pilotfish.tools.planner.plan import make_plan
    from pilotfish.tools.planner.setup import make_setup

    setup = make_setup(settings, find_device(options["gpu"]), settings.draft_tensor_parallel_size)
    names = [draft.name for draft in setup.drafts]
    acceptances: dict[str, float] = {}
    for name, rate in options["acceptance"]:
        acceptances.update(dict.fromkeys(names, rate) if name is None else {name: rate})
    context = options["context"] or min(CONTEXT, setup.max_model_len)
    batches = options["batch"] or [n for n in BATCHES if n <= setup.settings.max_num_seqs]
    lengths = options["draft_lengths"] or [n for n in LENGTHS if n <= settings.num_draft_tokens]
    made = make_plan(setup, context, batches, lengths, acceptances)
    if options["json"]:
        print(json.dumps(msgspec.to_builtins(made), indent=1))
    else:
        print(*report(made), sep="\n")
    if options["plot"]:
        from pilotfish.server.cli.plan_plot import plot

        try:
            plot(made, Path(options["plot"]))
        except (OSError, ValueError) as error:  # ValueError: matplotlib does not know the file's ending
            raise ConfigError(f"plot is {options['plot']!r}, which cannot be written: {error}") from error
    return 0 if made.fits else 1


def planned_config(options: dict[str, Any]) -> EngineConfig:
    """Make the engine's config from the --config file and flags; flags win. Raises ConfigError."""
    path = options.get("config")
    content = read_yaml(str(path), (EngineConfig, ServerConfig)) if path else {}
    return load(EngineConfig, content, options).check()


def report(plan: Plan) -> list[str]:
    """Return the lines of the printed report."""
    gpus = "" if plan.tensor_parallel_size == 1 else f"{plan.tensor_parallel_size} x "
    return [
        f"{plan.model}: {_count(plan.parameters)} parameters, {plan.dtype} weights, on {gpus}{plan.device} "
        f"({plan.device_source})",
        *plan.notes,
        "",
        *_memory(plan),
        "",
        *_verdict(plan),
        "",
        *_predictions(plan),
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    parts = [
        ("weights", memory.weights),
        *((f"weights of {name}", size) for name, size in memory.draft_weights.items()),
        ("activations", memory.activations),
        ("CUDA graphs", memory.graphs),
        ("reserved", memory.reserved),
        ("KV cache", memory.kv_cache),
        ("unused" if memory.unused >= 0 else "TOO LITTLE", memory.unused),
        ("memory", memory.total),
    ]
    body = [[what, _gib(size), f"{size / memory.total:.0%}"] for what, size in parts if size]
    return aligned(("on each device", "GiB", "share"), body, ("on each device",))


def _verdict(plan: Plan) -> list[str]:
    per_token = f"{plan.memory.kv_bytes_per_token:,} bytes of KV cache a token on each device"
    if plan.fits:
        return [
            f"It fits: the cache holds {plan.memory.cached_tokens:,} tokens ({per_token}): one request of up to "
            f"{plan.largest_context:,} tokens, or {plan.largest_batch} of {plan.context:,}."
        ]
    missing = f"{_gib(-plan.memory.unused)} GiB are missing on each device" if plan.memory.unused < 0 else ""
    short = missing or f"the cache holds {plan.memory.cached_tokens:,} tokens only"
    lines = [f"It does NOT fit: {short} ({per_token})."]
    if not plan.remedies:
        return [*lines, "Nothing that was tried would: more devices, fp8 weights, no draft models, larger devices."]
    return [*lines, "What would fit:", *(f"- {_remedy(each)}" for each in plan.remedies)]


def _remedy(remedy: Any) -> str:
    return f"{remedy.what}: tensor_parallel_size {remedy.ranks}, a cache of up to {remedy.cached_tokens:,} tokens"


def _predictions(plan: Plan) -> list[str]:
    lengths = sorted({each.draft_length for each in plan.predictions} - {0})
    head = ["batch", "drafter", "acceptance", *(f"k={k}" for k in lengths)]
    head += ["best k", "tokens/s", "each", "step ms", "draft ms", "break-even"]
    body = []
    for batch, drafter in dict.fromkeys((each.batch, each.drafter) for each in plan.predictions):
        own = {p.draft_length: p for p in plan.predictions if (p.batch, p.drafter) == (batch, drafter)}
        best = plan.best(drafter, batch)
        body.append(
            [
                f"{batch}" if best.fits else f"{batch} *",
                drafter,
                "" if best.acceptance is None else f"{best.acceptance:.2f}",
                *(f"{own[k].speedup:.2f}x" if k in own else "" for k in lengths),
                str(best.draft_length),
                f"{best.tokens_per_second:.1f}",
                f"{best.tokens_per_second / batch:.1f}",
                f"{1e3 * best.step.total:.2f}",
                f"{1e3 * best.draft_seconds:.2f}",
                _break_even(best),
            ]
        )
    lines = [
        f"Predicted for {plan.context:,} tokens of context: speed-up over vanilla by draft length k; at the best k,",
        "tokens per second of all sequences and of each. Acceptance is what you say it is (--acceptance); below",
        "break-even a drafter slows decoding. Lookups (ngram, suffix) are assumed to find a draft at every step.",
        "",
        *aligned(head, body, ("drafter",)),
    ]
    if not all(each.fits for each in plan.predictions):
        lines.append("* more sequences of this context than the cache holds")
    return lines


def _break_even(best: Prediction) -> str:
    if best.draft_length == 0:
        return ""
    return "never" if best.break_even is None else f"{best.break_even:.2f}"


def _acceptance(text: str) -> tuple[str | None, float]:
    name, separator, number = text.rpartition("=")
    try:
        rate = float(number)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1 or (separator and not name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate from 0 to 1, or NAME=RATE")
    return name or None, rate


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


COMMAND = Command(
    name="plan",
    help="predict what fits on which GPUs, and how fast it will be",
    description="Plan a configuration for GPUs, present or not: memory on each, what fits, predicted speed.",
    example="pilotfish plan --model meta-llama/Llama-3.1-8B-Instruct --gpu l4 \\\n"
    "    --drafter 1b=meta-llama/Llama-3.2-1B-Instruct --acceptance 1b=0.75 --batch 1,4,16",
    status="Exit status: 0 if it fits, 1 if it does not, 2 for settings that cannot work.",
    add_arguments=_add_arguments,
    run=_run,
)
