"""Small random models of every kind the engine knows, made by transformers itself, each with a small tokenizer.

Random weights as transformers initialises them give logits that are nearly flat and biases that are zero; these are
drawn so that logits spread by several units, attention is sharp and every parameter matters.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB_SIZE = 512
END_OFTEXT, IM_START, IM_END = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": IM_START,
    "eos_token_id": IM_END,
}
# The original context is so short that all three of the scaling's ranges are met by a prompt of 40 tokens.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 1.4, 3.0, 9.0],
    "partial_rotary_factor": 0.5,
    "attention_factor": 1.1,
}
_KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE}),  # Llama 3.1
    "llama-tied": (  # Llama 3.2, SmolLM2
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": _LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    ),
    "llama2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "num_hidden_layers": 3}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "hidden_size": 96,  # its root is not a round number
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 8,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "hidden_size": 96,
            "sliding_window": 8,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": True,
            "attn_implementation": "eager",  # torch's own attention caps no scores
        },
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 1.5},
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    # The context is longer than the original one, so that the long factors apply.
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "smollm3": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"rope_parameters": _YARN, "num_hidden_layers": 4, "pad_token_id": None},
    ),
}
KINDS = tuple(_KINDS)
_EXPERT_KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 2.0,
            "attn_implementation": "eager",
            "rope_parameters": _YARN | {"truncate": False},
            "pad_token_id": None,
        },
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 8, "num_experts_per_tok": 3, "pad_token_id": None}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}
EXPERT_KINDS = tuple(_EXPERT_KINDS)
UNFUSED = ("gemma2", "granite", "olmo2")
"""Kinds that the fused decoder does not know."""


def make_tiny(kind: str, path: Path, *, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    """Save a random model of `kind` and its tokenizer in the folder `path`, and return it.

    `overrides` are fields of transformers' configuration. The same seed and shape give the same weights; all models
    share one tokenizer, so any of them can draft for any other.
    """
    build_model(kind, seed=seed, **overrides).save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(path)
    return path


def build_model(kind: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The model of `make_tiny` itself: float32, on the CPU, in evaluation mode."""
    config_class, model_class, own = (_KINDS | _EXPERT_KINDS)[kind]
    with torch.random.fork_rng(devices=[]):  # what transformers draws is overwritten, and must not disturb a test
        model = model_class(config_class(**(_SHAPE | own | overrides))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(_gemma3_norm(name, noise) if kind in ("gemma2", "gemma3") else 1 + 0.2 * noise)
            elif name.endswith("bias") or "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def declared(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's weights under the names that families declare; a tied head is not among them."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = [count * head_dim for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    for name in list(weights):
        for whole, parts, sizes in (("qkv", "qkv", heads), ("gate_up", ("gate", "up"), [config.intermediate_size] * 2)):
            if f"{whole}_proj" in name:
                tensors = weights.pop(name).split(sizes)
                names = (name.replace(whole, part) for part in parts)
                weights |= {each: tensor.clone() for each, tensor in zip(names, tensors, strict=True)}
    return weights


def _gemma3_norm(name: str, noise: torch.Tensor) -> torch.Tensor:
    """One less than what the norm multiplies by, in steps that survive adding one and taking it off again. The norms
    behind a layer's parts are large: the embedding, which is scaled up, would drown the layers otherwise."""
    after = ".post_attention_" in name or ".post_feedforward_" in name
    return ((7.0 if after else 0.0) + 0.2 * noise).mul(1024).round() / 1024


@cache
def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with exactly VOCAB_SIZE tokens: any text can be encoded, and characters may be split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


TEXT = """
system user assistant. You are a helpful assistant. Answer the question in one sentence.
The pilotfish swims ahead of the shark and keeps it company; in return the shark keeps other hunters away from it.
A small model swims ahead of a large one: it drafts a few tokens, the large one verifies them all in a single step, and
whoever is waiting for the text reads it sooner. When the draft is wrong nothing is lost but the time it took.
What is the capital of France? The capital of France is Paris. What is two plus three? Two plus three is five.
def add(first, second):
    \"\"\"Return the sum of two numbers.\"\"\"
    return first + second
for i in range(10):
    print(i, add(i, 1))
Once upon a time there was a little fish that lived near the surface of the warm sea. Every morning it looked for its
friend, and every evening it told the others where they had been: past the rocks, under the bridge, along the harbour
wall, and out to where the water is deep and dark and nothing moves but the light.
"""
