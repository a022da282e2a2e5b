"""Strings to token ids and back, exactly as the model was trained.

The work is done by Hugging Face's `tokenizers`, built from the vocabulary in the GGUF file or from a
`tokenizer.json`. Text from users and text from templates go through two objects that are never changed after
construction; they differ only in whether the names of control tokens are read as such.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel

from worker_orcd.errors import InvalidModelFile, InvalidParameter, WorkerError
from worker_orcd.gguf.metadata import Metadata, quoted
from worker_orcd.text.bpe import BpeBytes, add_tokens, build_bpe
from worker_orcd.text.hf_json import read_hf_json
from worker_orcd.text.spm import build_spm, spm_bytes
from worker_orcd.text.stream import Delta
from worker_orcd.text.vocabulary import (
    TURN_ENDS,
    TokenType,
    Vocabulary,
    end_of_generation,
    of_type,
    read_vocabulary,
    speaks_harmony,
)

Kind = Literal["gguf-bpe", "hf-json"]

_INK = re.compile(r"\S")  # white space has no owner: control tokens may swallow it, but are not named by it
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_NAME = 256  # characters of a control token
_MAX_NAMES = 1 << 18  # characters of all control tokens; Gemma 3 has 74,000
_LONG = 2048  # characters from which encoding is worth giving other threads a turn


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a Tokenizer is made of, whichever file it comes from."""

    kind: Kind
    plain: HFTokenizer  # reads no control tokens
    special: HFTokenizer  # reads them
    control: dict[int, AddedToken]
    token_bytes: Sequence[bytes]  # by id
    strips_leading_space: bool
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    end_of_generation: frozenset[int]
    speaks_harmony: bool


class Tokenizer:
    """Immutable and safe to call from several threads.

    Built by `load_tokenizer`. Text given to `encode` never yields control tokens unless `parse_special`;
    tokens that the vocabulary calls user-defined are ordinary text, and are found in it either way.
    """

    kind: Kind
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool  # whether a plain prompt starts with BOS
    end_of_generation: frozenset[int]  # eos, eot, eom, turn tokens: sampling one ends the answer
    control_ids: frozenset[int]  # tokens that no user text may produce
    control_texts: frozenset[str]  # their names
    strips_leading_space: bool  # see `stream_bytes`
    speaks_harmony: bool  # its answers are messages in the Harmony format
    filler: str  # a character that is in none of them

    def __init__(self, parts: TokenizerParts) -> None:
        self.kind = parts.kind
        self.vocab_size = len(parts.token_bytes)
        self.bos_id = parts.bos_id
        self.eos_id = parts.eos_id
        self.adds_bos = parts.adds_bos
        self.end_of_generation = parts.end_of_generation
        self.control_ids = frozenset(parts.control)
        self.control_texts = frozenset(token.content for token in parts.control.values())
        self.strips_leading_space = parts.strips_leading_space
        self.speaks_harmony = parts.speaks_harmony
        self._plain = parts.plain
        self._special = parts.special
        self._bytes = parts.token_bytes
        self._whole: dict[int, Delta | None] = {}  # found by `whole_text`: most tokens come again and again
        if max(map(len, self.control_texts), default=0) > _MAX_NAME:
            raise InvalidModelFile(f"the name of a control token is longer than {_MAX_NAME} characters")
        if sum(map(len, self.control_texts)) > _MAX_NAMES:
            raise InvalidModelFile(f"the names of the control tokens are longer than {_MAX_NAMES} characters")
        used = set[str]().union(*self.control_texts)
        self.filler = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in used)
        self._finder, self._found_ids = _finder(parts.control)
        for i, token in parts.control.items():
            written = self._plain.decode([i], skip_special_tokens=False)  # in the byte alphabet, perhaps
            if any(i in _ids(self._plain, text) for text in (token.content, written)):
                raise InvalidModelFile(
                    f"tokenizer.ggml.tokens: plain text can spell control token {i}, {quoted(token.content)}"
                )

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """`add_special`: BOS as the model wants. `parse_special`: `<|im_end|>` in text becomes its control
        token.

        Raises InvalidParameter for text that is not Unicode (lone surrogates).
        """
        ids = _ids(self._special, text) if parse_special else self._encode_plain(text)
        return self._with_bos(ids) if add_special else ids

    def encode_segments(self, segments: Sequence[tuple[str, bool]], *, add_special: bool) -> list[int]:
        """Template text with user text in it: (text, trusted) pairs; only trusted ones may yield control
        tokens.

        The text is tokenised as a whole: words and merges cross the borders of segments. Only a control token
        whose name lies in trusted text from end to end is read as one, any other spelling of it is ordinary
        text.
        """
        text = "".join(text for text, _ in segments)
        mask = "".join(text if trusted else _INK.sub(self.filler, text) for text, trusted in segments)
        return self.encode_masked(text, mask, add_special=add_special)

    def encode_masked(self, text: str, mask: str, *, add_special: bool) -> list[int]:
        """The same for text of which `mask` is a copy with `filler` in place of the untrusted characters."""
        own = list(self._controls(mask))
        if own == list(self._controls(text)):
            return self.encode(text, add_special=add_special, parse_special=True)
        ids: list[int] = []
        end = 0
        for start, stop, token in own:
            ids += self._encode_plain(text[end:start])
            ids.append(token)
            end = stop
        ids += self._encode_plain(text[end:])
        return self._with_bos(ids) if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        """Whole text at once; invalid UTF-8 becomes U+FFFD. The same as the `stream_bytes` of the ids,
        joined.
        """
        pieces: list[bytes] = []
        first = True
        for i in ids:
            is_control = i in self.control_ids
            if not (is_control and skip_control):
                pieces.append(self.stream_bytes(i, first=first))
            first = first and is_control
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for in the output stream: raw bytes, possibly a part of a character.

        Control tokens give their name's bytes. Raises InvalidParameter outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise InvalidParameter(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size}", param="token_ids"
            )
        return self._bytes[token_id]

    def stream_bytes(self, token_id: int, *, first: bool) -> bytes:
        """`token_bytes`, but without the space that SentencePiece vocabularies put before a text.

        `first`: nothing but control tokens stands before this token. For an answer, that is
        `starts_text(prompt)` until the first token that is not a control token.
        """
        piece = self.token_bytes(token_id)
        return piece.removeprefix(b" ") if first and self.strips_leading_space else piece

    def whole_text(self, token_id: int) -> Delta | None:
        """The text of a token of whole characters, for streams; None where there is more to know of it."""
        try:
            return self._whole[token_id]
        except KeyError:
            delta = None
            if self.is_text(token_id):
                with suppress(UnicodeDecodeError):
                    delta = Delta(self.token_bytes(token_id).decode())
            self._whole[token_id] = delta
            return delta

    def starts_text(self, prompt: Sequence[int]) -> bool:
        """Whether a token after this prompt begins a text rather than continuing one."""
        return not prompt or prompt[-1] in self.control_ids

    def is_text(self, token_id: int) -> bool:
        """Whether it stands for text: control tokens do not, nor do rows that pad the network's output."""
        return token_id < self.vocab_size and token_id not in self.control_ids

    def token_text(self, token_id: int) -> str:
        """For people and logprobs: the token's text, with U+FFFD for partial characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids

    def _encode_plain(self, text: str) -> list[int]:
        ids = _ids(self._plain, text)
        if not self.control_ids.isdisjoint(ids):
            # Construction has tried every name; what is left are vocabularies made for the purpose.
            raise InvalidParameter("the text spells a control token of this model", param="prompt")
        return ids

    def _controls(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of the control tokens named in `text`, as `special` would find them."""
        if not self._found_ids:
            return
        _check(text)
        found = self._finder.encode_batch([text], add_special_tokens=False)[0]
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if number:
                yield start, stop, self._found_ids[number]


def _finder(control: dict[int, AddedToken]) -> tuple[HFTokenizer, dict[int, int]]:
    """A tokenizer that knows nothing but control tokens, and its numbers for them; 0 is everything else."""
    finder = HFTokenizer(WordLevel({"\0": 0}, unk_token="\0"))
    add_tokens(finder, control=list(control.values()))
    numbers: dict[int, int] = {}
    for i, token in control.items():
        number = finder.token_to_id(token.content)
        if number:
            numbers[number] = i
    return finder, numbers


def _ids(tokenizer: HFTokenizer, text: str) -> list[int]:
    _check(text)
    if len(text) < _LONG:
        return tokenizer.encode(text, add_special_tokens=False).ids
    # The batch call lets other threads run meanwhile: 1 MB takes half a second.
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _check(text: str) -> None:
    if _SURROGATE.search(text):
        raise InvalidParameter("the text has a lone surrogate, which is no character", param="prompt")


@contextmanager
def _refused(what: str) -> Generator[None]:
    """What the library says about a vocabulary it cannot use, as our error. Its panics are no `Exception`."""
    try:
        yield
    except WorkerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InvalidModelFile(f"{what} is not a vocabulary: {quoted(str(error))}") from None
        raise


def load_tokenizer(metadata: Metadata, tokenizer_json: Path | None = None) -> Tokenizer:
    """From GGUF metadata, or from a tokenizer.json that overrides it. Raises UnsupportedTokenizer,
    InvalidModelFile.
    """
    if tokenizer_json is not None:
        with _refused("tokenizer.json"):
            return _from_json(metadata, tokenizer_json)
    vocabulary = read_vocabulary(metadata)
    with _refused("tokenizer.ggml.tokens"):
        return _from_vocabulary(vocabulary)


def _from_vocabulary(vocabulary: Vocabulary) -> Tokenizer:
    is_spm = vocabulary.model == "llama"
    plain, special = build_spm(vocabulary) if is_spm else build_bpe(vocabulary)
    added = special.get_added_tokens_decoder()  # a copy at each call
    control = {i: added[i] for i in of_type(vocabulary.types, TokenType.CONTROL)}
    return Tokenizer(
        TokenizerParts(
            kind="gguf-bpe",
            plain=plain,
            special=special,
            control=control,
            token_bytes=spm_bytes(vocabulary) if is_spm else BpeBytes(vocabulary),
            strips_leading_space=is_spm and vocabulary.adds_space_prefix,
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            adds_bos=vocabulary.adds_bos,
            end_of_generation=vocabulary.end_of_generation,
            speaks_harmony=vocabulary.speaks_harmony,
        )
    )


def _from_json(metadata: Metadata, path: Path) -> Tokenizer:
    """The words are those of the file; the declared ids are those of the metadata where it has them."""
    found = read_hf_json(path)
    names = {token.content: i for i, token in found.control.items()}
    eos, eot, eom, bos = (
        metadata.optional_integer(f"tokenizer.ggml.{name}_token_id", high=len(found.tokens) - 1)
        for name in ("eos", "eot", "eom", "bos")
    )
    bos = found.bos_id if bos is None else bos
    ends = end_of_generation(names, [eos, eot, eom])
    adds_bos = metadata.boolean("tokenizer.ggml.add_bos_token", default=found.bos_id is not None)
    return Tokenizer(
        TokenizerParts(
            kind="hf-json",
            plain=found.plain,
            special=found.special,
            control=found.control,
            token_bytes=found.token_bytes,
            strips_leading_space=found.strips_leading_space,
            bos_id=bos,
            eos_id=eos if eos is not None else next((names[t] for t in TURN_ENDS if t in names), None),
            adds_bos=adds_bos and bos is not None,
            end_of_generation=ends,
            speaks_harmony=speaks_harmony(names, metadata),
        )
    )
