"""EngineConfig: every setting of the engine; one schema for flags, YAML and code.

The server's own settings (host, port, keys) live in `server.config`. Sizes are bytes, times seconds unless their
names say otherwise, lengths tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
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
KernelsName = Literal["auto", "native", "triton", "torch"]
AttentionName = Literal["auto", "flash4", "flash2", "triton", "native", "torch"]
QuantizationName = Literal["auto", "none", "fp8", "int8", "int4"]
CacheDType = Literal["auto", "bfloat16", "int8", "fp8"]
LoadFormat = Literal["auto", "dummy"]
SchedulingPolicy = Literal["fair", "priority", "fcfs"]
ModelImpl = Literal["auto", "pilotfish", "transformers"]


CACHE_SHARES = {"cpu": 0.05, "gpu": 0.9}
"""The defaults of `kv_cache_share`, which 0 stands for."""


def cache_share(kv_cache_share: float, on_gpu: bool) -> float:
    """The share itself, or the default for the device if it is 0."""
    return kv_cache_share or CACHE_SHARES["gpu" if on_gpu else "cpu"]


LARGE_GPU = 40 * 10**9
"""Bytes of a GPU's memory from which steps are of GPU_ROWS[1] rows by default: the activations of as many then take
little of it, and such GPUs compute enough not to be held up by them for long."""
CPU_SEQS, CPU_ROWS = 32, 512
CPU_DRAFT = 32
"""Tokens of the longest drafts by suffixes on the CPU, where no graphs are captured for a length."""
CPU_BACKLOG = 128
"""Rows of a prompt that a drafter reads at a time on the CPU, which `max_prefill_ms` does not bound."""
GPU_SEQS, GPU_ROWS = 256, (2048, 8192)


def with_step_limits(config: EngineConfig, gpu_memory: int | None) -> EngineConfig:
    """The settings with `max_num_seqs`, `max_batch_tokens` and `suffix_draft_tokens`, where they are 0, by device: a
    pass over many rows costs a GPU little more than one over few. gpu_memory: bytes; None: a CPU."""
    if config.max_num_seqs and config.max_batch_tokens and config.suffix_draft_tokens:
        return config
    seqs, rows = (CPU_SEQS, CPU_ROWS) if gpu_memory is None else (GPU_SEQS, GPU_ROWS[gpu_memory >= LARGE_GPU])
    max_num_seqs = config.max_num_seqs or min(seqs, config.max_batch_tokens or seqs)
    return msgspec.structs.replace(
        config,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=config.max_batch_tokens or max(rows, max_num_seqs),
        suffix_draft_tokens=config.suffix_draft_tokens
        or (max(CPU_DRAFT, config.num_draft_tokens) if gpu_memory is None else config.num_draft_tokens),
    )


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of an engine. Each field's docstring is the help text of its flag.

    Raises ConfigError from `check()`; msgspec raises ValidationError for a value of the wrong type.
    """

    model: str = "smollm2-135m"
    """Model to serve: a name from the built-in catalogue, a Hugging Face folder, a .gguf file, or a name on the Hugging
    Face hub (org/name)."""
    dtype: DType = "auto"
    """Data type of the weights and the KV cache. auto: float32 on the CPU, where matrices of a GGUF
    file stay in its quantized blocks; the checkpoint's own on a GPU."""
    device: DeviceName = "auto"
    """Device to run on. auto: CUDA if the machine has a GPU, and an error if torch cannot use it; else the CPU."""
    kernels: KernelsName = "auto"
    """Kernels to use. native: Pilotfish's own CPU kernels, which are batch-invariant; triton: its own on a GPU, which
    take fewer launches; torch: torch's operators; auto: native or triton where they can be used."""
    attention_backend: AttentionName = "auto"
    """Attention kernels to use. flash4, flash2: flash-attn's; triton: Pilotfish's own on a GPU; native, torch: as for
    `kernels`; auto: the best ones that this machine has."""
    quantization: QuantizationName = "auto"
    """Quantization of the weights. int8, int4: quantized at load time on the CPU, in groups of 32, where they are not
    already; fp8: the layers', unless the checkpoint is already; none: never; auto: as the checkpoint has them where the
    GPU computes in fp8 or, of a GGUF file, the CPU with its blocks, otherwise in `dtype`."""
    model_impl: ModelImpl = "auto"
    """Code that computes the model. pilotfish: the engine's own, for the families that it knows; transformers: that of
    the transformers package, for any decoder whose attention uses its attention interface, on one rank, slower; auto:
    the engine's own if it knows the family, else transformers'."""
    lora: tuple[str, ...] = ()
    """Low-rank adapter (LoRA) to load beside the model, as NAME=FOLDER, a folder that PEFT has written; requests choose
    it by the name, as they would a model. Repeatable."""
    lora_updates: bool = False
    """Allow adapters to be loaded and unloaded while the model is served."""
    load_format: LoadFormat = "auto"
    """Weights to load. auto: the model's own; dummy: random weights of the same shapes, for benchmarks, from
    config.json alone."""
    num_threads: NotNegative = 0
    """CPU threads of each engine process; 0: the cores that it may use, divided by the number of ranks on this host."""
    tensor_parallel_size: Positive = 1
    """Number of GPUs, or of processes on a CPU, that a model is sharded over: its ranks."""
    draft_tensor_parallel_size: Positive = 1
    """Ranks that draft models are sharded over. 1: they are whole on rank 0; otherwise the same as
    tensor_parallel_size."""
    expert_parallel: bool = False
    """Divide the experts of a mixture among the ranks, whole, rather than each of them; attention and all else is
    sharded as without."""
    nnodes: Positive = 1
    """Number of hosts that the ranks are on, the same number of ranks on each."""
    node_rank: NotNegative = 0
    """Index of this host: start the same command on each host except for this. Node 0 has rank 0 and serves HTTP; the
    others only hold ranks."""
    master_addr: str | None = None
    """Address of node 0, as all nodes reach it. Required with nnodes."""
    master_port: Port = 29500
    """Port of node 0 where the ranks of several hosts meet."""
    rank_timeout: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds that a rank may be silent, or stuck in a pass that the others wait for, before the engine ends with an
    error that names it; also for rank 0 itself while requests are in flight."""
    enforce_eager: bool = False
    """Never capture passes as CUDA graphs: launch every kernel of every pass individually."""
    cuda_graph_memory: NotNegative = 0
    """Maximum memory for captured CUDA graphs on a GPU, in bytes; 0: a twentieth of the memory that is free after
    loading the weights."""

    max_model_len: NotNegative = 0
    """Maximum number of tokens of prompt and answer together; 0: the model's own limit, or what the KV cache holds if
    that is less."""
    max_num_seqs: NotNegative = 0
    """Maximum number of sequences that run in one step; the others wait. 0: 32 on the CPU, 256 on a GPU."""
    max_batch_tokens: NotNegative = 0
    """Maximum number of token rows in a step; decoding sequences come first, prefill chunks take the rest. 0: 512 on
    the CPU, 2048 on a GPU, 8192 on one of 40 GB or more."""
    max_prefill_ms: Annotated[float, Meta(ge=0)] = 80.0
    """Maximum milliseconds that reading prompts may add to a step of sequences that decode, as predicted from the steps
    before: prefill chunks are as large as that allows. 0: no bound but max_batch_tokens."""
    scheduling_policy: SchedulingPolicy = "fair"
    """Which sequences run where there are more than max_num_seqs. fair: equal shares for tenants, by weight and tokens,
    and within a tenant by the requests' priority, and equal shares for its users; priority: by priority alone; fcfs:
    first come, first served."""
    block_size: NotNegative = 0
    """Tokens in a block of the KV cache; 0: the attention backend's own choice."""
    kv_cache_dtype: CacheDType = "auto"
    """Data type of the KV cache, where the attention backend supports it. auto: the same as `dtype`; bfloat16: half the
    memory of float32 on the CPU; int8: with a scale for each token and head, little more than a quarter of it, on the
    CPU; fp8: float8_e4m3fn, half the memory of bfloat16, on a GPU."""
    kv_cache_memory: NotNegative = 0
    """Size of the KV cache in bytes; 0: by `kv_cache_share`."""
    kv_cache_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Share of the memory that is free after loading the weights to use for the KV cache. 0: 0.05 on the CPU, whose
    memory other programs need, too, and 0.9 on a GPU."""
    prefix_caching: bool = True
    """Keep the KV cache of finished requests, as long as there is room, for prompts that start with the same tokens."""
    kv_events_endpoint: str = ""
    """ZeroMQ address on which to publish what the prefix cache has, in vLLM's format, for cache-aware routers, such as
    tcp://*:5557. The events have the tokens of prompts and answers: only for a network that may read them."""
    kv_events_replay_endpoint: str = ""
    """ZeroMQ address on which subscribers ask for events that they have missed, such as tcp://*:5558."""
    kv_events_topic: str = ""
    """Topic of the events; llm-d's router wants kv@ADDRESS@MODEL."""

    drafter: tuple[str, ...] = ()
    """Drafter to load: ngram, suffix, suffix-memory, or a draft model, EAGLE-3 head, DFlash or DSpark drafter with the
    target's vocabulary, in the same forms as `model`; NAME=MODEL chooses the name that requests use. Repeatable;
    without any, the drafters that suit the target."""
    speculation: str = "auto"
    """Default for requests that do not set `speculation`: auto, which chooses among the drafters at every step; none;
    or a drafter's name."""
    num_draft_tokens: Positive = 8
    """Maximum number of tokens drafted for a sequence in one step."""
    adaptive_drafts: bool = True
    """Let the controller choose the drafter and the number of draft tokens with the highest predicted goodput, down to
    none; off: always as many as possible, by the first drafter that has any."""
    ngram_max: Positive = 4
    """Length of the longest suffix that the n-gram drafter looks up; then shorter ones, down to `ngram_min`."""
    ngram_min: Positive = 1
    """Length of the shortest suffix that the n-gram drafter looks up."""
    suffix_memory: NotNegative = 64 << 20
    """Bytes of past prompts and answers that the drafter suffix-memory keeps, each tenant's and each cache_salt's for
    itself; 0: none, and no such drafter by default."""
    suffix_corpus: tuple[str, ...] = ()
    """Text file that suffix-memory drafts from as well, for all tenants, such as answers of before or documents that
    answers quote. It takes its part of suffix_memory, at most half. Repeatable."""
    suffix_draft_tokens: NotNegative = 0
    """Maximum number of tokens that suffix and suffix-memory draft for a sequence in one step, where a long match makes
    them sure; 0: 32 on the CPU, and as num_draft_tokens on a GPU."""
    verification: Verification = "coupled"
    """How drafts are verified. coupled: the same seed gives the same text with any drafter or none; rejection: more
    draft tokens are accepted, but the text of a sampled answer depends on the drafts."""

    seed: NotNegative | None = None
    """Seed from which requests without one get theirs; by default from the operating system."""

    def check(self) -> EngineConfig:
        """Return self, or raise ConfigError for settings that contradict each other.

        Entries of `drafter` are checked by `speculation.drafters.registry`, which knows the drafters.
        """
        self.adapters()
        if self.suffix_corpus and not self.suffix_memory:
            raise ConfigError("suffix_corpus needs suffix_memory, which is 0: give it bytes, or no corpus")
        if self.ngram_min > self.ngram_max:
            raise ConfigError(f"ngram_min ({self.ngram_min}) is larger than ngram_max ({self.ngram_max})")
        if 0 < self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) is smaller than max_num_seqs ({self.max_num_seqs}): "
                "every running sequence needs a row of each step"
            )
        if (self.kv_events_replay_endpoint or self.kv_events_topic) and not self.kv_events_endpoint:
            raise ConfigError("kv_events_replay_endpoint and kv_events_topic need kv_events_endpoint")
        if self.kv_events_endpoint and not self.prefix_caching:
            raise ConfigError("kv_events_endpoint needs prefix_caching: without it there is nothing to publish")
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

    def adapters(self) -> dict[str, str]:
        """The folders in `lora` by their names. Raises ConfigError for entries that are no NAME=FOLDER."""
        found: dict[str, str] = {}
        for entry in self.lora:
            name, _, folder = entry.partition("=")
            if not name.strip() or not folder:
                raise ConfigError(f"lora is {entry!r}, but must be NAME=FOLDER")
            if name in found:
                raise ConfigError(f"lora has {name!r} twice: give each adapter a name of its own")
            found[name] = folder
        return found


def config_of(model: str | None, config: EngineConfig | None, settings: Mapping[str, object]) -> EngineConfig:
    """Return `config`, or the defaults, with a model and other settings on top of it. Raises ConfigError for settings
    that are unknown, of the wrong type or contradictory."""
    known = {} if config is None else msgspec.structs.asdict(config)
    named = {} if model is None else {"model": model}
    try:
        return msgspec.convert({**known, **named, **settings}, EngineConfig).check()
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
