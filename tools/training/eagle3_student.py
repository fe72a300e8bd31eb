"""Eagle3Student: an EAGLE-3 head that learns from a target; its initial weights, its loss and its export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pilotfish.engine.models.config import Eagle3Config, ModelConfig
from pilotfish.engine.weights import int8
from pilotfish.tools.checkpoint import config_of, write_model
from pilotfish.tools.training.batches import Batch
from pilotfish.tools.training.eagle3 import Eagle3Draft
from pilotfish.tools.training.layer import MATRICES, stored_name
from pilotfish.tools.training.losses import draft_loss
from pilotfish.tools.training.settings import Objective
from pilotfish.tools.training.student import Tally, Teacher

STEP_WEIGHT = 0.8
"""Weight of a drafted token's loss relative to the token before it, since it is reached less often (EAGLE-3)."""


class Eagle3Student(nn.Module):
    def __init__(self, config: Eagle3Config, teacher: Teacher, max_position: int, steps: int) -> None:
        super().__init__()
        self.config, self.teacher, self.steps = config, teacher, steps
        self.draft = Eagle3Draft(config, teacher.embedding, max_position)

    @torch.no_grad()
    def start_from(self, target: Mapping[str, torch.Tensor], target_config: ModelConfig) -> None:
        """Initialize from the target's last layer, applied to the last of the fused features and to no token: what is
        left to learn is the effect of one more token. target: its tensors by their Hugging Face names."""
        draft, decoder = self.draft, self.config.decoder
        hidden, layers = decoder.hidden_size, len(self.config.feature_layers)
        draft.fc.mul_(0.1)
        draft.fc[:, (layers - 1) * hidden :] += torch.eye(hidden)
        prefix = f"model.layers.{target_config.num_layers - 1}."
        if (decoder.num_heads, decoder.head_dim) == (target_config.num_heads, target_config.head_dim):
            group = decoder.num_kv_heads // target_config.num_kv_heads
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = target[prefix + stored_name(name)]
                if name != "q_proj" and group > 1:  # repeated to as many heads as the draft has
                    heads = weight.view(target_config.num_kv_heads, decoder.head_dim, hidden)
                    weight = heads.repeat_interleave(group, dim=0).flatten(0, 1)
                own = draft.get_parameter(name)
                own[:, :hidden] *= 0.3
                own[:, hidden:] = weight
            draft.get_parameter("o_proj").copy_(target[prefix + stored_name("o_proj")])
        gate, up, down = (target[prefix + stored_name(name)] for name in ("gate_proj", "up_proj", "down_proj"))
        if decoder.intermediate_size <= len(gate):  # the units with the largest norms
            kept = (up.norm(dim=1) * down.norm(dim=0)).topk(decoder.intermediate_size).indices.sort().values
            for name, weight in (("gate_proj", gate[kept]), ("up_proj", up[kept]), ("down_proj", down[:, kept])):
                draft.get_parameter(name).copy_(weight)
        if not target_config.sandwich_norms:
            draft.hidden_norm.copy_(target[f"{prefix}input_layernorm.weight"])
            draft.get_parameter("post_attention_layernorm").copy_(target[f"{prefix}post_attention_layernorm.weight"])
        draft.norm.copy_(self.teacher.norm)
        draft.lm_head.copy_(self.teacher.head)

    def loss(self, batch: Batch, objective: Objective) -> torch.Tensor:
        rows = _anchors(batch, self.steps)
        total = batch.features.new_zeros(())
        weights = 0.0
        for step, hidden in enumerate(self.draft.unroll(batch.features, batch.tokens, self.steps)):
            positions = rows + step + 1
            final, normalizer = batch.final.flatten(0, 1)[positions], batch.normalizer.flatten()[positions]
            target = self.teacher.distribution(final, normalizer)
            logits = self.draft.logits(hidden.flatten(0, 1)[rows]).float()
            weight = STEP_WEIGHT**step
            total = total + weight * draft_loss(logits, target, objective)
            weights += weight
        return total / weights

    @torch.no_grad()
    def tally(self, batch: Batch, tally: Tally) -> None:
        rows = _anchors(batch, self.steps)
        correct = []
        for step, hidden in enumerate(self.draft.unroll(batch.features, batch.tokens, self.steps)):
            drafted = self.teacher.target_ids[self.draft.logits(hidden.flatten(0, 1)[rows]).argmax(1)]
            # `unroll` reads the text's tokens; a chain that is still accepted has drafted these, if the text is greedy.
            correct.append(drafted == batch.likeliest.flatten()[rows + step + 1])
        tally.add(torch.stack(correct))

    def export(self, folder: Path, trained: dict[str, Any]) -> None:
        """Write the public SafeAILab layout, matrices in int8 with a scale a row (see `models.eagle3_checkpoint`)."""
        tensors = {}
        for name, weight in self.draft.named_parameters():
            stored = name if name in ("fc", "norm", "lm_head") else f"midlayer.{MATRICES.get(name, '')}{name}"
            if weight.dim() == 1:
                tensors[f"{stored}.weight"] = weight.detach().half()
            else:
                values, scale = int8.quantize(weight.detach())
                tensors[f"{stored}.weight"], tensors[f"{stored}.weight_scale"] = values, scale.flatten()
        ids = self.teacher.target_ids
        tensors["d2t"] = (ids - torch.arange(len(ids))).int()
        own = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": self.config.draft_vocab_size,
            "target_hidden_size": self.config.target_hidden_size,
            "tie_word_embeddings": False,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.config.feature_layers)},
            "trained": trained,
        }
        config = config_of(self.config.decoder)
        del config["dtype"], config["eos_token_id"]  # tensors have several dtypes, and a head ends no text
        write_model(folder, config | own, tensors)


def _anchors(batch: Batch, steps: int) -> torch.Tensor:
    """Return the rows of the flattened batch whose whole chain predicts tokens of the answer, (anchors,) int64."""
    # Anchor a's step j predicts what follows position a + j + 1.
    length = batch.tokens.shape[1]
    good = torch.ones_like(batch.answers)
    for step in range(1, steps + 1):
        shifted = torch.zeros_like(good)
        shifted[:, : max(0, length - step)] = batch.answers[:, step:]
        good &= shifted
    return good.flatten().nonzero().squeeze(1)
