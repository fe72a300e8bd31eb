"""A GPU that is there and cannot be used is an error that says why; a machine without one computes on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.device import gpu
from pilotfish.engine.device.gpu import driver_version, sign_of_gpu, use_gpu
from pilotfish.engine.llm import LLM
from pilotfish.engine.ranks.devices import assign_device
from pilotfish.errors import ConfigError

OLD_DRIVER = RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please update it.")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing says that this machine has a GPU, and torch sees none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "nvidia_smi", lambda *arguments: None)
    for name in ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sign_of_gpu, "__defaults__", (tmp_path,))
    monkeypatch.setattr(driver_version, "__defaults__", (tmp_path,))


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], None]:
    """`put(path, text)`: a file of what passes for this machine's file system."""

    def write(path: str, text: str = "") -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


@given(device=st.sampled_from(["auto", "cpu"]), visible=st.sampled_from([None, *gpu.NOT_GIVEN]))
@pytest.mark.usefixtures("no_gpu")
def test_without_a_sign_of_a_gpu_the_cpu_computes(device: str, visible: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if visible is not None:
            patch.setenv("NVIDIA_VISIBLE_DEVICES", visible)
        assert not use_gpu(device)


SIGNS = {
    "node": "this machine has a GPU (/dev/nvidia0), and torch",
    "nvidia-smi": "this machine has a GPU (nvidia-smi: GPU 0: NVIDIA L4), and torch",
    "container": "this container is meant to have a GPU (NVIDIA_VISIBLE_DEVICES is 'all'), but has no /dev/nvidia0",
}


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_cannot_be_used_is_an_error(
    sign: str, put: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\nGCC version: 12.3.0"
    put("proc/driver/nvidia/version", version)
    match sign:
        case "node":
            put("dev/nvidia0")
        case "nvidia-smi":
            monkeypatch.setattr(gpu, "nvidia_smi", lambda *arguments: "GPU 0: NVIDIA L4 (UUID: GPU-1)")
        case "container":
            monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")

    def init() -> None:
        raise OLD_DRIVER

    monkeypatch.setattr(torch.cuda, "init", init)
    for start in (
        lambda: LLM(str(tiny_llama)),
        lambda: LLM("no-such-folder/at-all.gguf"),  # before a model is looked for
        lambda: use_gpu("cuda"),
        lambda: assign_device(EngineConfig(tensor_parallel_size=2), 1),
    ):
        with pytest.raises(ConfigError) as refusal:
            start()
        said = str(refusal.value)
        assert SIGNS[sign] in said
        assert str(OLD_DRIVER).rstrip(".") in said
        assert "the driver's version is 550.54.14" in said
        assert "device 'cpu'" in said
    with LLM(str(tiny_llama), device="cpu") as llm:
        assert llm.info.device == "cpu"


@pytest.mark.parametrize("hidden", gpu.HIDDEN)
@pytest.mark.usefixtures("no_gpu")
def test_a_hidden_gpu_is_none(hidden: str, put: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    put("dev/nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not use_gpu("auto")
    with pytest.raises(ConfigError, match=r"no GPU was found here, and torch .* says: "):
        use_gpu("cuda")


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call, of a program that answers as nvidia-smi does, fails, or is not there."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    root = tmp_path / "root"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpus ] && echo "GPU 0: NVIDIA H200 (UUID: GPU-1)" && exit\necho 580.95.05\n'
    )
    program.chmod(0o755)
    assert sign_of_gpu({}, root) == "this machine has a GPU (nvidia-smi: GPU 0: NVIDIA H200)"
    assert driver_version(root) == "580.95.05"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver'\nexit 9\n"
    )
    assert sign_of_gpu({}, root) is None
    assert driver_version(root) is None
