"""Models that are divided over ranks: the same logits as transformers', and as the model that is not divided.

Float32 sums in another order differ by some units in the last place; `test_model_parity` says how far that goes. Where
the kernels promise bit-equal rows, that is checked to the bit. Ranks are threads here, see `ranks`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.batch import Span
from pilotfish.engine.execution.loader import load_model
from pilotfish.engine.layers.communicator import ALONE, Communicator
from pilotfish.engine.models import eagle3_checkpoint
from pilotfish.engine.models.eagle3 import Eagle3Model
from pilotfish.engine.models.features import FeatureTap
from pilotfish.engine.speculation.drafters.registry import Source, kind_of, load_draft
from pilotfish.errors import ConfigError
from tests.support.fp8_checkpoints import LAYOUTS, publish
from tests.support.native import BOTH, needs_native
from tests.support.pairwise import pairwise
from tests.support.parity import BLOCKS, OTHERS, KernelsName, in_pieces, logits_of, runner_of
from tests.support.ranks import RankedRunner, Ranks
from tests.support.tiny import KINDS, build_model, make_tiny
from tests.support.tiny_gguf import write_gguf

pytestmark = pytest.mark.slow

PROMPT = [1, 300, 12, 77, 450, 3, 200, 201, 202, 12, 77, 9, 501, 88, 411, 5, 17, 230, 64, 333] * 2  # 40 tokens
WHOLE, MIXED = (40,), (7, 8, 24, 25, 26, 31, 40)  # prefill in chunks, decoding, verification of several

SIZES = (1, 2, 3, 4)
DIVISIBLE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 12,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
"""By all of SIZES; the vocabulary, 512, does not divide by 3."""
KV_HEADS = {1: 4, 2: 4, 3: 3, 4: 2}
"""Split, and replicated where there are more ranks than heads."""


def shape(kind: str, size: int) -> dict[str, Any]:
    own: dict[str, Any] = DIVISIBLE | {"num_key_value_heads": 12 if kind == "llama2" else KV_HEADS[size]}
    if kind == "gemma3":  # one key-value head, which is on all ranks
        own |= {"num_key_value_heads": 1, "num_hidden_layers": 4}
    if kind == "phi3":  # which has no head_dim
        own |= {"hidden_size": 192}
    return own


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A model of that kind that divides by so many ranks."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, size: int) -> Path:
        key = kind, shape(kind, size)["num_key_value_heads"]
        if key not in made:
            made[key] = make_tiny(
                kind, tmp_path_factory.mktemp("models") / "-".join(map(str, key)), **shape(kind, size)
            )
        return made[key]

    return folder


def ranked(model: Path, size: int, kernels: str, **config: Any) -> RankedRunner:
    return RankedRunner(str(model), size, len(BLOCKS) + len(OTHERS), kernels=kernels, **config)


@pytest.mark.parametrize(("kernels", "kind", "size"), pairwise(BOTH, KINDS, SIZES), indirect=["kernels"])
def test_logits_equal_transformers(divisible, kernels: KernelsName, kind: str, size: int) -> None:
    runner = ranked(divisible(kind, size), size, kernels)
    assert runner.platform.kernels.name == kernels
    wanted = logits_of(build_model(kind, **shape(kind, size)), PROMPT)
    for ends in (WHOLE, MIXED):
        found = in_pieces(runner, PROMPT, ends)
        assert found.shape == (40, 512)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kernels", "kind", "size"), pairwise(BOTH, ["llama", "llama-biased", "gemma3"], SIZES[1:]), indirect=["kernels"]
)
def test_gguf_gives_the_same_logits(tmp_path: Path, kernels: KernelsName, kind: str, size: int) -> None:
    """Columns of a slice begin and end within blocks of the quantized matrices, too."""
    path = write_gguf(build_model(kind, **shape(kind, size)), tmp_path / "model.gguf", Kind.Q8_0)
    whole = in_pieces(runner_of(str(path), kernels), PROMPT, MIXED)
    torch.testing.assert_close(in_pieces(ranked(path, size, kernels), PROMPT, MIXED), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kernels", "kind", "vocab_size"), pairwise(BOTH, ["llama-tied", "qwen2", "llama2"], [509, 6]), indirect=["kernels"]
)
def test_a_vocabulary_need_not_divide(tmp_path: Path, kernels: KernelsName, kind: str, vocab_size: int) -> None:
    """Of 6 tokens the last of 4 ranks has none."""
    own = DIVISIBLE | {"num_key_value_heads": 12, "vocab_size": vocab_size}
    folder, prompt = make_tiny(kind, tmp_path / "model", **own), [token % vocab_size for token in PROMPT]
    wanted = logits_of(build_model(kind, **own), prompt)
    for size in SIZES:
        found = in_pieces(ranked(folder, size, kernels), prompt, MIXED)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kernels", "kind", "size"), pairwise(BOTH, ["llama", "gemma3"], SIZES[1:]), indirect=["kernels"]
)
def test_all_ranks_have_the_same_hidden_states(divisible, kernels: KernelsName, kind: str, size: int) -> None:
    """To the bit, or they would write different texts in the end."""
    runner = ranked(divisible(kind, size), size, kernels)
    layers = tuple(range(runner.model.config.num_layers + 1))
    taps = [FeatureTap(layers) for _ in range(size)]
    runner.ranks.each(lambda comm: runner.runners[comm.rank].run([Span(PROMPT, 0, BLOCKS, 1)], taps[comm.rank]))
    first, *others = [tap.features for tap in taps]
    assert first is not None
    assert all(other is not None and torch.equal(first, other) for other in others)
    alone = FeatureTap(layers)
    runner_of(str(divisible(kind, size)), kernels).run([Span(PROMPT, 0, BLOCKS, 1)], alone)
    torch.testing.assert_close(first, alone.features, rtol=0, atol=1e-4)


@needs_native
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("size", SIZES[1:])
def test_sharded_models_are_batch_invariant(divisible, kind: str, size: int) -> None:
    """Prompts in chunks, decoding and verification side by side, however they are cut: as one row at a time."""
    runner = ranked(divisible(kind, size), size, "native")
    sequences = {"first": (PROMPT, BLOCKS), "second": (PROMPT[::-1], OTHERS)}
    alone = {
        name: torch.cat([runner.run([Span([token], i, blocks, 1)]) for i, token in enumerate(tokens)])
        for name, (tokens, blocks) in sequences.items()
    }

    @settings(max_examples=12)
    @given(cuts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=8, max_size=20))
    def check(cuts: list[tuple[int, int]]) -> None:
        at = dict.fromkeys(sequences, 0)
        for lengths in cuts:
            spans, wanted = [], []
            for (name, (tokens, blocks)), length in zip(sequences.items(), lengths, strict=True):
                start, stop = at[name], min(at[name] + length, len(tokens))
                if start < stop:
                    spans.append(Span(tokens[start:stop], start, blocks, stop - start))
                    wanted.append(alone[name][start:stop])
                    at[name] = stop
            if spans:
                assert torch.equal(runner.run(spans), torch.cat(wanted))

    check()


@pytest.mark.parametrize(
    ("changes", "size", "named"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 2},
            3,
            [r"num_heads \(4\) does not divide by 3", "use 1, 2 or 4$"],
        ),
        (
            {"num_key_value_heads": 6},
            4,
            [r"num_kv_heads \(6\) neither divides by 4 nor divides it", "use 1, 2, 3, 6 or 12$"],
        ),
        ({"intermediate_size": 160}, 3, [r"intermediate_size \(160\) does not divide by 3", "use 1, 2 or 4$"]),
        (
            {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
            2,
            [r"num_heads \(9\) does not .* and num_kv_heads \(3\)"],
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path: Path, changes: dict[str, int], size: int, named) -> None:
    folder = make_tiny("llama", tmp_path / "model", **(DIVISIBLE | {"num_key_value_heads": 4} | changes))
    for part in named:
        with pytest.raises(ConfigError, match=f"^tensor_parallel_size is {size}, but of model .*{part}"):
            ranked(folder, size, "torch")


def test_sizes_on_a_rank_that_the_kernels_cannot_take(tmp_path: Path, caplog) -> None:
    own = DIVISIBLE | {"num_key_value_heads": 4, "intermediate_size": 96}
    folder = make_tiny("llama", tmp_path / "model", **own)
    with pytest.raises(
        ConfigError, match=r"kernels is 'native', but the model's intermediate_size on each rank \(24\)"
    ):
        ranked(folder, 4, "native")
    runner = ranked(folder, 4, "auto")
    assert runner.platform.kernels.name == "torch"
    wanted = logits_of(build_model("llama", **own), PROMPT)
    torch.testing.assert_close(in_pieces(runner, PROMPT, MIXED), wanted, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"intermediate_size would be 24 .* multiple of 16 as fp8 needs: use 1 or 2$"):
        ranked(folder, 4, "torch", quantization="fp8")


def test_a_draft_is_refused_by_the_name_of_its_own_setting(divisible) -> None:
    runner = ranked(divisible("llama", 2), 1, "torch")
    draft = str(divisible("llama", 3))
    with pytest.raises(ConfigError, match=r"^draft_tensor_parallel_size is 5, but of llama-3"):
        Ranks(5).each(lambda comm: load_model(draft, runner.platform, runner.config, 0, lambda what, share: None, comm))


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_fp8_checkpoints(divisible, tmp_path: Path, layout: str, size: int) -> None:
    fp8, plain = publish(divisible("llama", size), tmp_path, layout)
    wanted = in_pieces(runner_of(str(plain), "torch"), PROMPT, MIXED)
    torch.testing.assert_close(in_pieces(ranked(fp8, size, "torch"), PROMPT, MIXED), wanted, rtol=0, atol=1e-4)
    # In fp8 the weights are the checkpoint's still; activations of a summed matrix are rounded by each rank on its own.
    found = in_pieces(ranked(fp8, size, "torch", quantization="fp8"), PROMPT, MIXED)
    assert not torch.allclose(found, wanted, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.97


@pytest.mark.parametrize("size", SIZES[1:])
def test_fp8_weights_are_slices_of_the_whole_ones(divisible, tmp_path: Path, size: int) -> None:
    """With their scales, from a checkpoint and quantized here alike; but a summed matrix that is quantized here has
    scales of its slices."""
    folder = divisible("llama", size)
    published, _ = publish(folder, tmp_path, "fbgemm_fp8")
    whole = runner_of(str(published), "torch", quantization="fp8").model.decoder.layers[1].mlp
    for source in (published, folder):
        mlps = [each.model.decoder.layers[1].mlp for each in ranked(source, size, "torch", quantization="fp8").runners]
        for name in ("gate_up", "down"):
            mine, its = [getattr(mlp, name) for mlp in mlps], getattr(whole, name)
            rows = name == "gate_up"
            values = [linear.weight.float() for linear in mine]
            halves = [torch.cat([value.chunk(2)[half] for value in values]) for half in (0, 1)]
            joined = torch.cat(halves) if rows else torch.cat(values, dim=1)
            if rows or source is published:
                assert torch.equal(joined, its.weight.float())
            if rows:
                scales = [torch.cat([linear.scale.view(-1).chunk(2)[half] for linear in mine]) for half in (0, 1)]
                assert torch.equal(torch.cat(scales), its.scale.view(-1))
            elif source is published:
                assert all(torch.equal(linear.scale, its.scale) for linear in mine)
            else:
                parts = [linear.weight.float() * linear.scale.view(-1, 1) for linear in mine]
                wanted = its.weight.float() * its.scale.view(-1, 1)
                torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=0.13, atol=0.01)


@pytest.mark.parametrize("source", ["tied", "untied", "gguf", "dummy"])
def test_an_eagle3_head_on_rank_0_has_the_targets_whole_embedding_and_head(
    divisible, tmp_path: Path, kernels: KernelsName, source: str
) -> None:
    target = divisible("llama-tied" if source == "tied" else "llama", 3)
    if source == "gguf":
        target = write_gguf(build_model("llama", **shape("llama", 3)), tmp_path / "model.gguf", Kind.Q8_0)
    decoder = {
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    sizes = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 96, "rms_norm_eps": 1e-5}
    config = decoder | sizes | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 512}
    config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2]  # the default ones take a target of three layers
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    tensors = eagle3_checkpoint.tensors_of(eagle3_checkpoint.read_config(tmp_path / "head"))
    own = {
        name: torch.randn(tensor.shape)
        for name, tensor in tensors.items()
        if name not in ("embed_tokens.weight", "lm_head.weight")
    }
    save_file(own, tmp_path / "head" / "model.safetensors")
    files = ModelFiles("head", "huggingface", tmp_path / "head")
    head = Source("head", kind_of(files), files)

    def draft(size: int) -> Eagle3Model:
        load_format = "dummy" if source == "dummy" else "auto"
        runner = ranked(target, size, kernels, load_format=load_format)
        loaded = load_draft(head, runner.model, runner.platform, runner.config, lambda what, share: None, ALONE)
        assert loaded is not None
        assert isinstance(loaded.model, Eagle3Model)
        return loaded.model

    whole, found = draft(1), draft(3)
    ids, x = torch.arange(512), torch.randn(5, 96)
    assert torch.equal(found.kernels.embed(ids, found.embedding), whole.kernels.embed(ids, whole.embedding))
    assert torch.equal(found.logits(x), whole.logits(x))


@pytest.mark.parametrize(
    ("kernels", "kind", "size"), pairwise(BOTH, ["llama", "gemma3"], SIZES[1:]), indirect=["kernels"]
)
def test_random_weights_are_those_of_the_unsharded_model(divisible, kernels, kind: str, size: int) -> None:
    folder = str(divisible(kind, size))
    wanted = in_pieces(runner_of(folder, kernels, load_format="dummy"), PROMPT, MIXED)
    found = in_pieces(RankedRunner(folder, size, 8, kernels=kernels, load_format="dummy"), PROMPT, MIXED)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "sizes", "prompt"),
    [
        ("smollm2-135m", (1, 3), [504, 3575, 282, 4649, 314]),  # 9 heads, 3 key-value heads
        ("gemma-3-270m", (1, 2, 4), [2, 818, 5279, 529, 7001, 563]),  # 4 heads, one key-value head
    ],
)
def test_real_models_write_the_same_text(name: str, sizes: tuple[int, ...], prompt: list[int]) -> None:
    def text(size: int) -> list[int]:
        runner, tokens = RankedRunner(name, size, 4), list(prompt)
        start, blocks = 0, [2, 0, 3, 1]
        while len(tokens) < len(prompt) + 32:
            logits = runner.run([Span(tokens[start:], start, blocks, 1)])
            start = len(tokens)
            tokens.append(int(logits.argmax()))
        return tokens

    wanted, *others = map(text, sizes)
    assert len(set(wanted)) > 8
    assert all(found == wanted for found in others)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_each_rank_tells_how_far_it_is(divisible, load_format: Literal["auto", "dummy"]) -> None:
    config = EngineConfig(model=str(divisible("llama-biased", 3)), device="cpu", load_format=load_format)
    told: dict[int, list[tuple[str, float]]] = {rank: [] for rank in range(3)}

    def load(comm: Communicator) -> None:
        load_model(config.model, None, config, 0, lambda what, share: told[comm.rank].append((what, share)), comm)

    Ranks(3).each(load)
    for seen in told.values():
        shares = [share for what, share in seen if what == "loading llama-biased-3"]
        assert shares == sorted(shares)
        assert len(set(shares)) > 10
        assert shares[-1] == 1.0
