"""The Llama family's decoder: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, told apart by their ModelConfig alone.

(arXiv 2302.13971, 2307.09288, 2407.21783; Qwen2's biases 2407.10671; Qwen3's norms of query and key 2505.09388.)
"""

from __future__ import annotations

import torch

from pilotfish.engine.layers.attention.backend import AttentionParams
from pilotfish.engine.layers.decoder import DecoderLayer, DenseMlp
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.decoder_model import DecoderFamily, LayerWeights


def _layer(
    weights: LayerWeights, config: ModelConfig, attention: AttentionParams, cos_sin: torch.Tensor
) -> DecoderLayer:
    return DecoderLayer(
        input_norm=weights.norm("input_layernorm"),
        qkv=weights.linear("self_attn.qkv_proj"),
        q_norm=weights.norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=weights.norm("self_attn.k_norm") if config.qk_norm else None,
        output=weights.linear("self_attn.o_proj"),
        mlp_norm=weights.norm("post_attention_layernorm"),
        mlp=DenseMlp(weights.linear("mlp.gate_up_proj"), weights.linear("mlp.down_proj"), "silu"),
        cos_sin=cos_sin,
        attention=attention,
    )


LLAMA = DecoderFamily(_layer)
