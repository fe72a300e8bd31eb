"""The bound on tokens never exceeds the tokens of a text, whatever the tokenizer, and is near enough to be of use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pilotfish.checkpoints.catalog import resolve
from pilotfish.text import length_bound
from pilotfish.text.tokenizer import Tokenizer as OwnTokenizer
from pilotfish.text.tokenizer import load_tokenizer
from tests.support.tiny import TEXT, train_tokenizer

ENOUGH = 10**9
CORPUS = [TEXT, "    " * 20 + "\n\n\n" + "-" * 80, "=" * 64, "naïve café é", "漢字の言葉 漢字漢字", "😀👩‍🚀"]
PIECES = st.sampled_from([
    *CORPUS, " ", "\n", "\t", "▁", "▁▁▁▁", "e\u0301", "\u1100\u1161\u11a8", "=\u0338", "Å", "ﬁ", "\u3000", "\u2028",
    "<mask>", "<|im_start|>", "</s>", "a" * 50, "0123456789", "\x1c", "\ufffd", "<0x41>",
])  # fmt: skip
TEXTS = st.builds(
    lambda pieces, times: "".join(pieces) * times,
    st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8),
    st.sampled_from([1, 1, 2, 40]),
)


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_level(normalizer: Any = None, alphabet: bool = True) -> Tokenizer:
    known = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=600, min_frequency=1, initial_alphabet=known, show_progress=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    parts: dict[str, Any] = {"normalizer": normalizer} if normalizer else {}
    parts |= {"pre_tokenizer": pre_tokenizers.Sequence(steps), "decoder": decoders.ByteLevel()}
    return trained(models.BPE(), trainer, **parts)


def sentencepiece() -> Tokenizer:
    """Like Llama 2's and Gemma's."""
    letters = [*"▁abcdehlorw-=", "he", "ll", "▁w", "▁▁", "▁▁▁▁", "--", "----"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("▁", "▁"), ("▁▁", "▁▁"), ("-", "-"), ("--", "--")]
    ids = {token: i for i, token in enumerate(vocab)}
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())


def characters(fuse: bool = True, **parts: Any) -> Tokenizer:
    """Without bytes: characters that are not known become one unknown token together, or nothing."""
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], limit_alphabet=40, show_progress=False)
    model = models.BPE(unk_token="<unk>", fuse_unk=True) if fuse else models.BPE()
    return trained(model, trainer, **parts)


def split_away(made: Tokenizer) -> Tokenizer:
    made.pre_tokenizer = pre_tokenizers.Split("e", "removed")
    return made


def greedy_mask(normalizer: Any = None) -> Tokenizer:
    made = byte_level(normalizer)
    made.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("x" * 40)])
    return made


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizer=pre_tokenizers.BertPreTokenizer())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "tiny": train_tokenizer,
    "byte_level": byte_level,
    "NFC": lambda: byte_level(normalizers.NFC()),
    "NFKC": lambda: byte_level(normalizers.Sequence([normalizers.NFKC()])),
    "text stripped": lambda: byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
    "part of the alphabet": lambda: byte_level(alphabet=False),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "unknown fused": characters,
    "unknown dropped": lambda: characters(fuse=False),
    "spaces dropped": lambda: characters(pre_tokenizer=pre_tokenizers.Whitespace()),
    "split away": lambda: split_away(characters()),
    "strip": greedy_mask,
    "strip, NFC": lambda: greedy_mask(normalizers.NFC()),
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> OwnTokenizer:
    return OwnTokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param]()))


def holds(tokenizer: OwnTokenizer, text: str) -> None:
    for special in (False, True):
        assert tokenizer.length_bound.at_least(text, ENOUGH) <= len(tokenizer.encode(text, special))


@pytest.mark.parametrize("text", ["<mask>" + " " * 100, "e" * 100, "e\u0301" * 100, " " * 100, "▁" * 100, "漢" * 100])
def test_what_vanishes_is_not_counted(tokenizer: OwnTokenizer, text: str) -> None:
    holds(tokenizer, text)


@given(text=TEXTS)
@settings(max_examples=60)
def test_no_text_has_fewer_tokens(tokenizer: OwnTokenizer, text: str) -> None:
    holds(tokenizer, text)


@given(text=TEXTS)
@settings(max_examples=40)
def test_nor_where_a_slice_ends(tokenizer: OwnTokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_bound, "_SLICE", 7)
        patch.setattr(length_bound, "_AT_A_CUT", 4)
        holds(tokenizer, text)
        holds(tokenizer, ("e" * 7 + "\u0301") * 20)


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "NFC", "sentencepiece", "unigram", "strip"])
def test_long_texts_are_recognised(kind: str) -> None:
    tokenizer = OwnTokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]()))
    for text in ("the shark " * 3000, "word" * 8000, "0123" * 8000):
        assert tokenizer.length_bound.at_least(text, ENOUGH) > 500


def test_counting_ends_where_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = OwnTokenizer(PreTrainedTokenizerFast(tokenizer_object=byte_level()))
    monkeypatch.setattr(length_bound, "_SLICE", 1000)
    assert 100 <= tokenizer.length_bound.at_least("abc " * 10**6, 100) < 1100


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_real_tokenizers(name: str) -> None:
    tokenizer = load_tokenizer(resolve(name))

    @given(text=TEXTS)
    @settings(max_examples=300)
    def check(text: str) -> None:
        holds(tokenizer, text)

    check()
    assert tokenizer.length_bound.at_least("The quick brown fox jumps. " * 260_000, ENOUGH) > 130_000
    assert tokenizer.length_bound.at_least(" " * 7_000_000, ENOUGH) > 50_000
