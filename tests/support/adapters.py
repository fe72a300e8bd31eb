"""Random low-rank adapters in PEFT's form, and models that have them merged into their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

ALL = r".*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj"


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    *,
    seed: int,
    rank: int = 4,
    targets: str = ALL,
    ranks: Mapping[str, int] | None = None,
    strength: float = 0.7,
    **config: Any,
) -> Path:
    """Write an adapter of the linears whose names match `targets`, and merge it into `model`. `ranks` are PEFT's
    rank_pattern; `config` are more fields of adapter_config.json."""
    fields: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "use_dora": False}
    fields |= {"target_modules": targets, "rank_pattern": dict(ranks or {}), "alpha_pattern": {}} | config
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not re.fullmatch(targets, name):
            continue
        last = name.rpartition(".")[2]
        own, alpha = fields["rank_pattern"].get(last, rank), fields["alpha_pattern"].get(last, fields["lora_alpha"])
        rows, columns = module.weight.shape
        scale = alpha / (own**0.5 if config.get("use_rslora") else own)
        a = torch.randn(own, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, own, generator=generator) * strength / scale * own**-0.5
        tensors |= {f"base_model.model.{name}.lora_{letter}.weight": each for letter, each in (("A", a), ("B", b))}
        with torch.no_grad():
            module.weight += scale * b @ a
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
