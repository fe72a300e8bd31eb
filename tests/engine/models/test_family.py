"""A new model family is one file and one entry of the registry: everything else follows from its declaration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pilotfish.checkpoints.catalog import resolve
from pilotfish.engine.kernels.fp8 import Fp8Linear
from pilotfish.engine.kernels.native import load_library
from pilotfish.engine.models import registry
from pilotfish.engine.models.checkpoint import iter_weights, read_config
from pilotfish.errors import ModelError
from pilotfish.tools.planner.models import PlannedModel
from tests.support import toy_family
from tests.support.parity import BLOCKS, OTHERS, in_pieces, runner_of
from tests.support.ranks import RankedRunner

IDS = [3, 99, 12, 77, 45, 3, 20, 21, 22, 12, 77, 9, 50, 88, 41, 5, 17, 23, 64, 33]
ENDS = (7, 8, 20)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, toy_family.FAMILY))
    return toy_family.make_weights()


@pytest.fixture(params=["huggingface", "gguf"])
def path(request: pytest.FixtureRequest, tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    if request.param == "gguf":
        return toy_family.write_gguf(tmp_path / "toy.gguf", weights)
    return toy_family.write_folder(tmp_path / "toy", weights)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_its_logits_are_right_on_any_number_of_ranks(
    path: Path, weights: dict[str, torch.Tensor], kernels: str, ranks: int
) -> None:
    if kernels == "native" and (ranks == 4 or load_library() is None):
        pytest.skip("96 / 4 is not a multiple of the kernels' vectors, or they were not built here (no C compiler)")
    runner = RankedRunner(str(path), ranks, len(BLOCKS) + len(OTHERS), kernels=kernels)
    wanted = toy_family.logits_of(weights, IDS)
    assert wanted.std() > 1
    torch.testing.assert_close(in_pieces(runner, IDS, ENDS), wanted.float(), rtol=0, atol=1e-4)


def test_both_formats_give_its_tensors(path: Path, weights: dict[str, torch.Tensor]) -> None:
    files = resolve(str(path))
    found = dict(iter_weights(files, read_config(files), torch.float32))
    assert list(found) == list(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_planner_knows_its_bytes(path: Path, weights: dict[str, torch.Tensor]) -> None:
    shape = read_config(resolve(str(path)))
    model = PlannedModel(name="toy", shape=shape, dtype="bfloat16", kv_dtype="bfloat16")
    assert model.weight_bytes() == 2 * sum(tensor.numel() for tensor in weights.values())
    assert model.weight_bytes(2) < 0.6 * model.weight_bytes()


def test_it_can_be_quantized_and_be_random(path: Path) -> None:
    plain, fp8 = (in_pieces(runner_of(str(path), "torch", quantization=q), IDS, ENDS) for q in ("none", "fp8"))
    assert torch.nn.functional.cosine_similarity(plain, fp8).mean() > 0.97
    model = runner_of(str(path), "torch", quantization="fp8", load_format="dummy").model
    assert all(type(layer.qkv) is type(layer.output) is Fp8Linear for layer in model.decoder.layers)
    # Norms that multiply by 1: 0.5, and their offset.
    norms = [layer.mlp_post_norm for layer in model.decoder.layers]
    assert all(norm is not None and (norm == 1).all() for norm in norms)


def test_a_tensor_too_few_or_too_many_is_named(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    missing = weights.pop("model.layers.1.third.weight")
    with pytest.raises(ModelError, match=r"lacks tensor 'model\.layers\.1\.third\.weight'"):
        runner_of(str(toy_family.write_folder(tmp_path / "few", weights)), "torch")
    weights |= {"model.layers.1.third.weight": missing, "model.layers.1.fourth.weight": missing.clone()}
    with pytest.raises(ModelError, match=r"has tensor 'model\.layers\.1\.fourth\.weight'"):
        runner_of(str(toy_family.write_folder(tmp_path / "many", weights)), "torch")


def test_without_the_entry_it_is_not_known(tmp_path: Path) -> None:
    folder = toy_family.write_folder(tmp_path / "toy", toy_family.make_weights())
    with pytest.raises(ModelError, match="model_type is 'toy', but the engine knows llama"):
        read_config(resolve(str(folder)))
