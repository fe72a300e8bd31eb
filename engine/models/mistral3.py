"""Mistral Small 3.1 and 3.2, the text part: a Mistral beside the part that reads images, which is left out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pilotfish.checkpoints.values import Values
from pilotfish.engine.models import family, llama
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.family import Family

_DEFAULTS: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
"""Of a text_config; published files leave out some of these."""
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def read_hf(values: Values) -> ModelConfig:
    inner = values.within("text_config").raw
    outer = {name: value for name in ("dtype", "torch_dtype") if (value := values.get(name)) is not None}
    text = Values(values.path, _DEFAULTS | outer | {name: value for name, value in inner.items() if value is not None})
    if (kind := text.get("model_type")) != "mistral":
        raise values.error(f"text_config.model_type is {kind!r}, but must be 'mistral'")
    return replace(llama.read_hf(text), architecture="mistral3")


def declared_name(stored: str) -> str | None:
    """See `Family.declared_name`."""
    if _VISION.match(stored):
        return None
    name = stored.removeprefix("language_model.")
    return family.declared_name(name.replace("model.language_model.", "model.", 1))


FAMILY = Family(
    models="Mistral Small 3.1, 3.2, text",
    model_types=("mistral3",),
    gguf_architectures=(),  # "llama" in this format
    read_hf=read_hf,
    tensors=llama.tensors,
    declared_name=declared_name,
    layer=llama.layer,
)
