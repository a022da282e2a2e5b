"""Vocabularies that contradict themselves are refused by name of the key, whatever is wrong with them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from text_vocabularies import Vocabularies, tiny_bpe, tiny_spm

from worker_orcd.errors import InvalidModelFile, LoadError, UnsupportedTokenizer
from worker_orcd.gguf.metadata import Metadata
from worker_orcd.text.pretokenizers import PRE_TOKENIZERS
from worker_orcd.text.tokenizer import load_tokenizer


def put(index: int, value: object) -> Any:
    def change(values: list[object]) -> list[object]:
        changed = list(values)
        changed[index] = value
        return changed

    return change


MALFORMED: list[tuple[Any, dict[str, Any], str]] = [
    (tiny_bpe, {"tokens": None}, "tokenizer.ggml.tokens' is missing"),
    (tiny_bpe, {"tokens": []}, "tokenizer.ggml.tokens"),
    (tiny_bpe, {"tokens": "abc"}, "tokenizer.ggml.tokens"),
    (tiny_bpe, {"tokens": put(7, "")}, "tokenizer.ggml.tokens: token 7 is empty"),
    (tiny_bpe, {"tokens": put(9, "hello")}, "tokenizer.ggml.tokens: token 259, 'hello', occurs twice"),
    (
        tiny_bpe,
        {"tokens": put(8, "x" * (1 << 20))},
        "tokenizer.ggml.tokens: token 8 is longer than 4096 bytes",
    ),
    (tiny_bpe, {"tokens": put(8, "é" * 2049)}, "tokenizer.ggml.tokens: token 8 is longer than 4096 bytes"),
    (tiny_bpe, {"tokens": lambda t: t[:-1]}, "tokenizer.ggml.eos_token_id"),
    (tiny_bpe, {"token_type": lambda t: t[:-1]}, "tokenizer.ggml.token_type has 261 entries for 262"),
    (tiny_bpe, {"token_type": lambda t: [*t, 1]}, "tokenizer.ggml.token_type has 263 entries for 262"),
    (tiny_bpe, {"token_type": put(5, 0)}, "tokenizer.ggml.token_type: token 5 has type 0; known are 1 to 6"),
    (tiny_bpe, {"token_type": put(5, 7)}, "tokenizer.ggml.token_type: token 5 has type 7"),
    (tiny_bpe, {"token_type": put(5, -(2**31))}, "tokenizer.ggml.token_type: token 5 has type -2147483648"),
    (tiny_bpe, {"token_type": "normal"}, "tokenizer.ggml.token_type"),
    (tiny_bpe, {"merges": None}, "tokenizer.ggml.merges' is missing"),
    (tiny_bpe, {"merges": ["h e", "l x1"]}, "tokenizer.ggml.merges: merge 1, 'l x1'"),
    (tiny_bpe, {"merges": ["he l"]}, "tokenizer.ggml.merges: merge 0, 'he l'"),
    (tiny_bpe, {"merges": ["hell"]}, "tokenizer.ggml.merges: merge 0, 'hell'"),
    (tiny_bpe, {"merges": ["h e "]}, "tokenizer.ggml.merges: merge 0"),
    (tiny_bpe, {"merges": [""]}, "tokenizer.ggml.merges: merge 0"),
    (tiny_bpe, {"merges": [" "]}, "tokenizer.ggml.merges: merge 0"),
    (tiny_bpe, {"bos_token_id": 262}, "tokenizer.ggml.bos_token_id"),
    (tiny_bpe, {"eos_token_id": -1}, "tokenizer.ggml.eos_token_id"),
    (tiny_bpe, {"eot_token_id": 2**32}, "tokenizer.ggml.eot_token_id"),
    (tiny_bpe, {"eom_token_id": "stop"}, "tokenizer.ggml.eom_token_id"),
    (tiny_bpe, {"padding_token_id": 2**32 - 1}, "tokenizer.ggml.padding_token_id"),
    (tiny_bpe, {"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
    (tiny_bpe, {"model": None}, "tokenizer.ggml.model' is missing"),
    (tiny_bpe, {"model": 3}, "tokenizer.ggml.model"),
    (tiny_bpe, {"pre": ["gpt-2"]}, "tokenizer.ggml.pre"),
    (tiny_spm, {"scores": None}, "tokenizer.ggml.scores' is missing"),
    (tiny_spm, {"scores": lambda s: s[:-1]}, "tokenizer.ggml.scores has 264 entries for 265"),
    (tiny_spm, {"scores": put(3, float("nan"))}, "tokenizer.ggml.scores"),
    (tiny_spm, {"scores": put(3, float("inf"))}, "tokenizer.ggml.scores"),
    (tiny_spm, {"tokens": put(4, "<0x-1>")}, "tokenizer.ggml.tokens: token 4, '<0x-1>', is a byte, but not"),
    (
        tiny_spm,
        {"tokens": put(4, "<0x100>")},
        "tokenizer.ggml.tokens: token 4, '<0x100>', is a byte, but not",
    ),
    (tiny_spm, {"tokens": put(4, "<0x٣٤>")}, "tokenizer.ggml.tokens: token 4"),
    (tiny_spm, {"tokens": put(4, "A")}, "tokenizer.ggml.tokens: token 4, 'A', is a byte, but not"),
    (tiny_spm, {"unknown_token_id": 265}, "tokenizer.ggml.unknown_token_id"),
    (
        tiny_spm,
        {"unknown_token_id": None, "token_type": put(0, 1), "tokens": put(4, "<0xAA>x"), "scores": None},
        "tokenizer.ggml",
    ),
]


@pytest.mark.parametrize(("make", "changes", "message"), MALFORMED)
def test_malformed(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelFile) as raised:
        load_tokenizer(make(**changes))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


def test_the_unchanged_vocabularies_load():
    assert load_tokenizer(tiny_bpe()).vocab_size == 262
    assert load_tokenizer(tiny_spm()).vocab_size == 265


def test_a_different_vocabulary_size_is_refused():
    values = {key: tiny_bpe().raw(key) for key in tiny_bpe()}
    with pytest.raises(InvalidModelFile, match=r"262 tokens, but 'llama'.vocab_size is 32000"):
        load_tokenizer(Metadata({**values, "llama.vocab_size": 32000}))  # type: ignore[dict-item]
    assert load_tokenizer(Metadata({**values, "llama.vocab_size": 262})).vocab_size == 262  # type: ignore[dict-item]


def test_without_bytes_there_must_be_an_unknown_token():
    tokens = ["▁", "a", "<s>"]
    values = {
        "tokens": tokens,
        "token_type": [1, 1, 3],
        "scores": [0.0, 0.0, 0.0],
        "bos_token_id": 2,
        "eos_token_id": None,
    }
    with pytest.raises(InvalidModelFile, match="unknown_token_id is missing"):
        load_tokenizer(tiny_spm(**values, unknown_token_id=None))
    tokenizer = load_tokenizer(tiny_spm(**values, unknown_token_id=1))
    assert tokenizer.encode("zz", add_special=False) == [0, 1]


def test_unsupported_names_are_listed():
    with pytest.raises(
        UnsupportedTokenizer, match=r"tokenizer.ggml.model is 'bert'; supported are gpt2, llama"
    ):
        load_tokenizer(tiny_bpe(model="bert"))
    with pytest.raises(UnsupportedTokenizer, match="'made-up'; supported are") as raised:
        load_tokenizer(tiny_bpe(pre="made-up"))
    assert all(name in str(raised.value) for name in PRE_TOKENIZERS)
    with pytest.raises(UnsupportedTokenizer, match=r"'x{64}'…"):
        load_tokenizer(tiny_bpe(pre="x" * 100_000))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_cuts_and_keeps_all_text(pre: str) -> None:
    tokenizer = load_tokenizer(tiny_bpe(pre=pre))
    text = "I'LL don't  hello12345 ÉCOLE été 日本語!?\r\n\n\t x \u00a0\u3000 ǅʰ🚀 --//\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_digits_are_cut_as_each_model_wants():
    tokens = ["123", "12345", "1234"]
    changes = {"tokens": lambda t: [*t[:-3], *tokens], "token_type": None, "merges": [], "eos_token_id": None}
    threes = load_tokenizer(tiny_bpe(pre="llama-bpe", **changes))
    ones = load_tokenizer(tiny_bpe(pre="gpt-4o", **changes))
    assert [threes.token_text(i) for i in threes.encode("12345", add_special=False)] == ["123", "4", "5"]
    assert threes.encode("12345", add_special=False) == ones.encode("12345", add_special=False)


def test_the_first_of_a_repeated_merge_counts():
    def pieces(merges: list[str]) -> list[str]:
        tokenizer = load_tokenizer(tiny_bpe(tokens=lambda t: [*t[:-4], "ab", "bc", *t[-2:]], merges=merges))
        return [tokenizer.token_text(i) for i in tokenizer.encode("abc")]

    assert pieces(["a b", "b c"]) == pieces(["a b", "b c", "a b"]) == ["ab", "c"]
    assert pieces(["b c", "a b"]) == ["a", "bc"]


def test_long_pieces_do_not_take_forever():
    pieces = ["a" * n for n in range(2, 1000)]
    with pytest.raises(InvalidModelFile, match="too many long pieces"):
        load_tokenizer(
            tiny_spm(
                tokens=lambda t: [*t, *pieces],
                token_type=lambda t: [*t, *[1] * len(pieces)],
                scores=lambda s: [*s, *[-1.0] * len(pieces)],
            )
        )


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_is_an_error_or_a_tokenizer(seed: int) -> None:
    """Nothing but LoadError comes out, panics of the library included; a tokenizer that loads works."""
    draw = random.Random(seed)
    make = draw.choice([tiny_bpe, tiny_spm])
    whole = make()
    values: dict[str, Any] = {key: whole.raw(key) for key in whole}
    odd: list[Any] = [
        "",
        " ",
        "<0x41>",
        "<0xZZ>",
        "▁",
        "<|start|>",
        "</s>",
        "a b",
        "\x00",
        "h e",
        "\U0010ffff",
    ]
    for _ in range(draw.randint(1, 4)):
        key = draw.choice(list(values))
        value = values[key]
        if isinstance(value, list):
            value = list(value)
            for _ in range(draw.randint(1, 3)):
                value[draw.randrange(len(value))] = draw.choice([*odd, draw.choice(value)])
            values[key] = value[: draw.choice([len(value), len(value), len(value) - 1, 1])]
        elif isinstance(value, np.ndarray):
            value = value.copy()
            value[draw.randrange(len(value))] = draw.choice([-1, 0, 1, 2, 3, 4, 5, 6])
            values[key] = value
        else:
            values[key] = draw.choice([0, 1, 264, 2**31, True, "gpt2", "llama", "x"])
    try:
        tokenizer = load_tokenizer(Metadata(values))
    except LoadError:
        return
    for text in ("hello ab <|start|> </s>", "é▁ \x00", ""):
        for special in (False, True):
            ids = tokenizer.encode(text, parse_special=special)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)


def test_published_vocabularies_as_read(vocabularies: Vocabularies) -> None:
    assert vocabularies.tokenizer("qwen2").vocab_size == 151936
    assert vocabularies.tokenizer("phi-3").vocab_size == 32064
    assert vocabularies.tokenizer("phi-3").eos_id == 32000
    assert vocabularies.tokenizer("llama-bpe").bos_id == 128000
    assert {vocabularies.tokenizer(n).kind for n in ("gpt-2", "llama-spm")} == {"gguf-bpe"}
