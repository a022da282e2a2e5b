"""Ids of 30 texts for each model, and of a million characters, as the models' own tokenizers make them."""

from __future__ import annotations

import hashlib
import json
import lzma
import unicodedata
from typing import Any

import pytest
from text_conformance import SPECIAL, large_text, texts
from text_vocabularies import VOCAB, Vocabularies

from worker_orcd.text.detokenizer import PlainDetokenizer
from worker_orcd.text.tokenizer import Tokenizer

STORED: dict[str, Any] = json.loads(lzma.decompress((VOCAB / "conformance.json.xz").read_bytes()))
SOURCES = {
    "qwen2.5": ["qwen2.5.tokenizer.json", "qwen2.5 in GGUF"],
    "phi-3": ["phi-3"],
    "gpt-oss": ["gpt-oss.tokenizer.json", "gpt-oss in GGUF"],
}
PAIRS = [(model, source) for model, sources in SOURCES.items() for source in sources]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text token by token, as an answer to a prompt that is empty."""
    stream = PlainDetokenizer(tokenizer, (), starts_text=True)
    return "".join([*(stream.push(i).text for i in ids), stream.finish().text])


def normal(model: str, text: str) -> str:
    """What a text is after encoding and decoding. To SentencePiece, ▁ is a space."""
    if model == "phi-3":
        return text.replace("▁", " ")
    return unicodedata.normalize("NFC", text) if model == "qwen2.5" else text


def test_there_are_30_texts_of_each_model():
    assert {model: [row[0] for row in stored["texts"]] for model, stored in STORED.items()} == {
        model: texts(model) for model in SPECIAL
    }
    assert {len(texts(model)) for model in SPECIAL} == {30}
    assert {"", " "} < set(texts("phi-3"))
    with_control = [row for stored in STORED.values() for row in stored["texts"] if row[1] != row[2]]
    assert len(with_control) == 12


@pytest.mark.parametrize(("model", "source"), PAIRS)
def test_ids_as_stored(model: str, source: str, vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer(source)
    wrong: list[object] = []
    for text, plain, special in STORED[model]["texts"]:
        if tokenizer.encode(text, add_special=False) != plain:
            wrong.append((text[:60], "plain"))
        if tokenizer.encode(text, add_special=False, parse_special=True) != special:
            wrong.append((text[:60], "special"))
    assert wrong == []


@pytest.mark.parametrize(("model", "source"), PAIRS)
def test_ids_come_back_as_text_at_once_and_streamed(
    model: str, source: str, vocabularies: Vocabularies
) -> None:
    tokenizer = vocabularies.tokenizer(source)
    for text, plain, special in STORED[model]["texts"]:
        assert tokenizer.decode(plain) == streamed(tokenizer, plain) == normal(model, text)
        assert tokenizer.decode(special) == streamed(tokenizer, special)
        if (
            model != "phi-3"
        ):  # whose control tokens swallow white space, and are followed by a space that is none
            assert tokenizer.decode(special, skip_control=False) == normal(model, text)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "source"), PAIRS)
def test_a_million_characters(model: str, source: str, vocabularies: Vocabularies) -> None:
    tokenizer, text = vocabularies.tokenizer(source), large_text()
    assert len(text) == 1_000_000
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    assert [len(ids), hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()] == STORED[model]["large"]
    assert tokenizer.decode(ids) == normal(model, text)
    assert tokenizer.decode(ids[:100_000]) == streamed(tokenizer, ids[:100_000])
