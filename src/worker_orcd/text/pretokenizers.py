"""How text is cut into words before byte pairs are merged: one list of regular expressions for each
`tokenizer.ggml.pre`.

The expressions are those of the models' own `tokenizer.json`. Each is applied to what the one before it left;
matches and the text between them become words. A name is listed only where its expressions are certain: a
wrong one gives ids that the model was never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Regular expressions of the Oniguruma dialect, and what else goes with them."""

    expressions: tuple[str, ...]
    whole_words: bool = False  # a word that is in the vocabulary is that token, whatever the merges say
    composes: bool = False  # text is brought to Unicode's form NFC first
    adds_bos: bool = False  # unless `tokenizer.ggml.add_bos_token` says otherwise


_SINGLE_DIGITS = PreTokenizer((_DIGIT, _GPT2))
_LLAMA = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_QWEN = PreTokenizer((_QWEN2,), composes=True)
_GPT4O = PreTokenizer((_O200K,), whole_words=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt-2": PreTokenizer((_GPT2,)),
        "smollm": _SINGLE_DIGITS,
        "starcoder": _SINGLE_DIGITS,
        "refact": _SINGLE_DIGITS,
        "command-r": _SINGLE_DIGITS,
        "qwen2": _QWEN,
        "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
        "qwen35": PreTokenizer((_QWEN35,), composes=True),
        "llama-bpe": _LLAMA,
        "llama3": _LLAMA,
        "llama-v3": _LLAMA,
        "gpt-4o": _GPT4O,
        "o200k": _GPT4O,
    }
)
