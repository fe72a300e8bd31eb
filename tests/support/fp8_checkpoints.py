"""Checkpoints with weights in fp8, in the layouts in which they are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.models.registry import tensors_of
from pilotfish.engine.weights.fp8 import quantize
from pilotfish.engine.weights.quantization import Quantization

FBGEMM = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
}
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


def compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"weights": weights, "input_activations": activations, "output_activations": None, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers.0.mlp.(gate|up)_proj"],
    }


LAYOUTS = {
    "fbgemm_fp8": (FBGEMM, "channel"),
    "compressed-channel": (compressed("channel"), "channel"),
    "compressed-tensor": (compressed("tensor"), "tensor"),
    "auto-fp8": (AUTO_FP8, "tensor"),
}


def publish(source: Path, target: Path, layout: str) -> tuple[Path, Path]:
    """A checkpoint in that layout, and its twin with the same matrices, rounded, as plain float32 weights."""
    config, strategy = LAYOUTS[layout]
    unquantized = config.get("modules_to_not_convert") or config.get("ignore") or config["ignored_layers"]
    quantization = Quantization("fp8", tuple(unquantized))
    declared = tensors_of(read_hf_config(source))
    tensors, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = plain[name] = tensor
        if name not in declared or not quantization.takes(declared[name]):
            continue
        weight, scale = quantize(tensor)
        if strategy == "tensor":
            scale = (tensor.abs().amax() / 448).reshape(1)
            weight = (tensor / scale).to(torch.float8_e4m3fn)
        tensors[name] = weight
        tensors[name + "_scale"] = scale if layout != "compressed-channel" else scale.bfloat16()
        if layout == "auto-fp8":
            tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor([0.5])
        plain[name] = weight.float() * tensors[name + "_scale"].float()
    folders = target / "fp8", target / "plain"
    for folder, content in zip(folders, (tensors, plain), strict=True):
        shutil.copytree(source, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return folders
