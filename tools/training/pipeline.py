"""From a target to a trained draft: generate text, extract features, train, export. Every stage can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.build import build
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.platform import thread_count
from pilotfish.engine.llm import LLM
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.engine.models.config import DFlashConfig, Eagle3Config, ModelConfig, RopeConfig
from pilotfish.errors import ConfigError
from pilotfish.tools.training.block_student import BlockStudent
from pilotfish.tools.training.eagle3_student import Eagle3Student
from pilotfish.tools.training.features import PASS_ROWS, FeatureStore, write_features
from pilotfish.tools.training.llama_student import LlamaStudent
from pilotfish.tools.training.loop import TrainingProgress, train
from pilotfish.tools.training.settings import BLOCKS, TrainSettings, objective_of
from pilotfish.tools.training.student import Teacher
from pilotfish.tools.training.text import TextStore
from pilotfish.tools.training.vocabulary import frequent_tokens, rarest_token
from pilotfish.tools.training.write import Frame, answer_prompts, write_text

AnyStudent = Eagle3Student | LlamaStudent | BlockStudent

_OF_THE_TEXT = ("target", "tokens", "turn_tokens", "answer_tokens", "seed")
_OF_THE_LENGTH = ("steps", "epochs")
"""Settings that may be raised after a run, which then continues, at the learning rate of the longer run."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    text: Callable[[int], object]
    """Called with the tokens written so far."""
    features: Callable[[int, int], object]
    """Called with the shards read and their total."""
    loop: Callable[[TrainingProgress], object]


def write_stage(
    config: EngineConfig,
    frame: Frame,
    prompts: Sequence[tuple[int, ...]],
    work: Path,
    settings: TrainSettings,
    on_text: Callable[[int], object],
) -> TextStore:
    """Generate the training text: answers to the user's `prompts`, then conversations that the target makes up."""
    store = TextStore(work / "text")
    if store.token_count() >= settings.tokens:
        on_text(store.token_count())
        return store
    with LLM(config=config, speculation="none") as llm:
        answer_prompts(llm, prompts, store, settings, on_text)
        write_text(llm, frame, store, settings, on_text)
    return store


def train_draft(
    files: ModelFiles,
    config: EngineConfig,
    frame: Frame,
    prompts: Sequence[tuple[int, ...]],
    out: Path,
    work: Path,
    settings: TrainSettings,
    callbacks: Callbacks,
) -> list[dict[str, Any]]:
    """Train a draft for `config.model`, write it to `out`, and return the learning curve.

    `work` keeps the text and the target's features, which other drafts of the same target can use, and the run's
    checkpoint. Raises ConfigError for settings that contradict the target or the content of `work`.
    """
    shape = read_config(files)
    _check(settings, shape)
    run = work / out.resolve().name
    settings = msgspec.structs.replace(settings, objective=objective_of(settings))
    everything = {"target": files.name} | msgspec.structs.asdict(settings)
    _pin(work / "text", {name: everything[name] for name in _OF_THE_TEXT} | {"prompts": len(prompts)})
    _pin(run, {name: value for name, value in everything.items() if name not in _OF_THE_LENGTH})
    text = write_stage(config, frame, prompts, work, settings, callbacks.text)
    layers = _feature_layers(settings, shape)
    store = FeatureStore(work / "features", layers)
    if store.shards < text.shards:
        engine = build(
            EngineConfig(
                model=config.model, num_threads=config.num_threads, max_batch_tokens=PASS_ROWS, drafter=("ngram",)
            ),
            lambda what, share: None,
        )
        write_features(engine, text, store, callbacks.features)
        del engine
    torch.set_num_threads(thread_count(config))
    student, share = _student(files, shape, text, layers, settings)
    seen = sum(len(each.tokens) for each in text)
    steps = settings.steps or max(1, round(seen * settings.epochs / settings.batch_tokens))
    curve = train(student, store, settings, steps, run, callbacks.loop)
    trained = {
        "target": files.name,
        "text": "written by the target itself" + (f", and {len(prompts)} prompts of the user's" if prompts else ""),
        "tokens": seen,
        "draft_vocabulary_covers": round(share, 4),
        "settings": msgspec.structs.asdict(settings) | {"steps": steps},
        "held_out": curve,
    }
    student.export(out, trained)
    return curve


def _check(settings: TrainSettings, shape: ModelConfig) -> None:
    if settings.unroll < 1:
        raise ConfigError(f"unroll is {settings.unroll}, but must be at least 1")
    if settings.draft_vocab_size < 1:
        raise ConfigError(f"draft_vocab_size is {settings.draft_vocab_size}, but must be at least 1")
    layers, blocks = settings.feature_layers, settings.kind in BLOCKS
    if layers and ((len(layers) != 3 and not blocks) or not all(0 <= layer <= shape.num_layers for layer in layers)):
        raise ConfigError(
            f"feature_layers is {', '.join(map(str, layers))}, but must be {'' if blocks else 'three '}numbers from 0 "
            f"to {shape.num_layers}"
        )
    if settings.kind == "dflash" and settings.block_size < 2:
        raise ConfigError(f"block_size is {settings.block_size}, but a block needs a mask, too: at least 2")
    if settings.decay <= 0.0:
        raise ConfigError(f"decay is {settings.decay}, but must be above 0")
    if settings.objective in ("ce", "ce-tv") and not blocks:
        raise ConfigError(f"objective is {settings.objective!r}, but that is for {' and '.join(BLOCKS)}: use lk")
    if settings.hidden_size % shape.head_dim:
        raise ConfigError(
            f"hidden_size is {settings.hidden_size}, but must be a multiple of the target's head_dim, {shape.head_dim}"
        )


def _pin(folder: Path, settings: dict[str, Any]) -> None:
    """Record a folder's settings. Raises ConfigError if it holds the results of other ones."""
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in wanted.items() if known.get(name) != value]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{folder} holds a run with {name} {known.get(name)!r}, not {wanted[name]!r}: "
                "go on with the same settings, or name another folder"
            )
    else:
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _feature_layers(settings: TrainSettings, shape: ModelConfig) -> tuple[int, ...]:
    if settings.kind == "draft-model":
        return ()
    return settings.feature_layers or (shape.num_layers // 3, 2 * shape.num_layers // 3, shape.num_layers)


def _student(
    files: ModelFiles, shape: ModelConfig, text: TextStore, layers: tuple[int, ...], settings: TrainSettings
) -> tuple[AnyStudent, float]:
    """Return the initialized draft, and the share of the text that its vocabulary covers."""
    count = shape.vocab_size if settings.kind == "draft-model" else settings.draft_vocab_size
    ids, share = frequent_tokens(text, shape.vocab_size, count, shape.eos_token_ids)
    weights = dict(iter_weights(files, shape, torch.float32))
    embedding = weights["model.embed_tokens.weight"]
    norm = weights["model.norm.weight"]
    teacher = Teacher(
        embedding=embedding,
        head=weights.get("lm_head.weight", embedding)[ids].clone(),
        norm=1.0 + norm if shape.sandwich_norms else norm,
        eps=shape.rms_norm_eps,
        target_ids=ids,
    )
    torch.manual_seed(settings.seed)
    longest = settings.turn_tokens + settings.answer_tokens + PASS_ROWS
    student: AnyStudent
    if settings.kind in BLOCKS:
        block = _block_config(shape, text, layers, settings, len(ids))
        student = BlockStudent(block, teacher, longest, settings.blocks, settings.decay)
    elif settings.kind == "eagle3":
        decoder = _decoder(shape, shape.hidden_size, 1, settings.intermediate_size, shape.num_heads)
        draft = Eagle3Config(
            decoder=decoder,
            draft_vocab_size=len(ids),
            target_hidden_size=shape.hidden_size,
            feature_layers=layers,
        )
        student = Eagle3Student(draft, teacher, longest, settings.unroll)
    else:
        hidden = settings.hidden_size or shape.hidden_size
        decoder = _decoder(shape, hidden, settings.num_layers, settings.intermediate_size, None)
        student = LlamaStudent(decoder, teacher, longest, settings.unroll)
    student.start_from(weights, shape)
    return student, share


def _block_config(
    shape: ModelConfig, text: TextStore, layers: tuple[int, ...], settings: TrainSettings, draft_vocab_size: int
) -> DFlashConfig:
    decoder = _decoder(shape, shape.hidden_size, settings.num_layers, settings.intermediate_size, None)
    return DFlashConfig(
        decoder=replace(decoder, qk_norm=True),
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=shape.hidden_size,
        feature_layers=layers,
        block_size=settings.block_size,
        mask_token_id=rarest_token(text, shape.vocab_size),
        first_drafts=settings.kind == "dspark",
        sequential=settings.markov_head,
        rank=settings.markov_rank if settings.kind == "dspark" else 0,
        confidence=settings.kind == "dspark",
        confidence_reads_token=settings.kind == "dspark",
    )


def _decoder(shape: ModelConfig, hidden: int, layers: int, inner: int, kv_heads: int | None) -> ModelConfig:
    """Return a plain Llama shape derived from the target's. kv_heads: None for the target's number if it divides the
    heads, else as many as heads."""
    heads = shape.num_heads if hidden == shape.hidden_size else max(1, hidden // shape.head_dim)
    if kv_heads is None:
        kv_heads = shape.num_kv_heads if heads % shape.num_kv_heads == 0 else heads
    return ModelConfig(
        architecture="llama",
        vocab_size=shape.vocab_size,
        hidden_size=hidden,
        intermediate_size=inner or shape.intermediate_size * hidden // shape.hidden_size // 16 * 16,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=shape.head_dim,
        max_position=shape.max_position,
        rms_norm_eps=shape.rms_norm_eps,
        rope=RopeConfig(theta=shape.rope.theta),
        tie_embeddings=True,
        eos_token_ids=shape.eos_token_ids,
    )
