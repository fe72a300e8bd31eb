"""Chooses the verifier, and whether it runs for a CPU or sync-free for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pilotfish.engine.config import Verification
from pilotfish.engine.verification.coupled import CoupledVerifier
from pilotfish.engine.verification.rejection import RejectionVerifier
from pilotfish.engine.verification.verifier import Verifier


def make_verifier(name: Verification, eos_token_ids: Sequence[int], device: torch.device) -> Verifier:
    """Make the verifier that a configuration names. On the CPU, rows take time and reading a result takes none; on a
    GPU it is the other way round, so there it is sync-free."""
    verifier = RejectionVerifier if name == "rejection" else CoupledVerifier
    return verifier(eos_token_ids, sync_free=device.type != "cpu")
