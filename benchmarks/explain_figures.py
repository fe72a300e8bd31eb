"""Published speedups of speculative decoding beside the planner's roofline: the acceptance that would explain them.

    python benchmarks/explain_figures.py

The figures: Llama-3.1-70B at 60, 69 and 91 tokens per second (vanilla, 8B draft model, 1B draft model), Llama-3.1-405B
at 6, 12 and 3.3. Neither the hardware nor the draft length was published. For each setup that may have been used this
prints the predicted tokens per second, and for each draft model and draft length k the acceptance rate that gives the
published speedup: if everything is as fast as the roofline says, and if the target's step is as slow as published and
only the drafting as fast as the roofline says. Where no rate in [0, 1] does, it prints how long a step must have taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pilotfish.engine.config import EngineConfig
from pilotfish.server.cli.table import aligned
from pilotfish.tools.planner.devices import find_device
from pilotfish.tools.planner.plan import acceptance_at, predict
from pilotfish.tools.planner.setup import PlannedDraft, Setup, make_setup
from pilotfish.tools.planner.speculation import acceptance_for

CONTEXT = 512
LENGTHS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Figures:
    model: str
    vanilla: float  # tokens per second
    drafted: dict[str, float]  # the same, by draft
    setups: tuple[tuple[str, int], ...]  # GPU, tensor-parallel degree


FIGURES = (
    Figures(
        "meta-llama/Llama-3.1-70B-Instruct",
        60.0,
        {"8b": 69.0, "1b": 91.0},
        (("h100", 4), ("h100", 8), ("a100", 4), ("a100", 8)),
    ),
    Figures(
        "meta-llama/Llama-3.1-405B-Instruct-FP8",
        6.0,
        {"8b": 12.0, "1b": 3.3},
        (("h100", 8), ("h200", 8)),
    ),
)
DRAFTS = ("8b=meta-llama/Llama-3.1-8B-Instruct", "1b=meta-llama/Llama-3.2-1B-Instruct")


def main() -> None:
    for figures in FIGURES:
        print(f"## {figures.model.rpartition('/')[2]}: {figures.vanilla:g} tokens per second published\n")
        for gpu, ranks in figures.setups:
            settings = EngineConfig(model=figures.model, drafter=DRAFTS, tensor_parallel_size=ranks)
            explain(make_setup(settings, find_device(gpu)), figures)
        for quantization in ("none", "fp8"):
            serial(figures, quantization)
        print()


def explain(setup: Setup, figures: Figures) -> None:
    step = predict(setup, None, 1, CONTEXT, 0, None).step
    print(
        f"{setup.ranks} x {setup.device.name}: {1 / step.total:.1f} tokens per second predicted, a step of "
        f"{1e3 * step.total:.1f} ms (weights {1e3 * step.weights:.1f}, all-reduce {1e3 * step.all_reduce:.1f}); "
        f"published: a step of {1e3 / figures.vanilla:.1f} ms. Acceptance needed:\n"
    )
    body = []
    for draft in setup.drafts:
        speedup = figures.drafted[draft.name] / figures.vanilla
        rates = [acceptance_at(setup, draft, 1, CONTEXT, length, speedup) for length in LENGTHS]
        slow = [slow_target(setup, draft, length, speedup, 1 / figures.vanilla) for length in LENGTHS]
        body.append([draft.name, f"{speedup:.2f}x", "roofline", *map(_rate, rates)])
        body.append([draft.name, f"{speedup:.2f}x", "published", *map(_rate, slow)])
    head = ("draft", "speed-up", "target's step", *(f"k={length}" for length in LENGTHS))
    print(*aligned(head, body, ("draft", "target's step")), "", sep="\n")
    for draft in setup.drafts:
        beyond(setup, draft, figures)


def slow_target(setup: Setup, draft: PlannedDraft, length: int, speedup: float, step: float) -> float | None:
    """Return the acceptance needed if the target's step takes as long as published, verifying or not, and drafting as
    long as the roofline says."""
    drafting = predict(setup, draft, 1, CONTEXT, length, 0.0).draft_seconds
    return acceptance_for(speedup * (step + drafting) / step, length)


def beyond(setup: Setup, draft: PlannedDraft, figures: Figures) -> None:
    """Print how long a step must have taken, for a figure that is too low for any acceptance to explain."""
    plain = 1 / figures.vanilla
    longest = plain * figures.vanilla / figures.drafted[draft.name]  # a step that commits one token
    for length in (1, 4, 8):
        floor = predict(setup, draft, 1, CONTEXT, length, 0.0)
        if floor.speedup * figures.vanilla > figures.drafted[draft.name]:
            print(
                f"- {draft.name}, k={length}: with nothing accepted the roofline gives {floor.speedup:.2f}x. The "
                f"figure is a step of {1e3 * longest:.0f} ms or more, {1e3 * (longest - plain):.0f} ms on top of "
                f"vanilla's: "
                f"{1e3 * (longest - plain) / length:.0f} ms for each drafted token, where the roofline has "
                f"{1e3 * floor.draft_seconds / length:.1f}"
            )
    print()


def serial(figures: Figures, quantization: str) -> None:
    """Print the speed with the layers spread over GPUs that work one at a time: one GPU's bandwidth reads all."""
    settings = msgspec.convert({"model": figures.model, "quantization": quantization}, EngineConfig)
    step = predict(make_setup(settings, find_device("h100")), None, 1, CONTEXT, 0, None).step
    dtype = "fp8" if quantization == "fp8" else "bfloat16"
    print(f"h100s that work one after the other, {dtype}: {1 / step.total:.1f} tokens per second predicted")


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.2f}"


if __name__ == "__main__":
    main()
