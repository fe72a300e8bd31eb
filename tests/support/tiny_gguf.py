"""Writes a small Hugging Face model as a GGUF file, with the gguf package's writer, as llama.cpp's converter would."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from tests.support.tiny import CHAT_TEMPLATE, IM_END, IM_START

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_GEMMA_PARTS = _PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OWN_PARTS: dict[str, dict[str, str]] = {
    "gemma2": _GEMMA_PARTS,
    "gemma3": _GEMMA_PARTS,
    "olmo2": _GEMMA_PARTS,
    "gpt-oss": _PARTS | {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"},
    "qwen2moe": _PARTS
    | {f"mlp.shared_expert.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")}
    | {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
    "phi3": _PARTS | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: Kind = Kind.F32,
    *,
    rope_factors: list[float] | None = None,
    without: tuple[str, ...] = (),
    replaced: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    add_bos: bool = False,
) -> Path:
    """Matrices are stored as `kind`, vectors as float32.

    `without` and `replaced` are GGUF names of tensors, `metadata` values added after the architecture's prefix. With a
    `tokenizer` (byte-level BPE) the file has it and the tiny models' chat template, else tokens without meaning.
    """
    config = model.config
    names = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}
    names |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
    arch = names.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    if arch == "gemma3":
        rope = rope["full_attention"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(model))
    writer.add_value_length(head_dim(model))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim(model) * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        # llama.cpp multiplies by its own factor of the scaling.
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / (1 + 0.1 * math.log(rope["factor"])))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        replaced = dict(replaced or {}) | {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], dtype=np.float32)
            for name in ("short", "long")
        }
    if (count := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)) is not None:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if (size := getattr(config, "moe_intermediate_size", None)) is not None:
            writer.add_expert_feed_forward_length(size)
    if arch in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    _add_vocabulary(writer, config.vocab_size, tokenizer, add_bos)
    for name, value in (metadata or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{arch}.{name}", value)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.float().numpy()
        if name.endswith(".sinks"):
            tensors[f"blk.{name.split('.')[2]}.attn_sinks.weight"] = values
            continue
        if ".mlp.experts." in name:
            prefix = f"blk.{name.split('.')[2]}.ffn_"
            end = "bias" if name.endswith("bias") else "weight"
            if arch == "gpt-oss" and end == "weight":
                values = values.swapaxes(1, 2)
            if "down_proj" in name:
                tensors[f"{prefix}down_exps.{end}"] = values
            elif arch == "gpt-oss":  # gate and up by turns
                tensors |= {f"{prefix}gate_exps.{end}": values[:, ::2], f"{prefix}up_exps.{end}": values[:, 1::2]}
            else:
                tensors |= {
                    f"{prefix}{part}_exps.weight": each
                    for part, each in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True)
                }
            continue
        paired = arch in ("llama", "granite", "smollm3")
        if paired and ".q_proj." in name:
            values = interleaved(values, config.num_attention_heads)
        elif paired and ".k_proj." in name:
            values = interleaved(values, config.num_key_value_heads)
        elif arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + 1
        tensors[gguf_name(name, arch)] = values
    if rope_factors is not None:
        tensors["rope_freqs.weight"] = np.array(rope_factors, dtype=np.float32)
    for name, values in (tensors | dict(replaced or {})).items():
        if name in without:
            continue
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, size: int, tokenizer: Tokenizer | None, add_bos: bool) -> None:
    writer.add_bos_token_id(IM_START)
    writer.add_eos_token_id(IM_END)
    writer.add_eot_token_id(3)
    if tokenizer is None:
        writer.add_token_list([f"token {i}" for i in range(size)])
        writer.add_token_types([gguf.TokenType.NORMAL] * size)
        return
    special = tokenizer.get_added_tokens_decoder()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    writer.add_token_list([tokens[i] for i in range(size)])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)


def head_dim(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def gguf_name(name: str, arch: str = "llama") -> str:
    top = {"model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output."}
    for prefix, short in top.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_OWN_PARTS.get(arch, _PARTS)[module]}.{kind}"


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """In each head, row i of the first half is followed by row i of the second half."""
    halves = np.split(values.reshape(heads, -1, *values.shape[1:]), 2, axis=1)
    return np.stack(halves, axis=2).reshape(values.shape)
