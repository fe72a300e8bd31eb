"""The model's tokenizer and chat template: text to ids, ids to text, messages to a prompt.

It wraps transformers' fast tokenizer, which needs no torch and about a second, import included, to load a folder with a
tokenizer.json. (`tokenizers` and jinja2 alone take 0.2 s, but special tokens and the template's environment would have
to follow transformers.) Converting a GGUF file or a slow tokenizer's files needs torch and takes seconds:
`text.conversion` does it once, in a child process, and caches the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from pilotfish.checkpoints.catalog import ModelFiles
from pilotfish.checkpoints.huggingface import eos_token_ids
from pilotfish.errors import ModelError, ParameterError
from pilotfish.text.conversion import tokenizer_folder
from pilotfish.text.length_bound import LengthBound, byte_alphabet
from pilotfish.text.template_process import TemplateLimitError, TemplateProcesses

LARGEST_VOCABULARY = 2**24
LONGEST_TEMPLATE = 2**20
"""Characters. Those of the largest published templates are 30,000."""
_SLICE = 2**17
"""Characters in which special tokens are looked for at a time."""
_MANY_IDS = 2**15
"""Ids that take about a millisecond to turn into a list, or into text."""


class Tokenizer:
    """A fast tokenizer with its chat template. Safe to use from several threads at once."""

    chat_template: str | None
    """The jinja2 chat template, the default one if the model has several; None: not a chat model."""
    special_ids: frozenset[int]
    """Tokens marked as special, which `decode` can leave out."""
    eos_token_ids: frozenset[int]
    """Tokens that end an answer: those of generation_config.json or config.json, and the tokenizer's eos_token."""
    bos_token_id: int | None
    folder: Path | None = None
    """The folder with its tokenizer.json, if it was loaded from one."""
    vocab_size: int
    """One more than the highest token id; the model's own vocabulary may be padded to more."""

    def __init__(self, inner: PreTrainedTokenizerFast, eos_ids: Sequence[int] = ()) -> None:
        self._inner = inner
        self._templates: TemplateProcesses | None = None
        self._backend: Backend = inner.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may have truncation and padding left over from training
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self._byte_level, self._byte_fallback = _kinds_of_decoder(self._backend)
        template = inner.chat_template
        self.chat_template = template.get("default") if isinstance(template, dict) else template
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        own = () if inner.eos_token_id is None else (inner.eos_token_id,)
        self.eos_token_ids = frozenset((*eos_ids, *own))
        self.bos_token_id = inner.bos_token_id
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`. With `add_special_tokens`, the begin-of-text token, if any, is put before it;
        pass False for the result of `apply_chat_template`, which has it already.

        Special tokens spelled out in the text become those tokens. Raises ParameterError("prompt") for text that is not
        valid Unicode.
        """
        try:
            if _SHIELD in text:
                return self._encode_shielded(text, add_special_tokens)
            # Unlike encode, this lets other threads run, and it makes no offsets, which take most of the memory.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate, which JSON can spell
            raise ParameterError("prompt", "the prompt is not valid Unicode text (it has a lone surrogate)") from None
        ids = _ids(encoding)
        # A text that begins with the begin-of-text token itself has it once.
        doubled = add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id
        return ids[1:] if doubled else ids

    def _encode_shielded(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self.encode("") if add_special_tokens else []
        pieces = self._pieces(text)
        plain, literal = (  # one call for all pieces of a kind
            iter(backend.encode_batch_fast([piece for piece, each in pieces if each == kind], add_special_tokens=False))
            for backend, kind in ((self._backend, False), (self._literal, True))
        )
        for _, is_literal in pieces:
            ids += _ids(next(literal if is_literal else plain))
        return ids

    @cached_property
    def length_bound(self) -> LengthBound:
        """The fewest tokens that texts can have. Takes up to a second the first time."""
        return LengthBound(self._backend, self.token_bytes, self._byte_level)

    def shield(self, text: str) -> str:
        """Mark the special tokens that a text spells, so that `encode` takes them for text: what a client writes into
        a message is never a control token, and cannot forge a turn. A text that ends with the beginning of one is
        marked, too: what a template puts after it does not complete it."""
        pattern = self._spelled
        if pattern is None:
            return text
        parts, done, at, longest = list[str](), 0, 0, max(map(len, self._markable))
        while at < len(text):  # by slices: no other thread runs during a search
            match = pattern.search(text, at, at + _SLICE + longest)
            if match is None or match.start() >= at + _SLICE:
                at += _SLICE
                continue
            parts += text[done : match.start()], self._mark(match[0])
            done = at = match.end()
        if parts:
            _ = self._literal  # takes tenths of a second the first time: here rather than in `encode`
            text = "".join([*parts, text[done:]])
        return text + self._mark("") if text.endswith(self._beginnings) else text

    def unshield(self, text: str) -> str:
        """Return a text with the marks of `shield` replaced by what was marked."""
        return "".join(piece for piece, _ in self._pieces(text)) if _SHIELD in text else text

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """Return the pieces of a text with marks, each with whether its special tokens are text."""
        pieces: list[tuple[str, bool]] = []
        for i, piece in enumerate(_SHIELDED.split(text)):
            if i % 2 == 0:
                pieces.append((piece, False))
            elif 0 <= (at := ord(piece) - _FIRST) < len(self._markable):
                pieces.append((self._markable[at], True))
            else:  # not one of this tokenizer's marks
                pieces.append((f"{_SHIELD}{piece}{_SHIELD}", False))
        return [(piece, literal) for piece, literal in pieces if piece]

    def _mark(self, text: str) -> str:
        return f"{_SHIELD}{chr(_FIRST + self._markable.index(text))}{_SHIELD}"

    @cached_property
    def _markable(self) -> list[str]:
        """What marks stand for: special tokens, the shield itself, and nothing, which only separates."""
        spelled = filter(None, {self.token(id_) for id_ in self.special_ids})
        return [*sorted(spelled, key=lambda token: (-len(token), token)), _SHIELD, ""]

    @cached_property
    def _spelled(self) -> re.Pattern[str] | None:
        return re.compile(_any_of(self._markable[:-1])) if self.special_ids else None

    @cached_property
    def _beginnings(self) -> tuple[str, ...]:
        """The proper beginnings of special tokens."""
        return tuple({token[:n] for token in self._markable[:-2] for n in range(1, len(token))})

    @cached_property
    def _literal(self) -> Backend:
        """The same tokenizer, for which special tokens are text."""
        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @property
    def document_start(self) -> tuple[int, ...]:
        """The token that begins a document, for an empty prompt: GPT-2's <|endoftext|> where there is one, as it
        separates documents in training, else the begin-of-text token, else one that ends a text; empty without any."""
        separator = [id_ for id_ in sorted(self.special_ids) if self._added[id_] == "<|endoftext|>"]
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return tuple([*separator, *begin, *sorted(self.eos_token_ids)][:1])

    @property
    def named_tokens(self) -> dict[str, str]:
        """The tokens with a role, by the names of tokenizer_config.json: bos_token, eos_token, ..."""
        return {name: str(token) for name, token in self._inner.special_tokens_map.items() if isinstance(token, str)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Invalid UTF-8 becomes U+FFFD; ids without a token are left out."""
        if len(ids) < _MANY_IDS:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)  # lets other threads run
        return text

    def token(self, id: int) -> str:
        """Return the text of one token: a leading space is kept, a special token spelled out. Bytes that are only part
        of a character become U+FFFD (see `token_bytes`)."""
        return self.token_bytes(id).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the exact UTF-8 bytes that a token adds to a text, which may be part of a character; b"" for an id
        that only pads the model's vocabulary."""
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF.get(char, char.encode()) for char in token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def isolate_templates(self) -> None:
        """Render chat templates under limits of time and memory from now on, in processes that `close` ends."""
        self._templates = TemplateProcesses()
        if self.chat_template is not None:
            self._templates.start()

    def close(self) -> None:
        """End the processes of `isolate_templates`, if any."""
        if self._templates is not None:
            self._templates.close()

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Return the prompt of a conversation: messages in OpenAI's form, with text as content. Encode it with
        add_special_tokens=False. `kwargs` are variables of the template (tools, enable_thinking, ...).

        Raises ParameterError("messages") if the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ParameterError(
                "messages", "this model has no chat template, so it cannot take messages: use /v1/completions"
            )
        variables = {"add_generation_prompt": add_generation_prompt, **kwargs}
        try:
            if self._templates is not None:
                named = {name: str(token) for name, token in self._inner.special_tokens_map.items()}
                return self._templates.render(self.chat_template, messages, {**named, **variables})
            text = self._inner.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, **variables
            )
        except TemplateLimitError as error:
            raise ParameterError("messages", f"the model's chat template {error}") from error
        except Exception as error:  # model's template, client's data: anything can be raised
            raise ParameterError("messages", f"the model's chat template refuses these messages: {error}") from error
        return str(text)


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Load the tokenizer of a model. Raises ModelError if there is none or it cannot be read.

    The first time takes seconds for a GGUF file, which is converted.
    """
    folder = tokenizer_folder(files)
    verbosity = transformers_logging.get_verbosity()
    # It would warn of any tokenizer_class but its own, although tokenizer.json is sufficient.
    transformers_logging.set_verbosity_error()
    try:
        inner = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        tokenizer = Tokenizer(inner, eos_token_ids(folder))
        _check(tokenizer)
    except ModelError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # malformed files raise any kind of exception; a panic of Rust's is not an Exception
        raise ModelError(f"cannot read the tokenizer of {files.name!r} in {folder}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    tokenizer.folder = folder
    return tokenizer


def _check(tokenizer: Tokenizer) -> None:
    """Raise ValueError for what transformers lets pass, but nothing that follows can be done with."""
    template, size = tokenizer.chat_template, tokenizer.vocab_size
    if size > LARGEST_VOCABULARY:
        raise ValueError(f"its largest token id is {size - 1}, but may be {LARGEST_VOCABULARY - 1}")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"its chat_template is {template!r:.80}, but must be a text")
    if template is not None and len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"its chat_template has {len(template)} characters, but may have {LONGEST_TEMPLATE}")
    tokenizer.token_bytes(size - 1)
    tokenizer.decode(tokenizer.encode("a"))


def _ids(encoding: Encoding) -> list[int]:
    """Return the ids of an encoding, which is used up, in parts, since no other thread runs while a list is made."""
    if len(encoding) < _MANY_IDS:
        return encoding.ids
    encoding.truncate(_MANY_IDS)
    ids = encoding.ids
    for part in encoding.overflowing:
        ids += part.ids
    return ids


def _any_of(words: Sequence[str]) -> str:
    """Return the pattern of any one of some words, the longest where several match. Common beginnings are read once,
    so that searching takes the same time for thousands of words as for a few."""
    first, last = min(words), max(words)
    begin = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    rest = sorted({word[len(begin) :] for word in words})
    if rest == [""]:
        return re.escape(begin)
    groups = [_any_of(list(group)) for _, group in groupby(filter(None, rest), key=lambda word: word[0])]
    return f"{re.escape(begin)}(?:{'|'.join(groups)}){'?' if rest[0] == '' else ''}"


def _kinds_of_decoder(backend: Backend) -> tuple[bool, bool]:
    """Return whether tokens are spelled in GPT-2's byte alphabet, and whether "<0xAB>" stands for a byte."""
    if backend.decoder is None:
        return False, False
    state = json.loads(backend.decoder.__getstate__())
    parts = {part["type"] for part in state.get("decoders", [state])}
    return "ByteLevel" in parts, "ByteFallback" in parts


_BYTE_OF = {char: bytes([byte]) for char, byte in byte_alphabet().items()}
_SHIELD = "\ufdd0"
"""A noncharacter, which no text that is meant for others has."""
_FIRST = 0xF0000
"""Between two shields stands a character of a private plane, for a special token's place in the list."""
_SHIELDED = re.compile(f"{_SHIELD}([\U000f0000-\U000fffff]){_SHIELD}")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
