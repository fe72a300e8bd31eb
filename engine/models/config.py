"""ModelConfig: a decoder's shape, whichever file format it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pilotfish.engine.weights.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `kind` is Hugging Face's rope_type, of those that `engine.models.rope` knows, or "none"."""

    theta: float = 10000.0
    kind: str = "default"
    share: float = 1.0
    """The part of a head's dimensions that is rotated, from the first on."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    """Positions that the model was trained with before it was scaled."""
    beta_fast: float = 32.0
    """Rotations in the original context from which on YaRN leaves a frequency as it is."""
    beta_slow: float = 1.0
    """Rotations in the original context up to which YaRN divides a frequency by `factor`."""
    truncate: bool = True
    """Whether YaRN rounds these two bounds to whole dimensions, outwards."""
    attention_factor: float = 1.0
    """Factor of cosines and sines."""
    freq_factors: tuple[float, ...] | None = None
    """Divisors of the frequencies: the form that llama3's scaling has in GGUF files, and longrope's for contexts up to
    `original_max_position`."""
    long_factors: tuple[float, ...] | None = None
    """longrope's divisors of the frequencies for longer contexts."""

    def rotated(self, head_dim: int) -> int:
        """Dimensions of a head that are rotated."""
        return int(head_dim * self.share)


NO_ROPE = RopeConfig(kind="none")
"""Queries and keys stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """A mixture of experts in the place of each layer's MLP."""

    count: int
    per_token: int
    """Experts that each token takes."""
    size: int
    """Inner size of an expert."""
    normalized: bool
    """Whether the probabilities of a token's experts are made to sum to 1."""
    shared_size: int = 0
    """Inner size of an expert that every token takes as well; 0: there is none."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a dense MLP all the same."""
    biased: bool = False
    """Whether router and experts have biases."""
    clamp: float | None = None
    """Bound of gate and up before their product, which then is gpt-oss's; None: it is that of SwiGLU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder."""

    architecture: str
    """The name by which `engine.models.registry` finds the family: "llama", "qwen2", "gemma3", ..."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    """Number of keys that a query sees, its own included; None: all."""
    sliding_layers: tuple[bool, ...] = ()
    """Whether each layer has the sliding window; empty: all do, if there is one."""
    local_rope: RopeConfig | None = None
    """Rotary embedding of the layers with a sliding window; None: `rope`."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers without rotary embedding."""
    attention_scale: float | None = None
    """Factor of the scores before the softmax; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores before the softmax become cap * tanh(score / cap); None: they stay as they are."""
    attention_sinks: bool = False
    """Whether each head has a score that takes weight and gives no value."""
    logit_softcap: float | None = None
    """The same of logits."""
    embedding_scale: float = 1.0
    """Factor of token embeddings."""
    residual_scale: float = 1.0
    """Factor of what attention and MLP add to the hidden states."""
    logit_divisor: float = 1.0
    sandwich_norms: bool = False
    """Whether attention and MLP have a norm after them as well."""
    experts: ExpertConfig | None = None
    """None: every layer has a dense MLP."""
    expert_parallel: bool = False
    """Whether tensor-parallel ranks divide the experts among them, rather than each expert."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = "float32"
    """The checkpoint's dtype: "float32", "bfloat16" or "float16"."""
    quantization: Quantization | None = None
    """How the checkpoint is quantized; None: it has plain weights."""
    parameters: int = 0
    """Parameters of a model whose tensors no family declares; 0: they are declared."""

    @property
    def longest(self) -> int:
        """The longest context that may be asked for: dynamic scaling has no end of its own."""
        return int(self.max_position * self.rope.factor) if self.rope.kind == "dynamic" else self.max_position

    def inner_sizes(self) -> dict[str, int]:
        """The inner sizes of its MLPs and experts, by their fields' names."""
        experts = self.experts
        if experts is None:
            return {"intermediate_size": self.intermediate_size}
        sizes = {"experts.size": experts.size}
        if experts.shared_size:
            sizes["experts.shared_size"] = experts.shared_size
        return sizes | ({"intermediate_size": self.intermediate_size} if experts.dense_layers else {})

    def slides(self, layer: int) -> bool:
        """Whether the layer has the sliding window."""
        if self.sliding_window is None:
            return False
        return self.sliding_layers[layer] if self.sliding_layers else True

    def rope_of(self, layer: int) -> RopeConfig:
        """The layer's rotary embedding."""
        if layer in self.unrotated_layers:
            return NO_ROPE
        return self.local_rope if self.local_rope is not None and self.slides(layer) else self.rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config:
    """The shape of an EAGLE-3 head (arXiv 2503.01840)."""

    decoder: ModelConfig
    """Its one layer; `vocab_size` is the target's."""
    draft_vocab_size: int
    target_hidden_size: int
    feature_layers: tuple[int, ...]
    """The target's layers whose inputs it reads, as `FeatureTap` numbers them; empty: `default_feature_layers`."""
    norm_before_residual: bool = False
    """The residual connection adds the normed hidden state, not the hidden state itself."""

    def features_of(self, target: ModelConfig) -> tuple[int, ...]:
        """The target's layers that this head reads."""
        return self.feature_layers or default_feature_layers(target.num_layers)


Sequential = Literal["vanilla", "gated", "rnn"]
SEQUENTIAL: tuple[Sequential, ...] = get_args(Sequential)


@dataclass(frozen=True, slots=True, kw_only=True)
class DFlashConfig:
    """The shape of a block drafter, whose rows are the last token and then masks: DFlash (arXiv 2602.06036), and DSpark
    (the paper in github.com/deepseek-ai/DeepSpec), which is DFlash with two small heads."""

    decoder: ModelConfig
    """Its layers; `vocab_size` is the target's."""
    draft_vocab_size: int
    target_hidden_size: int
    feature_layers: tuple[int, ...]
    """The target's layers whose inputs it reads, as `FeatureTap` numbers them."""
    block_size: int
    """Rows of a block."""
    mask_token_id: int
    first_drafts: bool = False
    """Whether the last token's own row predicts the token after it, as in DSpark; else the first mask's row does."""
    causal_layers: tuple[bool, ...] = ()
    """Whether rows of a block see none after themselves in each layer; empty: in all layers they see all."""
    sequential: Sequential = "vanilla"
    """Kind of DSpark's sequential head, by which a token's logits depend on the tokens drafted before it."""
    rank: int = 0
    """Rank of its bias; 0: there is none."""
    confidence: bool = False
    """Whether there is a confidence head, which predicts how likely each drafted token is accepted."""
    confidence_reads_token: bool = False
    """Whether it also reads the sequential head's embedding of the token before."""

    @property
    def length(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size - (not self.first_drafts)

    def causal(self, layer: int) -> bool:
        return bool(self.causal_layers) and self.causal_layers[layer]


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """A low, a middle and a high layer: those that public EAGLE-3 heads read unless they name others."""
    return (2, num_layers // 2, num_layers - 3)
