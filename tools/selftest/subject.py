"""Subject: the settings, platform and model under test, which the checks of all groups share."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import torch

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.platform import Platform, choose_platform, choose_quantization
from pilotfish.engine.models.checkpoint import read_config
from pilotfish.engine.models.config import ModelConfig
from pilotfish.engine.models.layout import check_divides
from pilotfish.errors import ConfigError
from pilotfish.tools.selftest import small
from pilotfish.tools.selftest.settings import SelfTest


@dataclass(frozen=True)
class Subject:
    test: SelfTest

    @property
    def config(self) -> EngineConfig:
        return self.test.config

    @property
    def quick(self) -> bool:
        return self.test.quick

    @cached_property
    def shape(self) -> ModelConfig:
        """The shape of the user's model, or of the small one that stands in for it."""
        name = self.config.model if self.test.own_model else str(self.small("llama", dtype="float32"))
        return read_config(resolve(name, weights=False))

    @cached_property
    def platform(self) -> Platform:
        """The platform that the model will run on. Raises ConfigError for settings that the machine does not
        support."""
        return choose_platform(self._config_of_platform, self.shape)

    @property
    def _config_of_platform(self) -> EngineConfig:
        if self.test.own_model or self.config.dtype != "auto" or not torch.cuda.is_available():
            return self.config
        return msgspec.structs.replace(self.config, dtype="bfloat16") if self.config.device != "cpu" else self.config

    def check(self) -> None:
        """Raise ConfigError where these settings cannot work on this machine, before anything is checked."""
        config, platform = self.config, self.platform
        ranks, nodes = config.tensor_parallel_size, config.nnodes
        if nodes > 1:
            raise ConfigError(f"nnodes is {nodes}, but the self-test checks one host at a time: run it on each")
        if self.test.own_model:
            check_divides(self.shape, ranks, self.scheme, model=config.model)
        if platform.device.type == "cuda" and ranks > (there := torch.cuda.device_count()):
            raise ConfigError(f"tensor_parallel_size is {ranks}, but torch sees {there} GPUs here")

    @property
    def scheme(self) -> str | None:
        """The scheme by which the model's matrices are quantized once they are loaded; None: they are not."""
        found = choose_quantization(self.config, self.shape, self.platform.needs.capability)
        return None if found is None else found.scheme

    @property
    def device(self) -> torch.device:
        return self.platform.device

    @property
    def dtype_name(self) -> str:
        return short_name(self.platform.dtype)

    def small(self, kind: str, seed: int = 0, ranks: int = 1, dtype: str = "") -> Path:
        """Return the folder of a small model, in the platform's dtype unless another is named."""
        return small.write(Path(self.test.directory), kind, dtype=dtype or self.dtype_name, ranks=ranks, seed=seed)

    def small_config(self, model: Path, **settings: object) -> EngineConfig:
        """Return the user's settings for a small model: device, dtype, kernels, attention; everything but sizes."""
        config = msgspec.structs.replace(
            self.config,
            model=str(model),
            dtype=self.dtype_name,
            load_format="auto",
            drafter=("ngram",),
            speculation="auto",
            adaptive_drafts=False,
            prefix_caching=False,
            verification="coupled",
            max_model_len=0,
            max_num_seqs=8,
            max_batch_tokens=128,
            kv_cache_memory=64 << 20,
            tensor_parallel_size=1,
            draft_tensor_parallel_size=1,
            seed=0,
        )
        return msgspec.structs.replace(config, **settings)

    def random(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal numbers, rounded to `dtype`, on the CPU: the same on every machine."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def tokens(self, count: int, vocab_size: int, seed: int) -> list[int]:
        """Return random token ids with repetitions, so that lookup drafters find drafts."""
        generator = torch.Generator().manual_seed(seed)
        part = torch.randint(1, vocab_size, (max(1, count // 3),), generator=generator).tolist()
        return (part * 4)[:count]


def short_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def release() -> None:
    """Return the GPU memory of unreferenced models to the system, so that it counts as free."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def ignore(what: str, share: float) -> None:
    """Ignore loading progress."""
