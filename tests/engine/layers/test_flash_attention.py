"""Attention over flash-attn's functions (their stand-ins in torch, on the CPU) against torch's own attention."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engine.execution.batch import Span, flatten
from pilotfish.engine.layers.attention.backend import AttentionParams
from pilotfish.engine.layers.attention.choose import AttentionNeeds, choose_attention, why_not
from pilotfish.engine.layers.attention.flash import Flash2Attention, Flash4Attention, load_flash2, load_flash4
from pilotfish.engine.layers.attention.torch import TorchAttention
from pilotfish.engine.layers.attention.unsplit import SHORT, UnsplitAttention
from pilotfish.errors import ConfigError
from tests.support.flash_attn_standin import REQUIRED, SIGNATURES, Refused, modules

CPU = torch.device("cpu")
HOPPER, B200, B300, ADA, CONSUMER_BLACKWELL = (9, 0), (10, 0), (11, 0), (8, 9), (12, 0)


def signature(function) -> list[tuple[str, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, REQUIRED if p.default is inspect.Parameter.empty else p.default) for p in parameters]


@pytest.mark.parametrize("name", SIGNATURES)
def test_stand_ins_have_the_real_signatures(name):
    module, _, function = name.rpartition(".")
    assert signature(getattr(modules(B200)[module], function)) == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_real_signatures_are_these(name):
    """Where the packages are installed: newer ones may have more parameters behind these."""
    module, _, function = name.rpartition(".")
    real = pytest.importorskip(module, reason=f"{module} is not installed here", exc_type=ImportError)
    if not hasattr(real, function):  # flash-attn-4 alone is a namespace of the other's name
        pytest.skip(f"{module} has no {function} here")
    found = dict(signature(getattr(real, function)))
    assert {name: found.get(name) for name, _ in SIGNATURES[name]} == dict(SIGNATURES[name])


def flash2(calls=None):
    package = modules(HOPPER, calls)["flash_attn"]
    return Flash2Attention(package.flash_attn_varlen_func, package.flash_attn_with_kvcache)


def flash4(capability, calls=None):
    return Flash4Attention(modules(capability, calls)["flash_attn.cute"].flash_attn_varlen_func, capability[0] != 9)


BACKENDS = {"flash2": (flash2, 256), "hopper": (lambda: flash4(HOPPER), 128), "blackwell": (lambda: flash4(B200), 128)}


@st.composite
def batches(draw):
    """Some sequences, each computed up to somewhere, and what the next step adds: decode, verify and prefill spans."""
    sequences = [
        (draw(st.integers(0, 300)), draw(st.one_of(st.just(1), st.integers(2, 9), st.integers(10, 90))))
        for _ in range(draw(st.integers(1, 4)))
    ]
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "sequences": sequences,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([16, 64, 128])),
        "window": draw(st.sampled_from([None, None, 1, 7, 128, 1000])),
        "softcap": draw(st.sampled_from([None, 5.0, 50.0])),
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 1000)),
    }


def attend(backend, block_size, batch, cache_dtype=None):
    """The step's rows out of `backend`, after another step that has filled the cache before them."""
    generator = torch.Generator().manual_seed(batch["seed"])
    heads, kv_heads, dim, dtype = batch["heads"], batch["kv_heads"], batch["head_dim"], batch["dtype"]
    needed = [-(-(start + length) // block_size) for start, length in batch["sequences"]]
    blocks = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    cache = backend.allocate(len(blocks), block_size, kv_heads, dim, cache_dtype or dtype, CPU)
    tables = [[blocks.pop() for _ in range(count)] for count in needed]
    steps = ([(0, start) for start, _ in batch["sequences"]], batch["sequences"])
    out = torch.empty(0)
    torch.manual_seed(batch["seed"])
    for step in steps:
        spans = [Span([0] * n, start, table) for (start, n), table in zip(step, tables, strict=True) if n]
        if not spans:
            continue
        flat = flatten(spans, block_size, CPU).attention
        qkv = torch.randn(int(flat.cu_query_lens[-1]), heads + 2 * kv_heads, dim).to(dtype)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)  # views with a stride, as the models have
        params = AttentionParams(dim**-0.5, batch["window"], batch["softcap"])
        out = backend.attend(query, key, value, cache, flat, params)
    return out


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25)
@given(batch=batches())
def test_equals_torchs_attention(name, batch):
    make, block_size = BACKENDS[name]
    found = attend(make(), block_size, batch)
    wanted = attend(TorchAttention(), 16, batch)
    assert found.dtype == batch["dtype"]
    # Values of about 1, rounded to 8 bits (bfloat16) or 11 (float16) by each of the two.
    tolerance = 0.04 if batch["dtype"] == torch.bfloat16 else 0.005
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=tolerance)


@settings(max_examples=15)
@given(batch=batches())
def test_an_fp8_cache_is_read_as_torch_reads_it(batch):
    found = attend(flash4(B200), 128, batch | {"dtype": torch.bfloat16}, torch.float8_e4m3fn)
    wanted = attend(TorchAttention(), 16, batch | {"dtype": torch.bfloat16}, torch.float8_e4m3fn)
    assert found.dtype == torch.bfloat16
    # flash-attn's query is rounded to 4 bits, too: scores of up to about 5 differ by up to 0.3, weights by a third.
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=1.0)
    assert (found.float() - wanted.float()).abs().mean() < 0.05


def test_an_fp8_cache_cuts_off_what_it_cannot_hold():
    backend = TorchAttention()
    cache = backend.allocate(1, 16, 1, 16, torch.float8_e4m3fn, CPU)
    batch = flatten([Span([0], 0, [0])], 16, CPU).attention
    value = torch.tensor([1e4, -1e4, 448.0, 0.5] * 4).view(1, 1, 16)
    out = backend.attend(torch.ones(1, 1, 16), value, value, cache, batch, AttentionParams(1.0))
    assert out[0, :4].tolist() == [448.0, -448.0, 448.0, 0.5]


def spans_of(*lengths):
    return {
        "sequences": [(300, n) for n in lengths],
        "kv_heads": 2,
        "heads": 4,
        "head_dim": 64,
        "window": None,
        "softcap": None,
        "dtype": torch.bfloat16,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("lengths", "function"),
    [
        ((1, 1, 1), "flash_attn_with_kvcache"),  # plain decoding
        ((5, 5), "flash_attn_with_kvcache"),  # drafts of one length
        ((64,), "flash_attn_with_kvcache"),
        ((65,), "flash_attn_varlen_func"),
        ((1, 5), "flash_attn_varlen_func"),
        ((2, 1, 3), "flash_attn_varlen_func"),  # as many rows as three spans of two
    ],
)
def test_flash2_splits_what_can_be_split(lengths, function):
    calls: list[str] = []
    attend(flash2(calls), 256, spans_of(*lengths))
    assert calls[-1] == f"flash_attn.{function}"


def test_one_call_for_all_spans():
    calls: list[str] = []
    attend(flash4(HOPPER, calls), 128, spans_of(1, 5, 90))
    assert len(calls) == 2  # the step that fills the cache, and this one


@pytest.mark.parametrize("name", BACKENDS)
def test_a_cache_that_nobody_has_written_is_zeros(soiled_memory, name):
    """flash-attn 4 loads whole blocks, and what it does not look at in them weighs 0; but 0 times NaN is NaN."""
    make, block_size = BACKENDS[name]
    assert attend(make(), block_size, spans_of(1, 5, 90)).isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [torch.nan, torch.inf, -torch.inf])
def test_what_a_block_was_left_with_does_not_reach_its_next_owner(name, dtype, left):
    """An overflow in float16 ends the text that it is in, and no other."""
    make, block_size = BACKENDS[name]
    backend, dim = make(), 16
    cache = backend.allocate(1, block_size, 1, dim, dtype, CPU)
    first, second = (flatten([Span([0] * length, 0, [0])], block_size, CPU).attention for length in (block_size, 3))
    ones = torch.ones(block_size, 1, dim, dtype=dtype)
    backend.attend(ones, ones * left, ones * left, cache, first, AttentionParams(1.0))
    found = backend.attend(ones[:3], ones[:3], ones[:3] * 2, cache, second, AttentionParams(1.0))
    assert torch.equal(found, torch.full_like(found, 2.0))


NEEDS = AttentionNeeds(
    device=CPU, capability=HOPPER, dtype=torch.bfloat16, cache_dtype=torch.bfloat16, head_dim=128, block_size=0
)
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, FP8)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flash4", {"capability": None}, "NVIDIA GPUs"),
        ("flash4", {"capability": ADA}, "9.x, 10.x or 11.x"),
        ("flash4", {"capability": CONSUMER_BLACKWELL}, "not 12.0"),
        ("flash4", {"dtype": torch.float32}, "not in float32"),
        ("flash4", {"cache_dtype": FP8}, "10.x"),
        ("flash4", {"cache_dtype": FP8, "capability": B200}, None),
        ("flash4", {"cache_dtype": FP8, "capability": B200, "head_dim": 72}, "multiples of 16"),
        ("flash4", {"head_dim": 200}, "a multiple of 16"),
        ("flash4", {"head_dim": 208}, None),
        ("flash4", {"head_dim": 200, "capability": B200}, "8 to 128, or 256"),
        ("flash4", {"head_dim": 256, "capability": B300}, None),
        ("flash4", {"head_dim": 264}, "8 to 256"),
        ("flash4", {"block_size": 16}, None),
        ("flash4", {"head_dim": 72}, None),
        ("flash4", {"head_dim": 72, "block_size": 128}, None),
        ("flash4", {"head_dim": 72, "block_size": 16}, "a multiple of 16, or at most 128 with blocks of 128"),
        ("flash4", {"head_dim": 72, "block_size": 16, "capability": B200}, "a multiple of 16"),
        ("flash4", {"head_dim": 136}, "a multiple of 16"),
        ("flash2", {"capability": None}, "NVIDIA GPUs"),
        ("flash2", {"capability": (7, 5)}, "8.0"),
        ("flash2", {"capability": CONSUMER_BLACKWELL}, None),
        ("flash2", {"dtype": torch.float32}, "not in float32"),
        ("flash2", {"cache_dtype": FP8}, "not in fp8"),
        ("flash2", {"head_dim": 260}, "at most 256"),
        ("flash2", {"head_dim": 100}, "multiple of 8"),
        ("flash2", {"block_size": 16}, "multiple of 256, not 16"),
        ("flash2", {"block_size": 512}, None),
        ("native", {}, "float32 on the CPU"),
        ("torch", {"cache_dtype": FP8, "head_dim": 7}, None),
    ],
)
def test_rules(name, change, reason):
    needs = replace(NEEDS, **({"cache_dtype": change["dtype"]} if "dtype" in change else {}) | change)
    found = why_not(name, needs)
    assert found is None if reason is None else reason in (found or ""), found


@pytest.mark.parametrize("name", ["flash2", "flash4"])
@pytest.mark.parametrize("capability", [(8, 0), HOPPER, B200, CONSUMER_BLACKWELL], ids=str)
@pytest.mark.parametrize("smaller", [False, True])
def test_what_the_rules_allow_is_what_the_functions_take(name, capability, smaller):
    """Neither more nor less, for every head size with every dtype: the rules tie three of these together."""
    backend, block_size = (flash2(), 256) if name == "flash2" else (flash4(capability), 16 if smaller else 128)
    allowed, taken = set(), set()
    for head_dim, dtype in itertools.product((4, 8, 12, 16, 72, 96, 128, 136, 192, 256, 264), DTYPES):
        model = torch.bfloat16 if dtype == FP8 else dtype
        needs = replace(NEEDS, capability=capability, dtype=model, cache_dtype=dtype, head_dim=head_dim)
        needs = replace(needs, block_size=block_size)
        if why_not(name, needs) is None:
            allowed.add((head_dim, dtype))
        with contextlib.suppress(Refused):
            attend(backend, block_size, spans_of(1, 3) | {"head_dim": head_dim, "dtype": model}, dtype)
            taken.add((head_dim, dtype))
    assert allowed == taken


def installed(monkeypatch, capability, *names):
    for name, module in modules(capability).items():
        monkeypatch.setitem(sys.modules, name, module if name in names else None)


BOTH = ("flash_attn", "flash_attn.cute")


@pytest.mark.parametrize(
    ("capability", "there", "change", "wanted"),
    [
        (HOPPER, BOTH, {}, "flash4"),
        (B200, BOTH, {}, "flash4"),
        (ADA, BOTH, {}, "flash2"),
        (CONSUMER_BLACKWELL, BOTH, {}, "flash2"),
        (HOPPER, ("flash_attn",), {}, "flash2"),
        (HOPPER, (), {}, "triton"),
        (ADA, BOTH, {"block_size": 16}, "triton"),
        (HOPPER, BOTH, {"dtype": torch.float32, "cache_dtype": torch.float32}, "triton"),
        (ADA, BOTH, {"cache_dtype": FP8}, "triton"),
        (B200, BOTH, {"cache_dtype": FP8}, "flash4"),
    ],
)
def test_auto_takes_the_best_that_is_there(monkeypatch, capability, there, change, wanted):
    installed(monkeypatch, capability, *there)
    found = choose_attention("auto", replace(NEEDS, capability=capability, **change), None)
    assert found.name == wanted
    assert found.block_size == {"flash4": 128, "flash2": 256, "triton": 64, "torch": 16}[wanted]


def test_an_fp8_cache_that_only_torch_could_read_is_refused(monkeypatch):
    """It would be many times slower: span by span, without CUDA graphs."""
    installed(monkeypatch, (8, 0), *BOTH)
    needs = replace(NEEDS, capability=(8, 0), cache_dtype=FP8)
    with pytest.raises(ConfigError) as refusal:
        choose_attention("auto", needs, None)
    for part in (
        "kv_cache_dtype is 'fp8'",
        "9.x, 10.x or 11.x",
        "not in fp8",
        "8.9 or newer",
        "attention_backend 'torch'",
    ):
        assert part in str(refusal.value)
    assert choose_attention("torch", needs, None).name == "torch"
    assert choose_attention("auto", replace(needs, capability=None), None).name == "torch"


def test_what_is_asked_for_and_cannot_be_is_refused_with_the_reason(monkeypatch):
    installed(monkeypatch, HOPPER)
    with pytest.raises(ConfigError, match="attention_backend is 'flash2', but flash-attn cannot be imported"):
        choose_attention("flash2", NEEDS, None)
    with pytest.raises(ConfigError, match=r"attention_backend is 'flash4', but .* not in float32"):
        choose_attention("flash4", replace(NEEDS, dtype=torch.float32), None)
    with pytest.raises(ConfigError, match="multiple of 256, not 64"):
        choose_attention("flash2", replace(NEEDS, block_size=64), None)


def test_what_flash4_compiles_is_kept(monkeypatch, tmp_path):
    """Beside the models, which are on a volume in a container; unless the package's own variables say otherwise."""
    installed(monkeypatch, HOPPER, *BOTH)
    switch, folder = (f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR"))
    for name in (switch, folder):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path))
    load_flash4(HOPPER)
    assert (os.environ[switch], os.environ[folder]) == ("1", str(tmp_path / "flash-attn-4"))
    monkeypatch.setenv(switch, "0")
    load_flash4(HOPPER)
    assert os.environ[switch] == "0"


def test_an_old_package_is_refused_at_the_start(monkeypatch):
    """flash-attn 2.8's wheel has a flash_attn.cute of its own, whose function knows no num_splits."""
    installed(monkeypatch, HOPPER, *BOTH)

    def old(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None):
        raise NotImplementedError

    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_varlen_func", old)
    with pytest.raises(ImportError, match=r"has no parameter 'max_seqlen_q': install a newer flash-attn-4"):
        load_flash4(HOPPER)
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_with_kvcache")
    with pytest.raises(ImportError, match="has no flash_attn_with_kvcache"):
        load_flash2()


class Recorded:
    """A backend that notes which of its batches it was given."""

    def __init__(self, backend):
        self.name, self.block_size, self.allocate = backend.name, backend.block_size, backend.allocate
        self.store = backend.store
        self._backend, self.batches = backend, []

    def attend(self, query, key, value, cache, batch, params):
        self.batches.append(batch)
        return self._backend.attend(query, key, value, cache, batch, params)


@settings(max_examples=25)
@given(batch=batches(), processors=st.integers(1, 12))
def test_what_does_not_split_is_given_what_keeps_the_gpu_busy(batch, processors):
    whole, divided = Recorded(flash4(HOPPER)), Recorded(TorchAttention())
    backend = UnsplitAttention(whole, divided, processors)
    assert (backend.name, backend.block_size) == ("flash4", 128)
    found = attend(backend, 128, batch)
    tolerance = 0.04 if batch["dtype"] == torch.bfloat16 else 0.005
    torch.testing.assert_close(found.float(), attend(TorchAttention(), 16, batch).float(), rtol=0, atol=tolerance)
    for flat in whole.batches:
        assert max(flat.query_lens) > SHORT or len(flat.query_lens) * batch["kv_heads"] >= processors
    for flat in divided.batches:
        assert max(flat.query_lens) <= SHORT
        assert len(flat.query_lens) * batch["kv_heads"] < processors


def test_on_hopper_flash4_goes_with_the_triton_kernels(monkeypatch):
    triton = Recorded(TorchAttention())
    triton.processors = 132
    stand_in = SimpleNamespace(load_triton=lambda device: triton)
    monkeypatch.setitem(sys.modules, "pilotfish.engine.layers.attention.triton", stand_in)
    for capability, kind in ((HOPPER, UnsplitAttention), (B200, Flash4Attention)):
        for name, module in modules(capability).items():
            monkeypatch.setitem(sys.modules, name, module)
        assert type(choose_attention("flash4", replace(NEEDS, capability=capability), None)) is kind
    monkeypatch.setitem(sys.modules, "pilotfish.engine.layers.attention.triton", None)  # importing it fails
    assert type(choose_attention("flash4", NEEDS, None)) is Flash4Attention
