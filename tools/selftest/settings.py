"""The settings of a self-test, shared by the command and the groups' processes."""

from __future__ import annotations

import msgspec

from pilotfish.engine.config import EngineConfig


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one run of the self-test."""

    config: EngineConfig
    directory: str
    """Folder in which small models may be written."""
    own_model: bool = False
    """Whether the user named a model: `config.model` is then tested, too."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids for the texts of the user's model. Empty where it has no tokenizer: random ones are used instead."""
    quick: bool = False
