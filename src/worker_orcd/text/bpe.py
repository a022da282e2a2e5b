"""Byte-level BPE (GPT-2's, and of most models since) from a GGUF vocabulary.

Text is UTF-8 bytes, each written as one printable character; words are cut by regular expressions, and in
each the pair of the lowest merge rank is joined until none is left (Sennrich et al. 2016; Radford et al.
2019). GGUF has no key for Unicode normalisation; Qwen's `tokenizer.json` composes (NFC), so its
pre-tokenizers here do too, which the published vectors, all of them in that form, cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from worker_orcd.text.pretokenizers import PRE_TOKENIZERS
from worker_orcd.text.vocabulary import TokenType, Vocabulary, of_type

_CODED = frozenset({TokenType.NORMAL, TokenType.UNUSED})  # are written in the byte alphabet


def _alphabet() -> dict[int, int]:
    """A translation of GPT-2's printable character for each byte to the Latin-1 character of that byte.

    Characters below 256 that are not in the alphabet go to one that Latin-1 lacks.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    table = dict.fromkeys(range(256), 0xFFFF) | {b: b for b in printable}
    return table | {0x100 + n: b for n, b in enumerate(others)}


def byte_level_bytes(tokens: Iterable[tuple[str, bool]]) -> list[bytes]:
    """What tokens stand for, from (text, is it written in the byte alphabet) pairs.

    Text that is not, or against the declaration is not, stands for its own UTF-8.
    """
    alphabet = _alphabet()
    return [_stands_for(text, alphabet, coded=coded) for text, coded in tokens]


def _stands_for(text: str, alphabet: dict[int, int], *, coded: bool) -> bytes:
    try:
        return text.translate(alphabet).encode("latin-1") if coded else text.encode()
    except UnicodeEncodeError:
        return text.encode()


def build_bpe(vocabulary: Vocabulary) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer for text and one that also reads control tokens."""
    pre = PRE_TOKENIZERS[vocabulary.pre]
    model = models.BPE(
        vocab=dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True)),
        merges=list(vocabulary.merges),
        ignore_merges=pre.whole_words,
    )
    user, control = (
        [AddedToken(vocabulary.tokens[i], normalized=False) for i in of_type(vocabulary.types, kind)]
        for kind in (TokenType.USER_DEFINED, TokenType.CONTROL)
    )
    built: list[Tokenizer] = []
    for special in ([], control):
        tokenizer = Tokenizer(model)  # both share the model
        if pre.composes:
            tokenizer.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in pre.expressions]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        add_tokens(tokenizer, user=user, control=special)
        built.append(tokenizer)
    return built[0], built[1]


def add_tokens(
    tokenizer: Tokenizer, *, user: Sequence[AddedToken] = (), control: Sequence[AddedToken] = ()
) -> None:
    """User-defined tokens, found in any text, and control tokens; each already has its id in the model."""
    tokenizer.add_tokens(list(user))  # pyright: ignore[reportUnknownMemberType]
    tokenizer.add_special_tokens(list(control))  # pyright: ignore[reportUnknownMemberType]


class BpeBytes(Sequence[bytes]):
    """What each token of a vocabulary stands for, found out when it is asked for: most never are."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self._alphabet = _alphabet()

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _stands_for(self._tokens[index], self._alphabet, coded=self._types[index] in _CODED)
