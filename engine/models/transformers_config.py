"""The shape of a model that the transformers package computes, and what to say of one that cannot be computed so."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilotfish.checkpoints.huggingface import eos_token_ids, read_json
from pilotfish.engine.models.config import ModelConfig, RopeConfig
from pilotfish.engine.models.plausible import check_config, readable
from pilotfish.engine.models.registry import FAMILIES
from pilotfish.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}
"""Kinds of layers whose state is keys and values alone."""


def read_config(folder: Path) -> ModelConfig:
    """The shape of the decoder in a Hugging Face folder, as transformers reads it. Heads are what its configuration
    names; `TransformersModel` corrects them. Raises ModelError, which says what is missing."""
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{folder / 'config.json'}: model_type is {kind!r:.200}, but must be a name")
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # it holds the file's values against types with errors of any kind
        if _class_of(kind) is None:
            raise ModelError(why_not(kind, f"the installed transformers ({_version()}) does not have it")) from error
        raise ModelError(f"transformers cannot read {folder}: {error}") from error
    with readable(folder / "config.json"):
        reason = _missing(kind, config)
    if reason:
        raise ModelError(why_not(kind, reason))
    if raw.get("quantization_config"):
        raise ModelError(why_not(kind, "its weights are quantized, which only the engine's own families read"))
    with readable(folder / "config.json"):
        return check_config(folder / "config.json", _config(folder, kind, config))


def _config(folder: Path, kind: str, config: PreTrainedConfig) -> ModelConfig:
    heads = config.num_attention_heads
    return ModelConfig(
        architecture=kind,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position=config.max_position_embeddings,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        tie_embeddings=bool(config.tie_word_embeddings),
        attention_softcap=getattr(config, "attn_logit_softcapping", None),
        eos_token_ids=eos_token_ids(folder) or _ids(config.eos_token_id),
        bos_token_id=config.bos_token_id,
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32",
    )


def why_not(kind: str, reason: str) -> str:
    """What to say of an architecture that cannot be computed: its name, what is missing, and the nearest that works."""
    near = nearest(kind)
    return f"the architecture {kind!r} cannot be served, not by transformers' code either: {reason}; {near}"


def nearest(kind: str) -> str:
    """The end of a sentence: which architectures of a similar name can be served."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = [name for family in FAMILIES for name in family.model_types]
    close = get_close_matches(kind, [*own, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES], n=8, cutoff=0.5)
    for name in close:
        if name != kind and (name in own or _interface(_class_of(name))):
            return f"the nearest that can is {name!r}"
    return f"those that the engine computes itself are {', '.join(own)}"


def _missing(kind: Any, config: PreTrainedConfig) -> str | None:
    """What a model of transformers lacks, or None."""
    found = _class_of(kind)
    if found is None:
        return "it is not a decoder that writes text (transformers' AutoModelForCausalLM does not know it)"
    if not _interface(found):
        return "its attention does not go through transformers' attention interface"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if others or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(map(repr, others)) or "chunked attention"
        return f"layers of kind {kinds} keep another state than the paged cache"
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_decoder", None) is False:
        return "its tokens see those after them"
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    unnamed = [name for name in sizes if not isinstance(getattr(config, name, None), int)]
    return f"its configuration has no {', '.join(unnamed)}" if unnamed else None


def _class_of(kind: Any) -> Any:
    """transformers' class of a decoder, or None."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    return getattr(transformers, name, None) if isinstance(name, str) else None


def _interface(found: Any) -> bool:
    return bool(found is not None and found.is_backend_compatible())


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _version() -> str:
    import transformers

    return str(transformers.__version__)
