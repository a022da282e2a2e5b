"""The vocabulary of a GGUF file, read and checked: everything under `tokenizer.ggml.`.

Nothing in a model file is trusted. What is checked here cannot upset the tokenizer library later: its
builders panic, or worse go on, where a vocabulary contradicts itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import add

from worker_orcd.errors import InvalidModelFile, UnsupportedTokenizer
from worker_orcd.gguf.metadata import Metadata, quoted
from worker_orcd.text.pretokenizers import PRE_TOKENIZERS

MODELS = ("gpt2", "llama")  # byte-level BPE; SentencePiece with merges by score
MAX_TOKENS = 1 << 22
MAX_TOKEN_BYTES = 4096  # the longest in use are 128 repeated characters or 256 spaces
MAX_MERGES = 1 << 23
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)

# Tokens that end a turn, by their text: files name one of them as EOS and forget the others. In the order in
# which they are EOS where the file names none.
TURN_ENDS = (
    "<|return|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot|>",
    "<EOT>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "</s>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|call|>",
)
# By which the messages of the Harmony format are told apart. All of them together are in no other vocabulary.
_HARMONY = frozenset({"<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"})
_NAMES = _HARMONY | {"<|constrain|>", *TURN_ENDS}
_HARMONY_PRE = ("gpt-4o", "o200k")
_MARKUP = "</s>"  # of HTML, too: a normal token of that text is one


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A consistent vocabulary: `tokens` are distinct and not empty, `types` and `scores` as many as they."""

    model: str  # one of MODELS
    pre: str  # a key of PRE_TOKENIZERS where model is gpt2
    architecture: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float]  # empty for gpt2
    merges: Sequence[tuple[str, str]]  # of tokens whose concatenation is a token; empty for llama
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    adds_bos: bool
    adds_space_prefix: bool  # llama: text starts with a space that is not in it
    end_of_generation: frozenset[int]
    speaks_harmony: bool


def of_type(types: Sequence[TokenType], kind: TokenType) -> list[int]:
    """Their ids, in order."""
    found: list[int] = []
    start = 0
    for _ in range(types.count(kind)):
        found.append(types.index(kind, start))
        start = found[-1] + 1
    return found


def end_of_generation(names: dict[str, int], ids: Sequence[int | None]) -> frozenset[int]:
    """Which tokens end an answer: `ids` as the file declares them, and turn ends among `names` (control
    tokens).
    """
    ends = {i for i in ids if i is not None} | {names[text] for text in TURN_ENDS if text in names}
    if "<|return|>" in names and "<|call|>" in names:
        # Harmony: <|end|> closes a message, after which the same answer goes on in another channel.
        ends.discard(names.get("<|end|>", -1))
    return frozenset(ends)


def speaks_harmony(names: Collection[str], metadata: Metadata) -> bool:
    """Whether a model answers in Harmony's messages, from its control tokens and what its file says of it."""
    known = (
        metadata.string("general.architecture", default="?") == "gpt-oss"
        or metadata.string("tokenizer.ggml.pre", default="?") in _HARMONY_PRE
    )
    return known and _HARMONY.issubset(names)


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Raises UnsupportedTokenizer or InvalidModelFile, naming the key."""
    model = metadata.string("tokenizer.ggml.model")
    if model not in MODELS:
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.model is {quoted(model)}; supported are {', '.join(MODELS)} and tokenizer.json"
        )
    pre = metadata.string("tokenizer.ggml.pre", default="gpt-2" if model == "gpt2" else "default")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        raise UnsupportedTokenizer(
            f"tokenizer.ggml.pre is {quoted(pre)}; "
            f"supported are {', '.join(PRE_TOKENIZERS)} and tokenizer.json"
        )
    architecture = metadata.string("general.architecture", default="?")
    tokens = _tokens(metadata, architecture)
    declared = {
        name: metadata.optional_integer(f"tokenizer.ggml.{name}_token_id", low=0, high=len(tokens) - 1)
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    ends = [declared["eos"], declared["eot"], declared["eom"]]
    types = _types(metadata, tokens, [declared["bos"], *ends])
    names = {tokens[i]: i for i in of_type(types, TokenType.CONTROL)}
    if model == "gpt2":
        scores, merges, adds_bos = [], _merges(metadata, tokens), PRE_TOKENIZERS[pre].adds_bos
    else:
        scores, merges, adds_bos = _scores(metadata, tokens), [], True
    return Vocabulary(
        model=model,
        pre=pre,
        architecture=architecture,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        bos_id=declared["bos"],
        eos_id=declared["eos"],
        unknown_id=declared["unknown"],
        adds_bos=metadata.boolean("tokenizer.ggml.add_bos_token", default=adds_bos)
        and declared["bos"] is not None,
        adds_space_prefix=metadata.boolean("tokenizer.ggml.add_space_prefix", default=True),
        end_of_generation=end_of_generation(names, ends),
        speaks_harmony=speaks_harmony(names, metadata),
    )


def _tokens(metadata: Metadata, architecture: str) -> list[str]:
    key = "tokenizer.ggml.tokens"
    tokens = metadata.strings(key)
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise InvalidModelFile(f"{key} has {len(tokens)} tokens; allowed are 1 to {MAX_TOKENS}")
    size = metadata.optional_integer(f"{architecture}.vocab_size")
    if size is not None and size != len(tokens):
        raise InvalidModelFile(
            f"{key} has {len(tokens)} tokens, but {quoted(architecture)}.vocab_size is {size}"
        )
    distinct = set(tokens)
    if len(distinct) < len(tokens) or "" in distinct or max(map(len, tokens)) > MAX_TOKEN_BYTES // 4:
        _check_tokens(tokens)
    return tokens


def _check_tokens(tokens: list[str]) -> None:
    """One by one, to name the first that is wrong; most vocabularies are found good all at once."""
    key = "tokenizer.ggml.tokens"
    seen: set[str] = set()
    for i, text in enumerate(tokens):
        if not text:
            raise InvalidModelFile(f"{key}: token {i} is empty")
        if len(text) > MAX_TOKEN_BYTES // 4 and len(text.encode("utf-8", "replace")) > MAX_TOKEN_BYTES:
            raise InvalidModelFile(f"{key}: token {i} is longer than {MAX_TOKEN_BYTES} bytes")
        if text in seen:
            raise InvalidModelFile(f"{key}: token {i}, {quoted(text)}, occurs twice")
        seen.add(text)


def _types(metadata: Metadata, tokens: list[str], declared: list[int | None]) -> list[TokenType]:
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        types = [TokenType.NORMAL] * len(tokens)
    else:
        numbers = metadata.integers(key).tolist()
        if len(numbers) != len(tokens):
            raise InvalidModelFile(f"{key} has {len(numbers)} entries for {len(tokens)} tokens")
        known = {int(t): t for t in TokenType}
        if not known.keys() >= set(numbers):
            i, number = next((i, number) for i, number in enumerate(numbers) if number not in known)
            raise InvalidModelFile(f"{key}: token {i} has type {number}; known are 1 to {max(known)}")
        types = [known[number] for number in numbers]
    for i in of_type(types, TokenType.BYTE):
        if not BYTE_NAME.fullmatch(tokens[i]):
            raise InvalidModelFile(
                f"tokenizer.ggml.tokens: token {i}, {quoted(tokens[i])}, is a byte, but not <0x00> to <0xFF>"
            )
    harmony = {*_HARMONY, "<|constrain|>"}
    names = {text: i for i, text in enumerate(tokens) if text in _NAMES}
    for text, i in names.items():
        is_end = text in TURN_ENDS and (types[i] != TokenType.NORMAL or text != _MARKUP)
        if is_end or (text in harmony and names.keys() >= _HARMONY):
            types[i] = TokenType.CONTROL  # some converters lose it, and then a user could end the turn
    undeclared = {TokenType.USER_DEFINED, TokenType.UNUSED} if key in metadata else {TokenType.NORMAL}
    for i in declared:
        if i is not None and types[i] in undeclared:
            types[i] = TokenType.CONTROL
    return types


def _scores(metadata: Metadata, tokens: list[str]) -> list[float]:
    key = "tokenizer.ggml.scores"
    scores: list[float] = metadata.numbers(key).tolist()
    if len(scores) != len(tokens):
        raise InvalidModelFile(f"{key} has {len(scores)} entries for {len(tokens)} tokens")
    return scores


def _merges(metadata: Metadata, tokens: list[str]) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    lines = metadata.strings(key)
    if len(lines) > MAX_MERGES:
        raise InvalidModelFile(f"{key} has {len(lines)} merges; allowed are up to {MAX_MERGES}")
    vocabulary, halves = set(tokens), [line.partition(" ") for line in lines]
    lefts, rights = [left for left, _, _ in halves], [right for _, _, right in halves]
    joined = map(add, lefts, rights)
    if not all(vocabulary.issuperset(texts) for texts in (lefts, rights, joined)):
        found = zip(lines, lefts, rights, strict=True)
        i, line = next(
            (i, line)
            for i, (line, left, right) in enumerate(found)
            if not vocabulary.issuperset((left, right, left + right))
        )
        raise InvalidModelFile(
            f"{key}: merge {i}, {quoted(line)}, names a token that is not in tokenizer.ggml.tokens"
        )
    merges = zip(lefts, rights, strict=True)
    if len(set(lines)) == len(lines):
        return list(merges)
    return list(dict.fromkeys(merges))  # of a repeated merge the first one counts
