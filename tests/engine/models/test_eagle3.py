"""EAGLE-3: the layouts it is published in, tensor by tensor, and that what drafts is what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pilotfish.checkpoints.huggingface import is_eagle3
from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.models import eagle3_checkpoint
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.config import Eagle3Config, ModelConfig, RopeConfig, default_feature_layers
from pilotfish.engine.models.eagle3 import Eagle3Model, SharedWeights
from pilotfish.engine.weights import int8
from pilotfish.errors import ConfigError, ModelError
from pilotfish.tools.training.eagle3 import Eagle3Draft

VOCAB, DRAFT_VOCAB, HIDDEN, TARGET_HIDDEN = 96, 32, 64, 64
CPU = torch.device("cpu")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SAFEAILAB = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFT_VOCAB,
    "norm_before_residual": True,
    "target_hidden_size": TARGET_HIDDEN,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
    "transformer_layer_config": LLAMA,
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "someone/target"}},
}


def random_tensors(prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A draft's tensors as the layouts have them; `prefix` is what they call the layer."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    keys = HIDDEN // 4 * 2
    tensors = {
        "fc.weight": tensor(HIDDEN, 3 * TARGET_HIDDEN),
        f"{prefix}.hidden_norm.weight": tensor(HIDDEN) + 1,
        f"{prefix}.input_layernorm.weight": tensor(HIDDEN) + 1,
        f"{prefix}.post_attention_layernorm.weight": tensor(HIDDEN) + 1,
        f"{prefix}.self_attn.q_proj.weight": tensor(HIDDEN, 2 * HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": tensor(keys, 2 * HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": tensor(keys, 2 * HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": tensor(HIDDEN, HIDDEN),
        f"{prefix}.mlp.gate_proj.weight": tensor(96, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": tensor(96, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": tensor(HIDDEN, 96),
        "norm.weight": tensor(HIDDEN) + 1,
        "lm_head.weight": tensor(DRAFT_VOCAB, HIDDEN),
    }
    ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    tensors["d2t"] = ids - torch.arange(DRAFT_VOCAB)
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[ids] = True
    tensors["t2d"] = mask
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], pickled: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, str(folder / "model.safetensors"))
    return folder


LAYOUTS = {
    "SafeAILab": (SAFEAILAB, "midlayer", False),
    "SafeAILab, pickled": (SAFEAILAB, "midlayer", True),
    "SafeAILab's config, the layer by number": (SAFEAILAB, "layers.0", False),
    "speculators": (SPECULATORS, "layers.0", False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_layout_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    config, prefix, pickled = LAYOUTS[name]
    stored = random_tensors(prefix)
    folder = write(tmp_path / "draft", config, stored, pickled)
    assert is_eagle3(folder)
    with pytest.raises(ModelError, match="is an EAGLE-3 head"):
        read_hf_config(folder)
    shape = eagle3_checkpoint.read_config(folder)
    read = eagle3_checkpoint.read_weights(folder, shape, torch.float32)

    assert shape.draft_vocab_size == DRAFT_VOCAB
    assert (shape.decoder.hidden_size, shape.decoder.num_heads, shape.decoder.num_kv_heads) == (HIDDEN, 4, 2)
    speculators = config is SPECULATORS
    assert shape.norm_before_residual is speculators
    assert shape.feature_layers == ((1, 3, 5) if speculators else ())
    expected = {
        name.replace(f"{prefix}.", "layer."): tensor for name, tensor in stored.items() if name not in ("d2t", "t2d")
    }
    assert read.keys() == {*expected, "target_ids"}
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    assert torch.equal(read["target_ids"], stored["t2d"].nonzero().squeeze(1))


def test_a_draft_with_an_embedding_and_the_target_s_vocabulary(tmp_path: Path) -> None:
    stored = random_tensors("midlayer") | {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    for name in ("d2t", "t2d", "lm_head.weight"):
        del stored[name]
    config = {key: value for key, value in SAFEAILAB.items() if key != "draft_vocab_size"}
    folder = write(tmp_path / "draft", config, stored)
    shape = eagle3_checkpoint.read_config(folder)
    read = eagle3_checkpoint.read_weights(folder, shape, torch.float32)
    assert shape.draft_vocab_size == VOCAB
    assert torch.equal(read["embed_tokens.weight"], stored["embed_tokens.weight"])
    assert "lm_head.weight" not in read
    assert "target_ids" not in read


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, tensors: tensors.pop("fc.weight"), "fc.weight"),
        (lambda config, tensors: tensors.update({"midlayer.extra.weight": torch.ones(1)}), "layer.extra.weight"),
        (lambda config, tensors: tensors.update({"norm.weight": torch.ones(3)}), "norm.weight"),
        (lambda config, tensors: tensors.pop("d2t"), "d2t"),
        (lambda config, tensors: tensors.update({"d2t": torch.full((DRAFT_VOCAB,), VOCAB)}), "d2t"),
        (lambda config, tensors: tensors.update({"d2t": torch.zeros(3, dtype=torch.int64)}), "d2t"),
        (lambda config, tensors: tensors["d2t"].fill_(0)[:1].fill_(-1), "leads to tokens -1 to"),
        (lambda config, tensors: config.update({"norm_before_fc": True}), "norm_before_fc"),
        (lambda config, tensors: config.update({"num_hidden_layers": 2}), "num_hidden_layers"),
        (
            lambda config, tensors: config.update({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1]}}),
            "eagle_aux_hidden_state_layer_ids",
        ),
        (lambda config, tensors: tensors.update({"fc.weight": tensors["fc.weight"].to(torch.int8)}), "fc.weight_scale"),
    ],
)
def test_what_cannot_be_read_is_named(change: Any, said: str, tmp_path: Path) -> None:
    config, tensors = dict(SAFEAILAB), random_tensors("midlayer")
    change(config, tensors)
    folder = write(tmp_path / "draft", config, tensors)
    with pytest.raises(ModelError, match=said.replace(".", r"\.")):
        eagle3_checkpoint.read_weights(folder, eagle3_checkpoint.read_config(folder), torch.float32)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SAFEAILAB))
    with pytest.raises(ModelError, match=r"model\.safetensors nor pytorch_model\.bin"):
        eagle3_checkpoint.read_weights(tmp_path, eagle3_checkpoint.read_config(tmp_path), torch.float32)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        is_eagle3(tmp_path)


def test_int8_rows_are_within_half_a_step(tmp_path: Path) -> None:
    stored = random_tensors("midlayer")
    quantized = dict(stored)
    for name, tensor in stored.items():
        if tensor.ndim == 2:
            quantized[name], quantized[f"{name}_scale"] = int8.quantize(tensor)
    folder = write(tmp_path / "draft", SAFEAILAB, quantized)
    read = eagle3_checkpoint.read_weights(folder, eagle3_checkpoint.read_config(folder), torch.float32)
    for name in ("fc.weight", "lm_head.weight"):
        scale = read[f"{name}_scale"]
        assert read[name].dtype == torch.int8
        assert (read[name] * scale - stored[name]).abs().le(scale * 0.5001).all()
    halves = eagle3_checkpoint.read_weights(folder, eagle3_checkpoint.read_config(folder), torch.bfloat16)
    assert "fc.weight_scale" not in halves
    torch.testing.assert_close(halves["fc.weight"].float(), stored["fc.weight"], atol=0.02, rtol=0.02)


def test_default_feature_layers_are_those_of_the_published_drafts() -> None:
    assert default_feature_layers(32) == (2, 16, 29)  # Llama-3.1-8B
    assert default_feature_layers(80) == (2, 40, 77)  # Llama-3.3-70B


@pytest.mark.parametrize(("layers", "named"), [((), "2, 0, -2"), ((0, 1, 2), "0, 1, 2")])
def test_a_target_must_have_the_layers_that_are_read(layers: tuple[int, ...], named: str) -> None:
    target = decoder(kv_heads=2)
    shape = Eagle3Config(decoder=target, draft_vocab_size=VOCAB, target_hidden_size=HIDDEN, feature_layers=layers)
    with pytest.raises(ConfigError, match=rf"drafter 'head' reads layers \({named}\), the target has 1:"):
        eagle3_checkpoint.check_target("head", shape, target)


def decoder(kv_heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
    )


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_what_drafts_is_what_was_trained(kv_heads: int) -> None:
    """The head in the engine, row by row over its paged cache, against the unrolled one that training has."""
    torch.manual_seed(1)
    config = Eagle3Config(
        decoder=decoder(kv_heads),
        draft_vocab_size=DRAFT_VOCAB,
        target_hidden_size=TARGET_HIDDEN,
        feature_layers=(0, 1, 2),
    )
    trained = Eagle3Draft(config, torch.randn(VOCAB, HIDDEN), 128)
    for norm in (trained.input_layernorm, trained.hidden_norm, trained.post_attention_layernorm, trained.norm):
        assert isinstance(norm, torch.Tensor)
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    parts = {"fc": trained.fc, "lm_head": trained.lm_head, "norm": trained.norm}
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        parts[f"layer.{name}"] = getattr(trained, name)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        parts[f"layer.self_attn.{name}"] = getattr(trained, name)
    for name in ("gate_proj", "up_proj", "down_proj"):
        parts[f"layer.mlp.{name}"] = getattr(trained, name)
    kernels, attention = TorchKernels(), TorchAttention()
    embedding = kernels.prepare_linear(trained.embedding)
    weights = {f"{name}.weight": weight.detach() for name, weight in parts.items()}
    model = Eagle3Model(
        config, kernels, attention, weights, 128, CPU, torch.float32, SharedWeights(embedding, embedding)
    )
    steps, length, block_size = 4, 24, 16
    tokens = torch.randint(VOCAB, (1, length))
    features = torch.randn(1, length, 3 * TARGET_HIDDEN)
    with torch.no_grad():
        unrolled = list(trained.unroll(features, tokens, steps))
        cache = attention.allocate(4, block_size, kv_heads, 16, torch.float32, CPU)
        for anchor in (0, 5, 17):
            rows = anchor + 1
            span = Span(tokens[0, 1 : rows + 1].tolist(), 0, [2, 1, 3])
            batch = flatten([span], block_size, CPU)
            fused = model.fuse(features[0, :rows])
            out = model.forward(fused, batch.arrays.token_ids, batch.arrays.positions, batch.attention, cache)
            torch.testing.assert_close(out, unrolled[0][0, :rows], rtol=1e-4, atol=1e-4)
            hidden = out[-1:]
            for step in range(1, steps):
                span = Span([int(tokens[0, anchor + 1 + step])], anchor + step, [2, 1, 3])
                batch = flatten([span], block_size, CPU)
                hidden = model.forward(hidden, batch.arrays.token_ids, batch.arrays.positions, batch.attention, cache)
                torch.testing.assert_close(hidden, unrolled[step][0, anchor : anchor + 1], rtol=1e-4, atol=1e-4)
                wanted = trained.logits(unrolled[step][0, anchor : anchor + 1])
                torch.testing.assert_close(model.logits(hidden), wanted, rtol=1e-4, atol=1e-4)
