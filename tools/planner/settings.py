"""PlanSettings: those of the engine's settings that a plan depends on, under the same names and with the same defaults,
so that one YAML file does for `pilotfish serve` and `pilotfish plan`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pilotfish.engine.config import DType, NotNegative, Positive
from pilotfish.errors import ConfigError


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is planned. msgspec raises ValidationError for a value of the wrong type."""

    model: str = "smollm2-135m"
    """A name of the catalogue or of a well-known model, a Hugging Face folder, a .gguf file, or a hub name in the local
    cache."""
    drafter: tuple[str, ...] = ()
    """Who may draft: "ngram", "suffix", or a draft model or EAGLE-3 head, as MODEL or NAME=MODEL; give it several times
    for several."""
    dtype: DType = "auto"
    """Of weights and KV cache. auto: float32 on the CPU, the checkpoint's own on a GPU."""
    quantization: Literal["auto", "none", "fp8"] = "auto"
    """Of the layers' matrices. fp8: quantized at loading unless the checkpoint is; none: never; auto: as the checkpoint
    has them."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """auto: the same as `dtype`; fp8: one byte a number."""
    tensor_parallel_size: Positive = 1
    """GPUs that share a model."""
    draft_tensor_parallel_size: Positive = 1
    """1: draft models lie whole on the first GPU; the same as tensor_parallel_size: they are divided as the target is.
    """
    enforce_eager: bool = False
    """No CUDA graphs."""
    cuda_graph_memory: NotNegative = 0
    """Bytes that CUDA graphs may take; 0: a share of the memory that is free once the weights are loaded."""
    max_model_len: NotNegative = 0
    """Most tokens of prompt and answer together; 0: the model's own limit."""
    max_num_seqs: Positive = 32
    """Most sequences that run in one step."""
    max_batch_tokens: Positive = 128
    """Token rows of one step."""
    kv_cache_memory: NotNegative = 0
    """Bytes of the KV cache; 0: `kv_cache_share` of the memory that is free once the weights are loaded."""
    kv_cache_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """See kv_cache_memory. 0: 0.05 on the CPU, whose memory others want, too, and 0.9 on a GPU."""
    num_draft_tokens: Positive = 8
    """Most tokens drafted for a sequence in one step."""

    def check(self) -> PlanSettings:
        """Return self, or raise ConfigError for settings that contradict each other."""
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) is smaller than max_num_seqs ({self.max_num_seqs}): "
                "every running sequence needs a row of each step"
            )
        return self
