"""BlockStudent: a block drafter that learns from a target; its initial weights, its loss and its export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.engine.models.config import DFlashConfig, ModelConfig
from pilotfish.engine.weights import int8
from pilotfish.tools.checkpoint import config_of, write_model
from pilotfish.tools.training.batches import Batch
from pilotfish.tools.training.block import BlockDraft
from pilotfish.tools.training.dspark import DSparkDraft
from pilotfish.tools.training.layer import stored_name
from pilotfish.tools.training.losses import draft_loss
from pilotfish.tools.training.settings import Objective
from pilotfish.tools.training.student import Tally, Teacher

HELD_OUT_BLOCKS = 16
"""Blocks of a conversation that acceptance is measured on."""


class BlockStudent(nn.Module):
    """`blocks`: blocks that are drawn of each conversation. `decay`: a position's loss weighs exp(-1 / decay) as much
    as that of the position before, since it is reached less often."""

    def __init__(self, config: DFlashConfig, teacher: Teacher, max_position: int, blocks: int, decay: float) -> None:
        super().__init__()
        self.config, self.teacher, self.steps = config, teacher, config.length
        self._blocks = blocks
        self.draft = BlockDraft(config, teacher.embedding, max_position)
        self.heads = DSparkDraft(config) if config.rank else None
        self._weights = torch.exp(-torch.arange(config.length) / decay)
        columns = torch.full((config.decoder.vocab_size,), -1)
        columns[teacher.target_ids] = torch.arange(len(teacher.target_ids))
        self._columns = columns  # of the draft's vocabulary, by the target's ids; -1: it has no such token

    @torch.no_grad()
    def start_from(self, target: Mapping[str, torch.Tensor], target_config: ModelConfig) -> None:
        """Initialize from the target's last layers and head, whose keys and values begin as those of the last of the
        features. target: its tensors by their Hugging Face names."""
        draft, decoder = self.draft, self.config.decoder
        hidden, layers = decoder.hidden_size, len(self.config.feature_layers)
        draft.fc.mul_(0.1)
        draft.fc[:, (layers - 1) * hidden :] += torch.eye(hidden)
        for i, layer in enumerate(draft.layers):
            prefix = f"model.layers.{target_config.num_layers - decoder.num_layers + i}."
            for name, own in layer.named_parameters():
                stored = target.get(prefix + stored_name(name))
                if name.endswith("layernorm") and target_config.sandwich_norms:
                    continue
                if stored is not None and stored.shape == own.shape:
                    own.copy_(stored)
        draft.norm.copy_(self.teacher.norm)
        draft.lm_head.copy_(self.teacher.head)

    def loss(self, batch: Batch, objective: Objective) -> torch.Tensor:
        anchors, good = self._drawn(batch, self._blocks, batch.seed)
        hidden = self.draft(batch.features, batch.tokens, anchors)
        at = good.nonzero()  # (rows, 3): conversation, block, position
        rows, following = at[:, 0], anchors[at[:, 0], at[:, 1]] + at[:, 2]
        target = self.teacher.distribution(batch.final[rows, following], batch.normalizer[rows, following])
        logits = self.draft.logits(hidden[good]).float()
        weights = self._weights.to(logits.device)[at[:, 2]]
        said = self._columns.to(logits.device)[batch.tokens[rows, following + 1]]
        if self.heads is None:
            return draft_loss(logits, target, objective, weights, said)
        bias, confidence = self.heads(hidden, self._before(batch, anchors), good)
        logits = logits + bias.float()
        accepted = torch.minimum(torch.softmax(logits.detach(), dim=1), target).sum(1)
        errors = F.binary_cross_entropy_with_logits(confidence, accepted, reduction="none")
        confident = (errors * weights).sum() / weights.sum().clamp(min=1e-6)
        return draft_loss(logits, target, objective, weights, said) + confident

    @torch.no_grad()
    def tally(self, batch: Batch, tally: Tally) -> None:
        anchors, good = self._drawn(batch, HELD_OUT_BLOCKS, 0)
        whole = good.all(2)  # (batch, blocks)
        hidden = self.draft(batch.features, batch.tokens, anchors)
        logits = self.draft.logits(hidden[whole].flatten(0, 1))
        if self.heads is not None:
            # The text's tokens: a chain that is still accepted has drafted these, if the text is greedy.
            bias, _ = self.heads(hidden, self._before(batch, anchors), whole.unsqueeze(2).expand(good.shape))
            logits = logits + bias
        ids = self.teacher.target_ids.to(hidden.device)
        drafted = ids[logits.argmax(1)].view(-1, self.steps)
        following = self._positions(batch, anchors)
        wanted = batch.likeliest.gather(1, following.flatten(1)).view(following.shape)[whole]
        tally.add((drafted == wanted).T.cpu())

    def _positions(self, batch: Batch, anchors: torch.Tensor) -> torch.Tensor:
        """Return the position before each that is predicted, (batch, blocks, config.length) int64; the last position
        for those beyond the text."""
        following = anchors.unsqueeze(2) + torch.arange(self.config.length, device=anchors.device)
        return following.clamp(max=batch.tokens.shape[1] - 1)

    def _before(self, batch: Batch, anchors: torch.Tensor) -> torch.Tensor:
        """Return the text's token there."""
        following = self._positions(batch, anchors)
        return batch.tokens.gather(1, following.flatten(1)).view(following.shape)

    def _drawn(self, batch: Batch, blocks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw blocks of each conversation: their anchors, (batch, blocks) int64, tokens of the answer, and which of
        their rows predict tokens of it, (batch, blocks, config.length) bool."""
        ends = F.pad(batch.answers, (0, self.config.length))
        usable = ends[:, 1 : batch.answers.shape[1] + 1] & batch.answers
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(usable.shape, generator=generator).to(usable.device).masked_fill(~usable, -1.0)
        anchors = order.topk(min(blocks, usable.shape[1]), dim=1).indices.sort(1).values
        following = anchors.unsqueeze(2) + 1 + torch.arange(self.config.length, device=anchors.device)
        good = ends.gather(1, following.flatten(1)).view(following.shape)
        return anchors, good & usable.gather(1, anchors).unsqueeze(2)

    def export(self, folder: Path, trained: dict[str, Any]) -> None:
        """Write speculators' public layout, matrices in int8 with a scale a row (see `models.head_files`)."""
        tensors: dict[str, torch.Tensor] = {}
        named = [(f"{name}.weight", weight) for name, weight in self.draft.named_parameters() if "." not in name]
        for i, layer in enumerate(self.draft.layers):
            named += [(f"layers.{i}.{stored_name(name)}", weight) for name, weight in layer.named_parameters()]
        if self.heads is not None:
            named += self.heads.named_parameters()
        for stored, weight in named:
            if weight.dim() == 1 or len(weight) == 1:
                tensors[stored] = weight.detach().half().cpu()
            else:
                values, scale = int8.quantize(weight.detach().cpu())
                tensors[stored], tensors[f"{stored}_scale"] = values, scale.flatten()
        ids = self.teacher.target_ids.cpu()
        tensors["d2t"] = (ids - torch.arange(len(ids))).int()
        write_model(folder, self._config_json(trained), tensors)

    def _config_json(self, trained: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        layers = config_of(config.decoder) | {"model_type": "qwen3", "tie_word_embeddings": False}
        del layers["dtype"], layers["eos_token_id"]  # tensors have several dtypes, and a drafter ends no text
        kind, heads = "DFlash", {}
        if config.rank:
            kind = "DSpark"
            heads = {"markov_rank": config.rank, "markov_head_type": config.sequential, "enable_confidence_head": True}
            heads["confidence_head_with_markov"] = True
        return {
            "architectures": [f"{kind}Speculator"],
            "speculators_model_type": kind.lower(),
            "speculators_config": {"algorithm": kind.lower(), "verifier": {"name_or_path": trained["target"]}},
            "transformer_layer_config": layers,
            "draft_vocab_size": config.draft_vocab_size,
            "target_hidden_size": config.target_hidden_size,
            "aux_hidden_state_layer_ids": list(config.feature_layers),
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "sample_from_anchor": config.first_drafts,
            **heads,
            "trained": trained,
        }
