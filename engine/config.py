"""EngineConfig: every setting of the engine, one schema for flags, YAML and code.

The server's own settings (host, port, keys) live in `server.config`. Sizes are bytes, times seconds, lengths tokens.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pilotfish.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=1, le=65535)]

Verification = Literal["coupled", "rejection"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
KernelsName = Literal["auto", "native", "torch"]
AttentionName = Literal["auto", "flash4", "flash2", "native", "torch"]
QuantizationName = Literal["auto", "none", "fp8"]
CacheDType = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "dummy"]


CACHE_SHARES = {"cpu": 0.05, "gpu": 0.9}
"""What `kv_cache_share` 0 stands for."""


def cache_share(kv_cache_share: float, on_gpu: bool) -> float:
    """The setting's value, or what it stands for where a model computes."""
    return kv_cache_share or CACHE_SHARES["gpu" if on_gpu else "cpu"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine is started with. Every field has a default but `model`'s is the catalogue's small one.

    Raises ConfigError from `check()`; msgspec raises ValidationError for a value of the wrong type.
    """

    model: str = "smollm2-135m"
    """A catalogue name, a Hugging Face folder, a .gguf file, or a hub name."""
    dtype: DType = "auto"
    """Of weights and KV cache. auto: float32 on the CPU, the checkpoint's own on a GPU."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    kernels: KernelsName = "auto"
    """native: this package's own CPU kernels, bit-equal for every batch and span; torch: torch's operators."""
    attention_backend: AttentionName = "auto"
    """flash4, flash2: flash-attn's kernels; native, torch: as for `kernels`. auto: the best that this machine has."""
    quantization: QuantizationName = "auto"
    """Of the layers' matrices. fp8: quantized at loading unless the checkpoint is; none: never; auto: as the checkpoint
    has them where the GPU can compute with them, otherwise in `dtype`."""
    load_format: LoadFormat = "auto"
    """auto: the model's own weights; dummy: random ones of the same shapes, for benchmarks, from config.json alone."""
    num_threads: NotNegative = 0
    """CPU threads of each engine process; 0: the cores that it may use, divided by the ranks of this host."""
    tensor_parallel_size: Positive = 1
    """GPUs, or processes on a CPU, that share a model: its ranks."""
    draft_tensor_parallel_size: Positive = 1
    """1: draft models lie whole on rank 0; the same as tensor_parallel_size: they are divided as the target is."""
    nnodes: Positive = 1
    """Hosts that the ranks are on, the same number on each: start the same command on each, but for node_rank."""
    node_rank: NotNegative = 0
    """Which of them this host is. Node 0 has rank 0 and serves; the others only hold ranks."""
    master_addr: str | None = None
    """Address of node 0, as all nodes reach it; needed with nnodes."""
    master_port: Port = 29500
    """Port of node 0 where the ranks of several hosts meet."""
    rank_timeout: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds that a rank may be silent, or stuck in a pass that the others wait in, before the engine ends with its
    name; also rank 0 itself while requests are in flight."""
    enforce_eager: bool = False
    """Launch every kernel of every pass by itself, even where passes could be captured as CUDA graphs."""
    cuda_graph_memory: NotNegative = 0
    """Bytes that captured graphs may take on a GPU; 0: a twentieth of what is free once the weights are loaded."""

    max_model_len: NotNegative = 0
    """Most tokens of prompt and answer together; 0: the model's own limit, or less if the KV cache is smaller."""
    max_num_seqs: Positive = 32
    """Most sequences that run in one step; the others wait."""
    max_batch_tokens: Positive = 128
    """Token rows of one step: what is left of it by the decoding sequences goes to prefill chunks."""
    block_size: NotNegative = 0
    """Tokens in a KV-cache block. 0: the attention backend's own choice."""
    kv_cache_dtype: CacheDType = "auto"
    """auto: the same as `dtype`; fp8: float8_e4m3fn, half of bfloat16's memory, where the attention backend allows it.
    """
    kv_cache_memory: NotNegative = 0
    """Bytes of the KV cache; 0: `kv_cache_share` of the memory that is free once the weights are loaded."""
    kv_cache_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """See kv_cache_memory. 0: 0.05 on the CPU, whose memory others want, too, and 0.9 on a GPU."""
    prefix_caching: bool = True
    """Keep the KV cache of finished requests, as long as there is room, for prompts that begin as they did."""

    drafter: tuple[str, ...] = ()
    """Who may draft: "ngram", "suffix", or a draft model with the target's vocabulary, named as `model` is, or as
    NAME=MODEL to choose what requests call it. Give it several times for several; not at all: what goes with the
    target."""
    speculation: str = "auto"
    """What a request gets that does not say: auto, which chooses among the drafters at every step; none; or a drafter's
    name."""
    num_draft_tokens: Positive = 8
    """Most tokens drafted for a sequence in one step."""
    adaptive_drafts: bool = True
    """Draft by whom and as many tokens as promises the highest goodput, down to none; false: always as many as can be,
    by the first drafter that has any."""
    ngram_max: Positive = 4
    """Longest suffix that the n-gram drafter looks up; it falls back to shorter ones down to `ngram_min`."""
    ngram_min: Positive = 1
    """Shortest suffix that it looks up."""
    verification: Verification = "coupled"
    """coupled: the same seed gives the same text with any drafter or none; rejection: more drafted tokens are accepted,
    but the text of a sampled answer depends on what was drafted."""

    seed: NotNegative | None = None
    """Where requests without a seed get theirs from; None: from the operating system."""

    def check(self) -> EngineConfig:
        """Return self, or raise ConfigError for settings that contradict each other.

        Entries of `drafter` are checked by `speculation.drafters.registry`, which knows the drafters.
        """
        if self.ngram_min > self.ngram_max:
            raise ConfigError(f"ngram_min ({self.ngram_min}) is larger than ngram_max ({self.ngram_max})")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) is smaller than max_num_seqs ({self.max_num_seqs}): "
                "every running sequence needs a row of each step"
            )
        self._check_ranks()
        return self

    def _check_ranks(self) -> None:
        size, nodes = self.tensor_parallel_size, self.nnodes
        if self.draft_tensor_parallel_size not in (1, size):
            raise ConfigError(
                f"draft_tensor_parallel_size is {self.draft_tensor_parallel_size}, but must be 1 or the same as "
                f"tensor_parallel_size ({size})"
            )
        if size % nodes:
            raise ConfigError(
                f"nnodes is {nodes}, but tensor_parallel_size ({size}) must be a multiple of it: each host has the "
                "same number of ranks"
            )
        if self.node_rank >= nodes:
            raise ConfigError(f"node_rank is {self.node_rank}, but with nnodes {nodes} it can be 0 to {nodes - 1}")
        if nodes > 1 and not self.master_addr:
            raise ConfigError(
                f"nnodes is {nodes}, which needs master_addr: the address of node 0, as all nodes reach it"
            )
