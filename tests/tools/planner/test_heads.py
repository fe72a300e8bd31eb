"""EAGLE-3 heads in a plan: their bytes against the engine's own, their passes by the roofline."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import msgspec
import pytest
import torch

from pilotfish.checkpoints.catalog import DRAFTS, resolve
from pilotfish.engine.memory import kv_cache
from pilotfish.engine.models import eagle3_checkpoint
from pilotfish.errors import ConfigError, ModelError
from pilotfish.server.cli import main as cli
from pilotfish.tools.planner.devices import Device
from pilotfish.tools.planner.heads import EMBEDDING, PlannedHead
from pilotfish.tools.planner.memory import plan_memory
from pilotfish.tools.planner.plan import make_plan
from pilotfish.tools.planner.roofline import draft_seconds, kernel_count, pass_seconds
from pilotfish.tools.planner.setup import Setup
from pilotfish.tools.planner.speculation import expected_tokens

SetupOf = Callable[..., Setup]
SHIPPED = [(target, head) for target, heads in DRAFTS.items() for head in heads]


def head_of(setup: Setup) -> PlannedHead:
    (draft,) = setup.drafts
    assert draft.kind == "EAGLE-3 head"
    assert isinstance(draft.model, PlannedHead)
    return draft.model


@pytest.mark.parametrize(("target", "name"), SHIPPED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_the_engines(setup_of: SetupOf, target: str, name: str, dtype: str) -> None:
    setup = setup_of("h100", 1, model=target, drafter=(name,), dtype=dtype)
    head, files = head_of(setup), resolve(name)
    shape = eagle3_checkpoint.read_config(files.path)
    tensors = eagle3_checkpoint.read_weights(files.path, shape, getattr(torch, dtype))
    tensors.pop("target_ids", None)
    memory = plan_memory(setup)
    assert memory.draft_weights == {name: sum(tensor.nbytes for tensor in tensors.values())}
    scales = sum(tensor.numel() for key, tensor in tensors.items() if key.endswith("_scale"))
    assert head.params == sum(tensor.numel() for tensor in tensors.values()) - scales
    block = kv_cache.block_bytes(shape.decoder, 16, getattr(torch, dtype))
    assert head.kv_bytes_per_token() * 16 == block
    assert memory.kv_bytes_per_token == setup.target.kv_bytes_per_token() + head.kv_bytes_per_token()


def test_a_pass_reads_the_layer_and_the_head_once(setup_of: SetupOf) -> None:
    """On a device on which all but reading is free."""
    target, name = SHIPPED[0]
    setup = setup_of("h100", 1, model=target, drafter=(name,), dtype="float32")
    head = head_of(setup)
    device: Device = msgspec.structs.replace(
        setup.device, kernel_seconds=0.0, row_bandwidth=1e30, logit_seconds=0.0, draft_seconds=0.0
    )
    read = device.bandwidth * device.bandwidth_share
    shapes = {name: tensor.shape for name, tensor in eagle3_checkpoint.tensors_of(head.config).items()}
    matrices = {key: prod(shape) for key, shape in shapes.items() if len(shape) == 2 and key != EMBEDDING}
    assert sum(matrix.params for matrix in head.matrices()) + head.fusion.params == sum(matrices.values())
    context = 512
    found = pass_seconds(head, device, 1, 1, 1, context, 1).total * read
    assert found == pytest.approx(
        sum(matrix.bytes for matrix in head.matrices()) + context * head.kv_bytes_per_token(), rel=1e-3
    )
    # The fusion comes once for a draft, however long it is.
    drafts = {k: draft_seconds(head, device, 1, k, 1, context) for k in (0, 1, 2, 5)}
    assert drafts[0] == 0
    each = drafts[2] - drafts[1]
    assert drafts[5] == pytest.approx(drafts[1] + 4 * each, rel=1e-6)
    assert (drafts[1] - each) * read == pytest.approx(head.fusion.bytes, rel=0.05)


def test_a_head_is_cheaper_than_a_draft_model_of_as_many_layers_as_its_target(setup_of: SetupOf) -> None:
    setup = setup_of("h100", 1, model="smollm2-135m", drafter=(SHIPPED[0][1], "itself=smollm2-135m"))
    head, model = setup.draft_models
    costs = [draft_seconds(each, setup.device, 1, 4, 1, 512) for each in (head, model)]
    assert costs[0] < costs[1] / 3
    assert kernel_count(head) < kernel_count(model) / 10


def test_it_reads_what_was_accepted(setup_of: SetupOf) -> None:
    """A step in which all was accepted leaves it more rows to read than one in which nothing was."""
    setup = setup_of("cpu", 1, model="smollm2-135m", drafter=(SHIPPED[0][1],), kv_cache_memory=2**28)
    name = setup.drafts[0].name
    none, every = (make_plan(setup, 512, [1], [8], {name: rate}).best(name, 1).draft_seconds for rate in (0.0, 1.0))
    assert every > none
    rows = expected_tokens(1.0, 8)
    assert every == draft_seconds(head_of(setup), setup.device, 1, 8, 1, 512, rows)


def test_over_several_gpus_it_is_whole_on_the_first(setup_of: SetupOf) -> None:
    """With what it shares with its target, which has no whole embedding there."""
    alone = setup_of("h100", 1, model="smollm2-135m", drafter=(SHIPPED[0][1],), dtype="bfloat16")
    # Nine heads: three ranks divide them. Drafts that are split leave a head as it is.
    three = setup_of("h100", 3, 3, model="smollm2-135m", drafter=(SHIPPED[0][1],), dtype="bfloat16")
    head = head_of(three)
    assert head.shared == (EMBEDDING,)
    embedding = 2 * three.target.shape.vocab_size * three.target.shape.hidden_size
    ((_, one),) = plan_memory(alone).draft_weights.items()
    ((_, first),) = plan_memory(three).draft_weights.items()
    assert first == one + embedding
    assert three.ranks_of(head) == 1
    assert three.quantized("fp8").drafts == three.drafts


def test_one_made_for_another_target_is_refused(setup_of: SetupOf, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 49152 tokens, the target of 262144"):
        setup_of("h100", 1, model="gemma-3-270m", drafter=(SHIPPED[0][1],))
    for changed, message in (
        ({"target_hidden_size": 640}, "reads hidden states of size 640, the target's are 576"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 15, 31]}, "reads layers"),
    ):
        raw = json.loads((resolve(SHIPPED[0][1]).path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(raw | changed))
        with pytest.raises(ConfigError, match=message):
            setup_of("h100", 1, model="smollm2-135m", drafter=(f"head={tmp_path}",))


def test_a_head_of_which_only_the_shape_is_here(setup_of: SetupOf, tmp_path: Path) -> None:
    raw = (resolve(SHIPPED[0][1]).path / "config.json").read_text()
    (tmp_path / "config.json").write_text(raw)
    setup = setup_of("h100", 1, model="smollm2-135m", drafter=(f"head={tmp_path}",))
    assert head_of(setup).shared == (EMBEDDING,)
    assert setup.notes == ("head: its weights are not available: planned with its target's embedding",)


def test_a_head_is_no_target(setup_of: SetupOf) -> None:
    with pytest.raises(ModelError, match="is an EAGLE-3 head"):
        setup_of("h100", 1, model=SHIPPED[0][1], drafter=())


def test_the_command_plans_it(capsys: pytest.CaptureFixture[str]) -> None:
    target, name = SHIPPED[0]
    arguments = ["plan", "--model", target, "--drafter", name, "--gpu", "cpu", "--kv-cache-memory", "1GiB"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"weights of {name}" in printed
    assert [line for line in printed.splitlines() if f" {name} " in line and " 0.70 " in line]
