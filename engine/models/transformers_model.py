"""TransformersModel: a decoder of the transformers package, computed by its own code, on the engine's paged KV cache.

Its attention goes through transformers' attention interface to the engine's attention backend. It is slower than a
model that the engine computes itself, runs on one rank, and gives no hidden states to drafters that read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from pilotfish.engine.layers.attention.backend import AttentionBackend, AttentionBatch, AttentionParams, LayerCache
from pilotfish.engine.layers.attention.cache import allocate_paged
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.models.transformers_config import why_not
from pilotfish.errors import ModelError

NAME = "pilotfish"
"""The engine's attention in transformers' interface."""
TRIED = 24
"""Tokens of the text with which a model is tried at loading, in two pieces."""
CLOSE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""By how much the logits of that text may differ, relative to their deviation, from those with transformers' cache."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a layer's attention is called with."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


class TransformersModel:
    """Takes the place of a `DecoderModel`. `config` must have the sizes that transformers' configuration names; those
    of the KV cache are found by a trial. Raises ModelError for a model that cannot be computed this way."""

    def __init__(
        self,
        config: ModelConfig,
        model: PreTrainedModel,
        attention: AttentionBackend,
        max_positions: int,
        device: torch.device,
    ) -> None:
        self.comm: Communicator = ALONE
        model.to(device=device)  # type: ignore[call-arg]
        self._model, self._attention, self._device = model.eval(), attention, device
        config = replace(config, parameters=sum(each.numel() for each in model.parameters()))
        self._pass: tuple[AttentionBatch, list[LayerCache]] | None = None
        self._seen: dict[int, _Shape] = {}
        for module in model.modules():
            module.pilotfish = self  # type: ignore[assignment]
        AttentionInterface.register(NAME, _attend)
        _fix_ropes(model, max_positions)
        model.set_attn_implementation("eager")  # torch's own attention caps no scores
        wanted = self._own_logits(config)
        model.set_attn_implementation(NAME)
        self._base = model.base_model
        setattr(model, model.base_model_prefix, _Given())
        self.config = self._tried(config, wanted)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: list[LayerCache],
        tap: FeatureTap | None = None,
    ) -> torch.Tensor:
        """See `DecoderModel.forward`; the hidden states are those after the final norm."""
        assert tap is None, "a model of transformers gives no hidden states"
        self._pass = batch, caches
        try:
            found = self._base(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
        finally:
            self._pass = None
        hidden: torch.Tensor = found.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `DecoderModel.logits`: the model's own, with whatever it does to them behind its head."""
        logits: torch.Tensor = self._model(inputs_embeds=hidden[None]).logits[0]
        return logits

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # (1, heads, rows, key_dim)
        key: torch.Tensor,  # (1, kv_heads, rows, key_dim)
        value: torch.Tensor,  # (1, kv_heads, rows, value_dim)
        params: AttentionParams,
    ) -> torch.Tensor:
        """Attention of one layer: (1, rows, heads, value_dim)."""
        assert self._pass is not None
        batch, caches = self._pass
        rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        heads, size = query.shape[1], value.shape[3]
        self._seen[layer] = _Shape(heads, key.shape[1], key.shape[3], size)
        if not caches:  # the first trial, which only looks
            return rows[2].new_zeros(1, len(rows[2]), heads, size)
        width = self.config.head_dim  # heads whose values are narrower than their keys are padded
        q, k, v = (F.pad(each, (0, width - each.shape[2])).contiguous() for each in rows)
        out = self._attention.attend(q, k, v, caches[layer], batch, params)
        return out.view(1, -1, heads, width)[..., :size]

    def _own_logits(self, config: ModelConfig) -> torch.Tensor:
        """Logits of the trial's text, by transformers' own attention."""
        tokens = torch.tensor([_text(config)], device=self._device)
        found: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits[0]
        return found

    def _tried(self, config: ModelConfig, wanted: torch.Tensor) -> ModelConfig:
        """The config with the sizes of the cache. Raises ModelError unless the engine's attention gives the logits
        `wanted`."""
        tokens = _text(config)
        self._run(tokens, 0, [])
        missing = [layer for layer in range(config.num_layers) if layer not in self._seen]
        if missing:
            raise ModelError(
                why_not(
                    config.architecture, f"the attention of {_listed(missing)} does not use its attention interface"
                )
            )
        if len({seen.kv_heads for seen in self._seen.values()}) > 1:
            raise ModelError(why_not(config.architecture, "its layers have different numbers of key-value heads"))
        first = self._seen[0]
        head_dim = max(max(seen.key_dim, seen.value_dim) for seen in self._seen.values())
        self.config = config = replace(config, num_heads=first.heads, num_kv_heads=first.kv_heads, head_dim=head_dim)
        dtype, keep = wanted.dtype, self._attention
        self._attention = TorchAttention()
        try:
            caches = [
                allocate_paged(2, TRIED, first.kv_heads, head_dim, dtype, self._device)
                for _ in range(config.num_layers)
            ]
            found = torch.cat([self._run(tokens[:-3], 0, caches), self._run(tokens[-3:], TRIED - 3, caches)])
        finally:
            self._attention = keep
        difference = float((found - wanted).float().abs().max() / wanted.float().std())
        if not difference <= CLOSE[dtype]:
            raise ModelError(
                why_not(
                    config.architecture,
                    f"with the engine's cache its logits are others (by {difference:.2g} of their deviation): its "
                    "attention needs more than keys and values",
                )
            )
        return config

    def _run(self, tokens: Sequence[int], start: int, caches: list[LayerCache]) -> torch.Tensor:
        """Logits of tokens at `start` of a text that lies in block 1."""
        count, context = len(tokens), start + len(tokens)

        def made(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        batch = AttentionBatch(
            cu_query_lens=made(0, count),
            context_lens=made(context),
            cu_context_lens=made(0, context),
            block_tables=made(1)[None],
            slots=torch.arange(start, context, device=self._device) + TRIED,
            query_lens=[count],
            contexts=[context],
            block_size=TRIED,
        )
        positions = torch.arange(start, context, device=self._device)
        return self.logits(self.forward(made(*tokens, dtype=torch.int64), positions, batch, caches))


class _Hidden(BaseModelOutputWithPast):
    """What layers give out: hidden states, and of all else that a model may look at, nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands for the layers while transformers computes logits: returns the hidden states that it is given."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' interface."""
    params = AttentionParams(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling), sliding_window, softcap, s_aux
    )
    return module.pilotfish.attend(module.layer_idx, query, key, value, params), None


def _fix_ropes(model: PreTrainedModel, max_positions: int) -> None:
    """Settle rotary frequencies that follow the length of the text at hand on those of the longest one, so that no text
    depends on another of its batch (see `engine.models.rope`)."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.items() if isinstance(kinds, dict) else [(None, kinds)]
        for layer_type, kind in named:
            if kind not in ("dynamic", "longrope"):
                continue
            at = torch.tensor([[max_positions - 1]], device=next(model.parameters()).device)
            module(torch.zeros(1, device=at.device), at, **({"layer_type": layer_type} if layer_type else {}))
        if isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "settled")  # type: ignore[assignment]
        elif kinds is not None:
            module.rope_type = "settled"  # type: ignore[assignment]


def load(folder: Path, config: ModelConfig, dtype: torch.dtype, dummy: bool) -> PreTrainedModel:
    """The model in a Hugging Face folder; with random weights if `dummy`. Raises ModelError."""
    try:
        theirs = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if dummy:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype)
            return model
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"transformers cannot load {folder}: {error}") from error


def _text(config: ModelConfig) -> list[int]:
    """Token ids without meaning."""
    return [(7919 * i + 13) % config.vocab_size for i in range(TRIED)]


def _listed(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:5]))
    return f"layer{'s' if len(layers) > 1 else ''} {shown}" + (" and more" if len(layers) > 5 else "")
