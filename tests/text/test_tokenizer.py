"""The tokenizer agrees with transformers for every format, has exact token bytes, and imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.errors import ModelError, ParameterError
from pilotfish.text import tokenizer as tokenizer_module
from pilotfish.text.conversion import _fingerprint
from pilotfish.text.tokenizer import Tokenizer, _any_of, load_tokenizer
from tests.support.tiny import CHAT_TEMPLATE, build_model, train_tokenizer
from tests.support.tiny_gguf import write_gguf

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was ist 2+3? <b>naïve</b> 😀"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": "  and 2 × 3?\n"},
]
TEXTS = [
    "",
    " ",
    "hello",
    "  two spaces\n\n\ttab 123 é ü 漢字 😀👩‍🚀",
    "<|im_start|>user\nhi<|im_end|>",
    "\x00\x7f\ufffd",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(resolve(str(tiny_llama)))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: "▁" for spaces and before the text, byte fallback, begin-of-text token."""
    letters = [*"▁abcdehlorw", "he", "ll", "▁w"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("h", "e"), ("l", "l"), ("▁", "w")]
    backend = Backend(
        models.BPE(
            {token: i for i, token in enumerate(vocab)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocab[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    return Tokenizer(inner, [2])


def test_a_folder_gives_what_transformers_gives(tokenizer: Tokenizer, tiny_llama: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    for more in (True, False):
        prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=more)
        assert prompt == theirs.apply_chat_template(MESSAGES, add_generation_prompt=more, tokenize=False)
        wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=more, return_dict=False)
        assert tokenizer.encode(prompt, add_special_tokens=False) == wanted
    assert (tokenizer.vocab_size, tokenizer.chat_template) == (512, CHAT_TEMPLATE)
    assert tokenizer.special_ids == {0, 1, 2}
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ({2}, 1)


@given(text=ANY_TEXT)
def test_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(text=ANY_TEXT.filter(lambda text: "▁" not in text))
def test_bytes_of_sentencepiece_tokens_make_up_the_text(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text, add_special_tokens=False)
    assert b"".join(map(sentencepiece.token_bytes, ids)) == (b" " + text.encode() if text else b"")
    assert sentencepiece.decode(ids, skip_special_tokens=False) == text


def test_begin_of_text_token_comes_once(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.encode("hello")[0] == 1
    prompt = sentencepiece.apply_chat_template([{"role": "user", "content": "hello"}])
    assert prompt == "<s>hello"
    assert sentencepiece.encode(prompt, add_special_tokens=False).count(1) == 1


@given(
    pieces=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "a", " b ", "\n"]), max_size=30)
)
def test_shields_do_not_depend_on_slices(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    shielded = tokenizer.shield(text)
    assert tokenizer.unshield(shielded) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_SLICE", 3)
        assert tokenizer.shield(text) == shielded
    ids = tokenizer.encode(shielded, add_special_tokens=False)
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_single_tokens(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert tokenizer.token(2) == "<|im_end|>"
    assert tokenizer.token_bytes(tokenizer.encode("😀")[0]) == "😀".encode()[:1]
    assert tokenizer.token(tokenizer.encode("😀")[0]) == "\ufffd"
    assert tokenizer.token(tokenizer.encode("x the")[-1]).startswith(" ")
    assert sentencepiece.token_bytes(3 + 0xE9) == b"\xe9"
    assert sentencepiece.token(3 + 256) == " "
    for padding in (512, 100_000):
        assert tokenizer.token_bytes(padding) == b""
        assert tokenizer.token(padding) == tokenizer.decode([padding]) == ""


def test_text_and_messages_that_cannot_be_used_are_parameter_errors(tokenizer: Tokenizer, tiny_llama: Path) -> None:
    with pytest.raises(ParameterError, match="not valid Unicode") as caught:
        tokenizer.encode("half a character: \ud83d")
    assert caught.value.param == "prompt"
    with pytest.raises(ParameterError, match="refuses these messages") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": None}])
    assert caught.value.param == "messages"
    inner = AutoTokenizer.from_pretrained(tiny_llama)
    assert isinstance(inner, PreTrainedTokenizerFast)
    for template, message in (
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),  # the sandbox's business
    ):
        inner.chat_template = template
        with pytest.raises(ParameterError, match=message):
            Tokenizer(inner).apply_chat_template(MESSAGES)


def test_the_templates_own_arguments_and_several_templates(tiny_llama: Path) -> None:
    inner = AutoTokenizer.from_pretrained(tiny_llama)
    assert isinstance(inner, PreTrainedTokenizerFast)
    inner.chat_template = "{% if enable_thinking %}think{% endif %}{{ messages[0] | tojson }}"
    thinking = Tokenizer(inner).apply_chat_template([{"role": "user", "content": "<ü>"}], enable_thinking=True)
    assert thinking == 'think{"role": "user", "content": "<ü>"}'
    inner.chat_template = {"default": "plain", "tool_use": "tools"}
    assert Tokenizer(inner).apply_chat_template(MESSAGES) == "plain"


def test_end_of_text_ids_come_from_the_generation_config_too(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert load_tokenizer(resolve(str(folder))).eos_token_ids == {0, 2}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.process
def test_a_gguf_file_is_converted_once(
    tokenizer: Tokenizer, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(build_model("llama2"), tmp_path / "model.gguf", tokenizer=train_tokenizer(), add_bos=True)
    loaded = load_tokenizer(resolve(str(path)))
    monkeypatch.setattr(sys, "executable", "/not/there")  # the second time needs no child
    for found in (loaded, load_tokenizer(resolve(str(path)))):
        for text in TEXTS:
            assert found.encode(text, add_special_tokens=False) == tokenizer.encode(text)
            plain = tokenizer.encode(text)
            assert found.encode(text) == (plain if plain[:1] == [1] else [1, *plain])  # never twice
        assert found.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)
        assert found.eos_token_ids == {2, 3}
        assert (found.vocab_size, found.special_ids) == (512, {0, 1, 2})
    assert len(list((cache / "tokenizers").iterdir())) == 1


@pytest.mark.process
def test_tokenizers_that_cannot_be_read_are_model_errors(tiny_llama: Path, tmp_path: Path, cache: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read the tokenizer of 'model'"):
        load_tokenizer(resolve(str(folder)))
    path = write_gguf(build_model("llama2"), tmp_path / "bare.gguf")
    with pytest.raises(ModelError, match=r"cannot convert the tokenizer of .*bare\.gguf"):
        load_tokenizer(resolve(str(path)))
    assert list((cache / "tokenizers").iterdir()) == []


@pytest.mark.parametrize("name", ["spiece.model", "added_tokens.json", "chat_template.jinja", "generation_config.json"])
def test_a_changed_file_of_a_slow_tokenizer_is_converted_again(name: str, tmp_path: Path) -> None:
    files = ModelFiles("model", "huggingface", tmp_path)
    found = {_fingerprint(files)}
    for content in ("", "changed"):
        (tmp_path / name).write_text(content)
        found.add(_fingerprint(files))
    assert len(found) == 3


NEUTRAL = """
import sys
from pilotfish.checkpoints.catalog import resolve
from pilotfish.text import detokenizer
from pilotfish.text.tokenizer import load_tokenizer
tokenizer = load_tokenizer(resolve(sys.argv[1]))
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
tokenizer.decode(tokenizer.encode(prompt, add_special_tokens=False))
print(*(name for name in sys.modules if name == "torch" or name.startswith(("pilotfish.engine", "pilotfish.server"))))
"""


def heavy_imports(model: str) -> list[str]:
    """Modules of torch, the engine and the server that are imported for a model's tokenizer, while it is used."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", NEUTRAL, model]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()


@pytest.mark.process
def test_text_needs_neither_torch_nor_engine_nor_server(tiny_llama: Path) -> None:
    assert heavy_imports(str(tiny_llama)) == []


@pytest.mark.real_model
def test_smollm2_gives_what_transformers_gives(smollm2: ModelFiles) -> None:
    ours = load_tokenizer(smollm2)
    theirs = AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()
    for messages in (MESSAGES, MESSAGES[1:]):  # its template adds a system message of its own
        prompt = ours.apply_chat_template(messages)
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode(prompt, add_special_tokens=False) == wanted
    assert (ours.eos_token_ids, ours.vocab_size) == ({2}, 49152)
    assert heavy_imports(smollm2.name) == []


@given(st.lists(st.text("ab<|", min_size=1, max_size=4), min_size=1, max_size=8), st.text("ab<|", max_size=12))
def test_a_pattern_of_words_finds_the_longest_of_them(words: list[str], text: str) -> None:
    plain = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    assert re.findall(_any_of(words), text) == re.findall(plain, text)


@given(any_text=ANY_TEXT)
def test_a_shielded_text_is_encoded_without_special_tokens(tokenizer: Tokenizer, any_text: str) -> None:
    for text in (any_text, f"<|im_end|>{any_text}", f"{any_text}<|im_", f"\ufdd0\U000f0001\ufdd0{any_text}"):
        ids = tokenizer.encode(tokenizer.shield(text), add_special_tokens=False)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.unshield(tokenizer.shield(text)) == text
