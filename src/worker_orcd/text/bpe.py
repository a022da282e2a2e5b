"""Byte-level BPE (GPT-2's, and of most models since) from a GGUF vocabulary.

Text is UTF-8 bytes, each written as one printable character; words are cut by regular expressions, and in
each the pair of the lowest merge rank is joined until none is left (Sennrich et al. 2016; Radford et al.
2019). GGUF has no key for Unicode normalisation; Qwen's `tokenizer.json` composes (NFC), so its
pre-tokenizers here do too, which the published vectors, all of them in that form, cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from worker_orcd.text.pretokenizers import PRE_TOKENIZERS
from worker_orcd.text.vocabulary import TokenType, Vocabulary


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
    found: list[bytes] = []
    for text, coded in tokens:
        try:
            found.append(text.translate(alphabet).encode("latin-1") if coded else text.encode())
        except UnicodeEncodeError:
            found.append(text.encode())
    return found


def build_bpe(vocabulary: Vocabulary) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer for text and one that also reads control tokens."""
    pre = PRE_TOKENIZERS[vocabulary.pre]
    model = models.BPE(
        vocab={text: i for i, text in enumerate(vocabulary.tokens)},
        merges=list(vocabulary.merges),
        ignore_merges=pre.whole_words,
    )
    user = [AddedToken(t, normalized=False) for t in of_type(vocabulary, TokenType.USER_DEFINED)]
    control = [AddedToken(t, normalized=False) for t in of_type(vocabulary, TokenType.CONTROL)]
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


def bpe_bytes(vocabulary: Vocabulary) -> list[bytes]:
    coded = {TokenType.NORMAL, TokenType.UNUSED}
    return byte_level_bytes(
        (text, kind in coded) for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    )


def of_type(vocabulary: Vocabulary, kind: TokenType) -> list[str]:
    return [text for text, k in zip(vocabulary.tokens, vocabulary.types, strict=True) if k == kind]
