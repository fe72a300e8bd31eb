"""Training a draft, from the target's own text to a folder that can be served, on small random targets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.llm import LLM
from pilotfish.engine.params import SamplingParams
from pilotfish.engine.weights import int8
from pilotfish.errors import ConfigError
from pilotfish.tools.training import loop
from pilotfish.tools.training.losses import draft_loss
from pilotfish.tools.training.pipeline import Callbacks, train_draft
from pilotfish.tools.training.settings import OBJECTIVES, TrainSettings
from pilotfish.tools.training.student import Tally
from pilotfish.tools.training.text import Conversation, TextStore
from pilotfish.tools.training.vocabulary import frequent_tokens
from pilotfish.tools.training.write import Frame
from tests.support.tiny import TEXT, make_tiny, train_tokenizer

pytestmark = pytest.mark.slow

FRAME = Frame(before=(1,), after=())
SMALL = TrainSettings(
    tokens=12_000,
    turn_tokens=8,
    answer_tokens=24,
    steps=200,
    batch_tokens=384,
    learning_rate=3e-3,
    draft_vocab_size=512,
    feature_layers=(0, 1, 2),
)


def ignore(*told: object) -> None:
    pass


def run(target: Path, out: Path, settings: TrainSettings, on_loop: Callable[[Any], None] = ignore) -> Any:
    config = EngineConfig(
        model=str(target), max_num_seqs=32, kv_cache_memory=16 << 20, drafter=("ngram",), num_threads=1
    )
    callbacks = Callbacks(ignore, ignore, on_loop)
    return train_draft(resolve(str(target)), config, FRAME, [], out, out / "work", settings, callbacks)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target that knows a page of text, more or less: what random weights say nobody could learn from."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("target") / "target")
    tokens = torch.tensor(train_tokenizer().encode(TEXT).ids)
    torch.set_num_threads(1)  # more would only wait for each other over matrices of this size
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        starts = torch.randint(len(tokens) - 48, (16,), generator=generator)
        batch = torch.stack([tokens[start : start + 48] for start in starts])
        batch[:, 0] = 1  # as every conversation begins
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["eagle3", "draft-model", "dspark"])
def test_two_hundred_steps_raise_held_out_acceptance(kind: Any, target: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    curve = run(target, out, replace(SMALL, kind=kind))
    first, last = curve[0]["acceptance"], curve[-1]["acceptance"]
    assert curve[-1]["step"] == 200
    assert last[0] > first[0] + 0.15

    trained = json.loads((out / "config.json").read_text())["trained"]
    assert trained["target"] == target.name
    assert trained["held_out"] == curve
    assert trained["settings"]["kind"] == kind

    # What it says of itself is what it does.
    text = train_tokenizer().encode(TEXT).ids
    prompts = [(1, *text[i * 20 : i * 20 + 6]) for i in range(16)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(model=str(target), drafter=("ngram", f"mine={out}"), adaptive_drafts=False, num_draft_tokens=3) as llm:
        plain = llm.generate(prompts, params, speculation="off")
        drafted = llm.generate(prompts, params, speculation="mine")
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    stats = [each.stats for each in drafted if each.stats is not None]
    rate = sum(each.accepted_tokens for each in stats) / sum(each.drafted_tokens for each in stats)
    assert rate > 0.5 * last[0]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_an_interrupted_run_goes_on_to_the_same_weights(kind: Any, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    settings = replace(SMALL, steps=40, tokens=4_000, kind=kind)
    whole = run(tiny("llama"), tmp_path / "whole", settings)

    def interrupt(progress: loop.TrainingProgress) -> None:
        if progress.step == 27:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tiny("llama"), tmp_path / "broken", settings, interrupt)
    assert run(tiny("llama"), tmp_path / "broken", settings) == whole
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "broken"))
    assert one.read_bytes() == other.read_bytes()


def test_a_folder_holds_one_run(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    settings = replace(SMALL, steps=1, tokens=500)
    run(tiny("llama"), tmp_path, settings)
    with pytest.raises(ConfigError, match="seed 0, not 1"):
        run(tiny("llama"), tmp_path, replace(settings, seed=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unroll": 0}, "unroll is 0"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"feature_layers": (0, 1)}, "feature_layers is 0, 1"),
        ({"feature_layers": (0, 1, 3)}, "three numbers from 0 to 2"),
        ({"kind": "draft-model", "hidden_size": 17}, "hidden_size is 17"),
        ({"kind": "dflash", "feature_layers": (0, 1, 2, 3)}, "must be numbers from 0 to 2"),
        ({"kind": "dflash", "block_size": 1}, "block_size is 1"),
        ({"kind": "dflash", "decay": 0.0}, "decay is 0"),
        ({"objective": "ce"}, "that is for dflash"),
    ],
)
def test_settings_that_do_not_go_with_the_target(
    change: dict[str, Any], said: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tiny("llama"), tmp_path, replace(SMALL, **change))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_leads_to_the_target(objective: Any) -> None:
    """With room enough for it, what makes the loss smallest is the target's distribution: then all is accepted."""
    generator = torch.Generator().manual_seed(0)
    target = torch.softmax(2 * torch.randn(5, 12, generator=generator), dim=1)
    logits = torch.randn(5, 12, generator=generator).requires_grad_()
    times = 400 if objective in ("ce", "ce-tv") else 1  # these learn from what the target says: each token as often
    quantiles = (torch.arange(times) + 0.5) / times
    said = torch.searchsorted(target.cumsum(1), quantiles.expand(5, -1).contiguous()).clamp(max=11).flatten()
    optimizer = torch.optim.Adam([logits], lr=0.05)

    def acceptance() -> float:
        return float(torch.minimum(logits.detach().softmax(1), target).sum(1).mean())

    before = acceptance()
    for _ in range(600):
        rows, wanted = (each.repeat_interleave(times, 0) for each in (logits, target))
        loss = draft_loss(rows, wanted, objective, said=said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.8
    assert acceptance() > 0.97


def test_a_weighted_loss_is_that_of_the_rows_that_weigh() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.softmax(torch.randn(6, 12, generator=generator), dim=1)
    logits, said = torch.randn(6, 12, generator=generator), torch.tensor([3, -1, 0, 5, 5, 11])
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    kept = weights.bool()
    for objective in OBJECTIVES:
        part = draft_loss(logits[kept], target[kept], objective, said=said[kept])
        torch.testing.assert_close(draft_loss(logits, target, objective, weights, said), part)
        assert not torch.isclose(draft_loss(logits, target, objective, said=said), part)


def test_tally_counts_chains() -> None:
    tally = Tally.empty(2)
    tally.add(torch.tensor([[True, True, False], [True, False, True]]))
    assert tally.rates() == [2 / 3, 1 / 2]
    assert tally.accepted_length() == 1 + 3 / 3


def test_text_store(tmp_path: Path) -> None:
    store = TextStore(tmp_path / "text")
    conversations = [Conversation((1, 2, 3, 3), 2), Conversation((4, 5), 1)]
    store.write(0, conversations)
    store.write(1, [Conversation((7, 3, 3), 1)])
    again = TextStore(tmp_path / "text")
    assert (again.shards, again.token_count()) == (2, 9)
    assert list(again) == [*conversations, Conversation((7, 3, 3), 1)]
    ids, share = frequent_tokens(again, 10, 2, always=(9,))
    assert ids.tolist() == [3, 9]
    assert share == pytest.approx(4 / 5)


def test_quantized_rows() -> None:
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    values, scale = int8.quantize(weight)
    assert values.abs().amax(1).eq(127).all()
    assert (values * scale - weight).abs().le(scale * 0.5001).all()
