"""`pilotfish selftest`: it passes here, and each of its checks fails where what it is for is broken."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pilotfish.engine.config import EngineConfig
from pilotfish.engine.execution.graphs import EagerGraphs, _Padding
from pilotfish.engine.kernels.native import NativeKernels
from pilotfish.engine.kernels.torch import TorchKernels
from pilotfish.engine.layers import fused_decoder
from pilotfish.engine.layers.attention.native import NativeAttention
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.decoder import DecoderLayer
from pilotfish.engine.layers.fused_decoder import FusedDecoder
from pilotfish.engine.models.checkpoint import read_hf_config
from pilotfish.engine.sampling import processors
from pilotfish.server.cli import main as cli
from pilotfish.server.cli import selftest
from pilotfish.server.cli.selftest import report
from pilotfish.server.cli.settings import settings_of
from pilotfish.tools.checkpoint import config_of, write_model
from pilotfish.tools.planner.devices import DEVICES
from pilotfish.tools.planner.published import PUBLISHED
from pilotfish.tools.selftest import graphs, parallel, small, speed
from pilotfish.tools.selftest.check import Check, Finding, Result, Skip, run_check
from pilotfish.tools.selftest.environment import Environment
from pilotfish.tools.selftest.groups import run_group
from pilotfish.tools.selftest.precision import Worst, units
from pilotfish.tools.selftest.run import GROUPS, run_groups
from pilotfish.tools.selftest.settings import SelfTest
from tests.support import selftest_child
from tests.support.broken_verifier import GullibleVerifier
from tests.support.native import needs_native
from tests.support.paths import ROOT

pytestmark = [needs_native, pytest.mark.process, pytest.mark.slow]

QUICK = ["selftest", "--quick", "--num-threads", "1"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Result]]:
    """`run(group, **settings)`: the results of a group's checks in this process, by their names."""

    def of(group: str, quick: bool = True, **settings: Any) -> dict[str, Result]:
        config = EngineConfig(**{"num_threads": 1, **settings})
        test = SelfTest(config=config, directory=str(tmp_path), quick=quick)
        return {result.name: result for result in run_group(test, group, (), lambda name: None)}

    return of


def failed(results: dict[str, Result]) -> list[str]:
    return [name for name, result in results.items() if result.verdict == "failed"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a whole run in this process."""
    path = tmp_path_factory.mktemp("selftest") / "result.json"
    return cli.main([*QUICK, "--no-isolate", "--json", str(path)]), json.loads(path.read_text())


def test_nothing_fails_here(whole: tuple[int, dict[str, Any]]) -> None:
    status, found = whole
    assert [result for result in found["results"] if result["verdict"] == "failed"] == []
    assert (status, found["passed"]) == (0, True)
    assert list(dict.fromkeys(result["group"] for result in found["results"])) == list(GROUPS)
    assert sum(result["verdict"] == "passed" for result in found["results"]) > 40


def test_json_has_all_of_each_check(whole: tuple[int, dict[str, Any]]) -> None:
    _, found = whole
    assert set(found) == {"version", "pilotfish", "passed", "settings", "environment", "results"}
    assert found["settings"] == {"num_threads": 1}
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["environment"]["device"] == "cpu"
    seen = set()
    for each in found["results"]:
        result = msgspec.convert(each, Result)
        assert set(each) == set(Result.__struct_fields__)
        assert (result.group, result.name) not in seen
        seen.add((result.group, result.name))
        assert result.compares
        match result.verdict:
            case "passed":
                assert result.measured is not None
                assert result.bound is not None
                assert result.why
            case "measured":
                assert result.bound is None
                assert result.measured is not None
            case _:
                assert result.detail


def spoiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, one number in some being off by a hundredth."""

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        result = function(*arguments, **named).clone()
        result.view(-1)[len(result.view(-1)) // 2] *= 1.01
        return result

    return wrong


@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "gelu_mul", "embed", "linear"])
@pytest.mark.parametrize("kernels", [NativeKernels, TorchKernels])
def test_a_wrong_kernel_is_named(
    kernels: type[NativeKernels | TorchKernels], name: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, name, spoiled(getattr(kernels, name)))
    wrong = [each.rpartition(", ")[0] for each in failed(run("kernels"))]
    also = ["linear, fp8 weights, torch"] if (kernels, name) == (TorchKernels, "linear") else []
    assert wrong == [f"{name}, {kernels.name}", *also]


def test_a_wrong_rotation_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchKernels.rotate_
    monkeypatch.setattr(TorchKernels, "rotate_", lambda self, x, positions, table: right(self, x, positions + 1, table))
    assert failed(run("kernels")) == ["rotate, torch, float32"]


def test_a_wrong_fp8_scale_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchKernels.prepare_linear
    monkeypatch.setattr(
        TorchKernels,
        "prepare_linear",
        lambda self, weight, bias=None, scale=None: right(self, weight, bias, None if scale is None else scale.flip(0)),
    )
    assert failed(run("kernels")) == ["linear, fp8 weights, torch, float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes(dtype: str, run: Any) -> None:
    for group in ("kernels", "attention", "logits"):
        results = run(group, dtype=dtype)
        assert failed(results) == []
        assert any(dtype in name or group == "logits" for name in results)


@pytest.mark.parametrize("backend", [NativeAttention, TorchAttention])
@pytest.mark.parametrize("kind", ["window", "scale", "causal", "cache"])
def test_wrong_attention_is_named(
    backend: type[NativeAttention | TorchAttention], kind: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = backend.attend

    def wrong(self, query, key, value, cache, batch, params):
        match kind:
            case "window":
                params = dataclasses.replace(params, window=None)
            case "scale":
                params = dataclasses.replace(params, scale=0.9 * params.scale)
            case "causal":  # each query sees a key less, but for the first
                keys = value.clone()
                keys[1:] = value[:-1]
                value = keys
            case "cache":
                out = right(self, query, key, value, cache, batch, params)
                others = set(range(len(cache.values))).difference(batch.block_tables.flatten().tolist())
                cache.values[min(others), 0] = 1.0  # in a block that none of these sequences has
                return out
        return right(self, query, key, value, cache, batch, params)

    monkeypatch.setattr(backend, "attend", wrong)
    names = {name.partition(", ")[0] for name in failed(run("attention", quick=False)) if backend.name in name}
    every = {"prefill", "decode", "verify spans", "mixed spans", "block boundaries", "sliding window", "grouped heads"}
    expected = {"window": {"sliding window"}, "cache": {"cache write"}}.get(kind, every)
    assert names >= expected
    if kind in ("window", "cache"):
        assert names == expected


def test_flash_attention_is_checked_where_it_is(flash_attn: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stand-ins on a CPU that passes for a Hopper."""
    flash_attn((9, 0))
    results = run("attention", quick=False, dtype="bfloat16")
    assert failed(results) == []
    for backend in ("flash4 (in use)", "flash2", "triton", "torch"):
        own = {name: result.verdict for name, result in results.items() if f", {backend}, bfloat16" in name}
        assert len(own) == 10
        assert own.pop(f"fp8 cache, {backend}, bfloat16") == ("passed" if backend in ("torch", "triton") else "skipped")
        assert set(own.values()) == {"passed"}
    module = sys.modules["flash_attn"]
    right = module.flash_attn_with_kvcache

    def shifted(*arguments: Any, window_size: tuple[int, int] = (-1, -1), **named: Any) -> torch.Tensor:
        return right(*arguments, window_size=(window_size[0] - (window_size[0] > 0), window_size[1]), **named)

    shifted.__signature__ = inspect.signature(right)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "flash_attn_with_kvcache", shifted)
    assert failed(run("attention", quick=False, dtype="bfloat16")) == ["sliding window, flash2, bfloat16"]


@pytest.mark.parametrize(
    ("target", "wrong", "names"),
    [
        (
            "pilotfish.tools.selftest.sampling._bits31",
            lambda keys, tokens: torch.ones(len(keys), tokens.shape[1], dtype=torch.int32),
            ["noise, bits"],
        ),
        ("pilotfish.engine.sampling.sampler.row_key", lambda seed, place, stream: seed ^ place, ["drawn tokens"]),
        (
            "pilotfish.engine.sampling.sampler.argmax",
            lambda scores: (scores.argmax(1) + 1).tolist(),
            ["greedy tokens"],  # drawn ones are the native kernel's
        ),
    ],
)
def test_wrong_noise_or_drawing_is_named(
    target: str, wrong: Any, names: list[str], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, wrong)
    assert failed(run("sampling")) == names


@pytest.mark.parametrize("field", ["top_k", "top_p", "min_p"])
def test_wrong_truncation_is_named(field: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = processors.kept_ids

    def wrong(scaled, total, params):
        value = getattr(params, field)
        other = {"top_k": value and value + 1, "top_p": 0.5 + value / 2, "min_p": 0.9 * value}[field]
        return right(scaled, total, msgspec.structs.replace(params, **{field: other}))

    monkeypatch.setattr(processors, "kept_ids", wrong)
    wanted = {"top_k": ["top_k"], "top_p": ["top_p", "top_k and top_p"], "min_p": ["min_p"]}[field]
    found = failed(run("sampling"))
    assert [name for name in found if "truncation" in name][: len(wanted)] == [f"truncation, {name}" for name in wanted]


def without_window(layer: DecoderLayer) -> DecoderLayer:
    return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, window=None))


@pytest.mark.parametrize("what", ["rms_norm", "window", "rope"])
def test_wrong_models_are_named(what: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only shows in a whole model, too: a window that a layer should have, positions that are off by one."""
    if what == "rms_norm":
        right = NativeKernels.rms_norm
        monkeypatch.setattr(NativeKernels, "rms_norm", lambda self, x, weight, eps: right(self, x, weight.flip(0), eps))
        wanted = set(small.KINDS)
    elif what == "window":
        monkeypatch.setattr(
            fused_decoder, "_layer", lambda layer, real=fused_decoder._layer: real(without_window(layer))
        )
        wanted = {"mistral", "gemma3"}
    else:
        forward = FusedDecoder.forward
        monkeypatch.setattr(
            FusedDecoder, "forward", lambda self, x, at, *rest: forward(self, x, at + (at > 70).long(), *rest)
        )
        wanted = set(small.KINDS)
    assert failed(run("logits")) == [f"small {kind} model" for kind in small.KINDS if kind in wanted]


def test_a_verifier_that_believes_drafts_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pilotfish.engine.verification.choose.CoupledVerifier", GullibleVerifier)
    monkeypatch.setattr("pilotfish.tools.selftest.run.GROUPS", ("text",))
    assert cli.main([*QUICK, "--no-isolate"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED text: greedy, small model" in printed
    assert "FAILED text: sampled, small model" in printed
    assert "first: " in printed
    assert "FAILED: 2 failed, in" in printed


def test_stale_and_disturbed_passes_are_found(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run("graphs")
    assert failed(results) == []
    assert results["replayed passes"].detail == "there are no CUDA graphs on cpu"
    assert results["padded passes"].detail == "7 of 7 batches in a bucket"

    class Stale(EagerGraphs):
        """Replays what it computed at its capture."""

        def capture(self, function: Any, inputs: Any, outputs: Any) -> Any:
            function()
            return lambda: None

    monkeypatch.setattr(graphs, "EagerGraphs", Stale)
    assert failed(run("graphs")) == ["padded passes"]
    monkeypatch.undo()
    right = _Padding.fill

    def disturbed(self: Any, bucket: Any, host: Any) -> Any:
        """Rows of padding overwrite what the first row has written."""
        buffer, width = right(self, bucket, host)
        slots = self.layout(bucket, width).on_host(buffer).slots
        slots[slots // self.block_size == self.block] = slots[0]
        return buffer, width

    monkeypatch.setattr(_Padding, "fill", disturbed)
    assert failed(run("graphs")) == ["padded passes"]


def test_two_ranks(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = parallel._Pair.__dict__["sharded"].func
    kept: list[Any] = []

    def sharded(self: Any) -> Any:
        """The two ranks' results, which do not change below."""
        if not kept:
            kept.append(compute(self))
        return kept[0]

    monkeypatch.setattr(parallel._Pair, "sharded", property(sharded))
    results = run("parallel", tensor_parallel_size=2)
    assert failed(results) == []
    assert results["all-reduce, latency"].measured > 0
    assert "8 of 8 texts identical" in results["greedy, small model"].detail
    right = parallel._Pair.config

    def other(self: Any, ranks: int) -> EngineConfig:
        """One rank has another model's weights."""
        model = self.target.subject.small("llama", ranks=2, seed=1)
        return msgspec.structs.replace(right(self, ranks), model=str(model))

    monkeypatch.setattr(parallel._Pair, "config", other)
    monkeypatch.setattr(parallel, "measure_all_reduce", None)
    names = failed(run("parallel", tensor_parallel_size=2))
    assert names[:3] == ["greedy, small model", "sampled, small model", "log-probabilities, small model"]


def test_a_model_of_the_users_own_is_tested(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.tools.selftest.run.GROUPS", ("kernels", "attention", "logits", "text", "speed"))
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {tiny('qwen3')}\nkv_cache_memory: 8MiB\nport: 9000\nmax_num_seqs: 8\n")
    path = tmp_path / "result.json"
    assert cli.main([*QUICK, "--no-isolate", "--config", str(settings), "--json", str(path)]) == 0
    own = [r for r in json.loads(path.read_text())["results"] if str(tiny("qwen3")) in r["name"]]
    assert [(r["group"], r["verdict"]) for r in own] == [
        ("logits", "passed"),
        *[("text", "passed")] * 2,
        *[("speed", "measured")] * 3,
    ]


def test_a_check_that_raises_has_failed_and_the_others_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    before = run("kernels")
    monkeypatch.setattr(TorchKernels, "silu_mul", broken)
    results = run("kernels")
    assert list(results) == list(before)
    assert failed(results) == ["silu_mul, torch, float32"]
    assert results["silu_mul, torch, float32"].detail.startswith("RuntimeError: CUDA error: an illegal memory access")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("abort", "its process ended by signal 6"),
        ("exit", "its process ended by status 3"),
        ("raise", "its process ended by status 1: RuntimeError: lost"),
        ("sleep", "it took longer than 3 s and was ended"),
    ],
)
def test_a_crash_or_a_hang_fails_one_check_alone(
    what: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a stand-in for a group's process, which has no torch to load and does this at its second check."""
    monkeypatch.setattr("pilotfish.tools.selftest.run.GROUPS", (what,))
    monkeypatch.setattr("pilotfish.tools.selftest.child.main", selftest_child.main)
    started: list[str] = []
    test = SelfTest(config=EngineConfig(), directory=str(tmp_path))
    limit = 3.0 if what == "sleep" else 60.0
    results = list(run_groups(test, lambda group, name: started.append(name), limit))
    assert [(each.name, each.verdict) for each in results] == [
        (name, "failed" if name == "b" else "passed") for name in "abcd"
    ]
    assert results[1].detail.startswith(reason)
    assert started == list("abcd")


def test_a_crash_or_a_lost_device_gets_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes that the groups really have: one check aborts, and after another every call fails, as after an
    illegal access on a GPU."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '--multiprocessing-fork' in sys.argv:\n"
        "    import torch\n"
        "    import pilotfish.tools.selftest.check as check\n"
        "    right, lost = check.run_check, []\n"
        "    def gone(*given): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "    def run_check(each, group):\n"
        "        if each.name == 'noise, log E': os.abort()\n"
        "        if each.name == 'truncation, min_p':\n"
        "            lost.append(True)\n"
        "            torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), gone\n"
        "        return right(check.Check(each.name, each.compares, gone if lost else each.run), group)\n"
        "    check.run_check = run_check\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setattr("pilotfish.tools.selftest.run.GROUPS", ("sampling",))
    test = SelfTest(config=EngineConfig(num_threads=1), directory=str(tmp_path), quick=True)
    results = {result.name: result for result in run_groups(test, lambda group, name: None)}
    assert failed(results) == ["noise, log E", "truncation, min_p"]
    assert results["noise, log E"].detail.startswith("its process ended by signal 6")
    assert results["truncation, min_p"].detail.startswith("RuntimeError: CUDA error")
    assert len(results) == 8


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kernels", "native", "--dtype", "bfloat16", "--isolate"], "kernels is 'native'"),
        (["--attention-backend", "flash4"], "attention_backend is 'flash4'"),
        (["--json", "/nowhere/at/all.json"], "json is '/nowhere/at/all.json'"),
        (["--max-batch-tokens", "4", "--max-num-seqs", "8"], "max_batch_tokens (4)"),
        (["--config", "/nowhere.yaml"], "cannot read the settings"),
        (["--model", "smollm2-135m", "--tensor-parallel-size", "2"], "num_heads (9) does not divide by 2"),
    ],
)
def test_settings_that_cannot_work_are_status_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*QUICK, "--no-isolate", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_hosts_are_checked_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("nnodes: 2\ntensor_parallel_size: 2\nmaster_addr: elsewhere\n")
    assert cli.main([*QUICK, "--no-isolate", "--config", str(settings)]) == 2
    assert "nnodes is 2, but the self-test checks one host at a time" in capsys.readouterr().err


def test_an_unknown_model_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--model", "/nowhere/model"]) == 1
    assert "/nowhere/model" in capsys.readouterr().err


def check(run: Callable[[], Finding]) -> Result:
    return run_check(Check("n", "a with b", run, "u", "because"), "g")


def test_verdicts() -> None:
    def skip() -> Finding:
        raise Skip("no reason")

    assert check(lambda: Finding(measured=1.0, bound=1.0)).verdict == "passed"
    assert check(lambda: Finding(measured=1.1, bound=1.0)).verdict == "failed"
    assert check(lambda: Finding(measured=1.1, bound=1.0, at_least=True)).verdict == "passed"
    assert check(lambda: Finding(measured=0.9, bound=1.0, at_least=True)).verdict == "failed"
    assert check(lambda: Finding(measured=1.0)).verdict == "measured"
    for bound in (None, 1.0):
        assert check(partial(Finding, measured=math.nan, bound=bound)).verdict == "failed"
    assert (check(skip).verdict, check(skip).detail) == ("skipped", "no reason")


def test_a_number_that_is_none_is_the_worst_error() -> None:
    wanted = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    assert units(wanted.clone(), wanted, torch.bfloat16) == 0
    assert units(wanted + torch.tensor([0, 0, 4 * eps]), wanted, torch.bfloat16) == pytest.approx(1)
    assert math.isnan(units(torch.tensor([[1.0, math.nan, 4.0]]), wanted, torch.bfloat16))
    worst = Worst()
    for error, where in ((1.0, "a"), (math.nan, "b"), (5.0, "c")):
        worst.add(error, where)
    assert math.isnan(worst.finding(10.0).measured)
    assert worst.finding(10.0).detail == "largest at b"


def test_the_report_says_what_failed_and_why_others_were_not_done() -> None:
    common: dict[str, Any] = {"compares": "a with b", "unit": "ms"}
    results = [
        Result(group="g", name="fine", verdict="passed", measured=1.0, bound=4.0, **common),
        Result(group="g", name="slow", verdict="failed", measured=9.0, bound=4.0, why="of a reason", **common),
        Result(group="g", name="broken", verdict="failed", detail="ValueError: no", **common),
        Result(group="g", name="no number", verdict="failed", measured=math.nan, bound=4.0, **common),
        Result(group="speed", name="no rate", verdict="failed", measured=0.0, bound=4.0, at_least=True, **common),
        Result(group="speed", name="endless", verdict="failed", measured=math.inf, **common),
        *(Result(group="s", name=f"not {i}", verdict="skipped", detail="no GPU", **common) for i in range(5)),
        Result(group="speed", name="copy", verdict="measured", measured=12.5, **common),
    ]
    environment = msgspec.convert(
        {
            **dict.fromkeys(("system", "processor", "python", "device", "dtype", "kernels"), "x"),
            "cores": 2,
            "memory": 1 << 30,
            "packages": {},
            "peers": [[True, False], [False, True]],
            "gpus": [{"name": "H100", "capability": "9.0", "memory": 1 << 36, "free": 1 << 35}] * 2,
        },
        Environment,
    )
    text = "\n".join(report(environment, results, 3.0, verbose=False))
    assert "FAILED g: slow\n  compares a with b\n  measured 9 ms\n  bound: at most 4, since of a reason" in text
    assert "FAILED g: broken\n  compares a with b\n  ValueError: no" in text
    assert "FAILED g: no number\n  compares a with b\n  measured nan ms\n  bound: at most 4" in text
    assert "FAILED speed: no rate\n  compares a with b\n  measured 0 ms\n  bound: at least 4" in text
    assert "measured inf ms" in text
    assert "skipped s: not 0, s: not 1, s: not 2 and 2 more: no GPU" in text
    assert "GPU 1: H100, 9.0, 64.0 GiB, 32.0 GiB free" in text
    assert "GPUs that cannot reach each other's memory: 0 and 1" in text
    assert "FAILED: 1 passed, 5 failed, 5 skipped, 1 measured, in 3 s" in text
    assert "25% of it: fine" in text


def test_llama_8b_is_as_published(tmp_path: Path) -> None:
    assert read_hf_config(small.write_llama_8b(tmp_path)) == PUBLISHED["llama-3.1-8b"]


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.architecture == "llama"])
def test_a_written_config_describes_the_same_shape(name: str, tmp_path: Path) -> None:
    shape = dataclasses.replace(PUBLISHED[name], quantization=None)
    assert read_hf_config(write_model(tmp_path, config_of(shape))) == shape


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_small_models_divide(ranks: int, tmp_path: Path) -> None:
    shape = read_hf_config(small.write(tmp_path, "llama", ranks=ranks))
    for size in (shape.num_heads, shape.num_kv_heads, shape.intermediate_size // 16):
        assert size % ranks == 0


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_cards_data_sheet(name: str, known: str | None) -> None:
    found = speed.peaks(name)
    assert (found and found.name) == known


def test_a_slow_card_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were this CPU an H100, none of its figures would do."""
    right = speed._Model.__init__
    monkeypatch.setattr(speed, "card_of", lambda subject: DEVICES["h100"])
    monkeypatch.setattr(
        speed._Model, "__init__", lambda self, subject, config, judged: right(self, subject, config, judged=True)
    )
    monkeypatch.setattr(speed, "EIGHT_B_MEMORY", 0)
    names = failed(run("speed"))
    assert {"memory, copy", "decode pass, small model"} <= set(names)
    assert set(names) <= {"memory, copy", "decode pass, small model", "verify 5 tokens, small model"}


def test_flags_and_fields_are_documented() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text().partition("## Self-test")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(--[a-z-]+)`", page))
    parser = argparse.ArgumentParser()
    command = selftest.COMMAND.add_to(parser.add_subparsers())
    engine = {flag for setting in settings_of(EngineConfig) for flag in (setting.flag, f"--no-{setting.flag[2:]}")}
    own = {flag for action in command._actions for flag in action.option_strings if flag.startswith("--")} - engine
    assert own - {"--help"} <= documented
    assert documented <= own | engine
    fields = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z_]+)`", line)}
    assert set(Result.__struct_fields__) <= fields
    assert set(GROUPS) <= fields


def test_the_command_itself_imports_no_torch(tmp_path: Path) -> None:
    """Libraries that crash on import, torch among them, crash in a group's process."""
    program = (
        f"import sys, pilotfish.server.cli.main, pilotfish.tools.selftest.run as run; run.GROUPS = ('kernels',); "
        f"status = pilotfish.server.cli.main.main({[*QUICK, '--json', str(tmp_path / 'result.json')]}); "
        "assert status == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert {result["verdict"] for result in results} == {"passed"}
    assert len(results) == 13
