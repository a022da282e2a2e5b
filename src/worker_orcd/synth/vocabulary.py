"""Made-up vocabularies that work: any size, any text, the control tokens of the model they stand for.

Published vocabularies are megabytes of data with licences of their own. These have every byte, and syllables
of two, three and four letters with and without a space before them, those of English's frequent letters
first; so text is two or three characters a token, and every text comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, islice

import numpy as np

from worker_orcd.gguf.writer import Written

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"  # most frequent first
_ASCII = [chr(code) for code in range(0x21, 0x7F)]
_BYTE_SPACE = "Ġ"  # a space in the alphabet of byte-level vocabularies
_PIECE_SPACE = "▁"


class _Type(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularySpec:
    """A layout: `head`, ordinary tokens, `tail` from id `tail_at` on, and fillers up to the size.

    In a vocabulary too small for `tail_at` the tail comes last. A name of None is a reserved token.
    """

    pieces: bool = False  # SentencePiece, otherwise byte-level
    pre: str
    head: tuple[str, ...] = ()
    tail: tuple[str | None, ...] = ()
    tail_at: int
    filler: str  # its name: {} is the id
    filler_type: _Type = _Type.CONTROL
    bos: str | None
    eos: str
    padding: str | None = None
    unknown: str | None = None
    adds_bos: bool
    adds_space_prefix: bool | None = None
    template: str


def _template(before: str, after: str, end: str, answer: str) -> str:
    """A chat template: `before` a role, `after` it, at the `end` of a message; `answer` begins one."""
    return (
        "{% for message in messages %}"
        f"{before}{{{{ message.role }}}}{after}{{{{ message.content }}}}{end}"
        "{% endfor %}{% if add_generation_prompt %}" + answer + "{% endif %}"
    )


_CHATML = _template("<|im_start|>", "\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_LLAMA3_HEADER = "<|end_header_id|>\n\n"
_HARMONY = (
    *("<|startoftext|>", "<|endoftext|>", None, None, "<|return|>", "<|constrain|>", None, "<|channel|>"),
    *("<|start|>", "<|end|>", "<|message|>", None, None, None, "<|call|>"),
)

VOCABULARIES: dict[str, VocabularySpec] = {
    "qwen2": VocabularySpec(
        pre="qwen2",
        tail=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        tail_at=151643,
        filler="[PAD{}]",
        filler_type=_Type.UNUSED,
        bos="<|endoftext|>",
        eos="<|im_end|>",
        padding="<|endoftext|>",
        adds_bos=False,
        template=_CHATML,
    ),
    "smollm": VocabularySpec(
        pre="smollm",
        head=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        tail_at=49152,
        filler="[PAD{}]",
        filler_type=_Type.UNUSED,
        bos="<|im_start|>",
        eos="<|im_end|>",
        padding="<|im_end|>",
        adds_bos=False,
        template=_CHATML,
    ),
    "llama3": VocabularySpec(
        pre="llama-bpe",
        tail=(
            *("<|begin_of_text|>", "<|end_of_text|>", None, None, None, None),
            *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        ),
        tail_at=128000,
        filler="<|reserved_special_token_{}|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
        template=_template(
            "<|start_header_id|>",
            _LLAMA3_HEADER,
            "<|eot_id|>",
            f"<|start_header_id|>assistant{_LLAMA3_HEADER}",
        ),
    ),
    "gpt2": VocabularySpec(
        pre="gpt-2",
        tail=("<|endoftext|>",),
        tail_at=50256,
        filler="[PAD{}]",
        filler_type=_Type.UNUSED,
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        adds_bos=False,
        template=_template("", ": ", "\n", "assistant:"),
    ),
    "gpt-oss": VocabularySpec(
        pre="gpt-4o",
        tail=_HARMONY,
        tail_at=199998,
        filler="<|reserved_{}|>",
        bos="<|startoftext|>",
        eos="<|return|>",
        padding="<|endoftext|>",
        adds_bos=False,
        template=_template("<|start|>", "<|message|>", "<|end|>", "<|start|>assistant"),
    ),
    "phi3": VocabularySpec(
        pieces=True,
        pre="default",
        head=("<unk>", "<s>", "</s>"),
        tail=(
            *("<|endoftext|>", "<|assistant|>", None, None, None, None),
            *("<|system|>", "<|end|>", None, None, "<|user|>"),
        ),
        tail_at=32000,
        filler="[PAD{}]",
        filler_type=_Type.UNUSED,
        bos="<s>",
        eos="<|endoftext|>",
        padding="<|endoftext|>",
        unknown="<unk>",
        adds_bos=True,
        template=_template("<|", "|>\n", "<|end|>\n", "<|assistant|>\n"),
    ),
    "gemma3": VocabularySpec(
        pieces=True,
        pre="default",
        head=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
        tail_at=262144,
        filler="<unused{}>",
        bos="<bos>",
        eos="<eos>",
        padding="<pad>",
        unknown="<unk>",
        adds_bos=True,
        adds_space_prefix=False,
        template=_template("<start_of_turn>", "\n", "<end_of_turn>\n", "<start_of_turn>model\n"),
    ),
}


def tokenizer_metadata(name: str, size: int) -> dict[str, Written]:
    """Everything under `tokenizer.` for a vocabulary of `size` tokens, under the converter's keys.

    Raises ValueError where not even the bytes fit.
    """
    spec = VOCABULARIES[name]
    tokens, types, merges = _tokens(spec, size)
    ids = {text: number for number, text in enumerate(tokens)}
    prefix = "tokenizer.ggml"
    values: dict[str, Written] = {
        f"{prefix}.model": "llama" if spec.pieces else "gpt2",
        f"{prefix}.pre": spec.pre,
        f"{prefix}.tokens": tokens,
        f"{prefix}.token_type": np.array(types, np.int32),
    }
    if spec.pieces:
        is_piece = np.array(types) == _Type.NORMAL
        values[f"{prefix}.scores"] = np.where(is_piece, -np.arange(size), -1000).astype(np.float32)
    else:
        values[f"{prefix}.merges"] = merges
    declared = {"bos": spec.bos, "eos": spec.eos, "unknown": spec.unknown, "padding": spec.padding}
    for role, text in declared.items():
        if text is not None:
            values[f"{prefix}.{role}_token_id"] = ids[text]
    values[f"{prefix}.add_bos_token"] = spec.adds_bos
    if spec.adds_space_prefix is not None:
        values[f"{prefix}.add_space_prefix"] = spec.adds_space_prefix
    values["tokenizer.chat_template"] = ("{{ bos_token }}" if spec.adds_bos else "") + spec.template
    return values


def _tokens(spec: VocabularySpec, size: int) -> tuple[list[str], list[_Type], list[str]]:
    """Tokens, their types, and (for byte-level vocabularies) merges."""
    tokens = list(spec.head)
    types = [_Type.UNKNOWN if text == spec.unknown else _Type.CONTROL for text in tokens]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] if spec.pieces else _byte_alphabet()
    tokens += alphabet
    types += [_Type.BYTE if spec.pieces else _Type.NORMAL] * len(alphabet)
    if spec.pieces:
        letters = [_PIECE_SPACE, *_ASCII]
        tokens += letters
        types += [_Type.NORMAL] * len(letters)
    tail_at = spec.tail_at if spec.tail_at + len(spec.tail) <= size else size - len(spec.tail)
    room = min(tail_at, size) - len(tokens)
    if room < 0:
        raise ValueError(f"a vocabulary of {size} tokens is too small; needs {size - room}")
    joined = list(islice(_merges(_PIECE_SPACE if spec.pieces else _BYTE_SPACE), room))
    tokens += [left + right for left, right in joined]
    types += [_Type.NORMAL] * len(joined)
    for text in spec.tail:
        tokens.append(text or spec.filler.format(len(tokens)))
        types.append(_Type.CONTROL)
    while len(tokens) < size:
        tokens.append(spec.filler.format(len(tokens)))
        types.append(spec.filler_type)
    return tokens, types, [f"{left} {right}" for left, right in joined]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte, in the order of its vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def _merges(space: str) -> Iterator[tuple[str, str]]:
    """What is joined, in the order of its rank; of each, the left and right parts come before it."""
    pairs = [left + right for left, right in _diagonals(_LETTERS, _LETTERS)]
    triples = [left + right for left, right in _diagonals(pairs, _LETTERS)]
    return chain(
        _diagonals(_LETTERS, _LETTERS),
        ((space, letter) for letter in _LETTERS),
        ((space, pair) for pair in pairs),
        _diagonals(pairs, _LETTERS),
        ((space, triple) for triple in triples),
        _diagonals(pairs, pairs),
    )


def _diagonals(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, str]]:
    """All pairs, the sum of their positions ascending."""
    for total in range(len(first) + len(second) - 1):
        for index in range(max(0, total - len(second) + 1), min(total + 1, len(first))):
            yield first[index], second[total - index]
