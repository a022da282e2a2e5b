"""Tokenizers from tokenizer.json."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from text_vocabularies import tiny_bpe, tiny_spm

from worker_orcd.errors import InvalidModelFile, LoadError, ModelNotFound, UnsupportedTokenizer
from worker_orcd.gguf.metadata import Metadata
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def byte_level() -> dict[str, Any]:
    """What `tiny_bpe` is, as the file of the library."""
    metadata = tiny_bpe()
    tokens = metadata.strings("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 260 + n, "content": t, **SPECIAL} for n, t in enumerate(tokens[260:])],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {t: i for i, t in enumerate(tokens[:260])},
            "merges": metadata.strings("tokenizer.ggml.merges"),
        },
    }


def sentence_piece() -> dict[str, Any]:
    """What `tiny_spm` is, as the file of the library."""
    tokens = tiny_spm().strings("tokenizer.ggml.tokens")
    document = byte_level()
    document["added_tokens"] = [{"id": n, "content": tokens[n], **SPECIAL} for n in range(3)]
    document["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    document["pre_tokenizer"] = None
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    document["model"] |= {
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": ["▁ ab", "▁a b", "a b", "▁ a"],
    }
    return document


def load(tmp_path: Path, document: object, **metadata: Any) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return load_tokenizer(Metadata({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}), path)


TEXTS = ["hello ab <|start|>", "<s>a</s>", "  ab\n", "é🚀 <0x41>", "", "ab hell"]


@pytest.mark.parametrize(("document", "metadata"), [(byte_level, tiny_bpe), (sentence_piece, tiny_spm)])
def test_the_same_as_from_gguf(tmp_path: Path, document: Any, metadata: Any) -> None:
    ours, theirs = load(tmp_path, document()), load_tokenizer(metadata())
    assert (ours.kind, theirs.kind) == ("hf-json", "gguf-bpe")
    for text in TEXTS:
        for special in (False, True):
            ids = ours.encode(text, parse_special=special)
            assert ids == theirs.encode(text, parse_special=special)
            assert ours.decode(ids, skip_control=False) == theirs.decode(ids, skip_control=False)
    assert ours.vocab_size == theirs.vocab_size
    assert [ours.token_bytes(i) for i in range(ours.vocab_size)] == [
        theirs.token_bytes(i) for i in range(theirs.vocab_size)
    ]
    assert (ours.bos_id, ours.adds_bos) == (theirs.bos_id, theirs.adds_bos)
    assert ours.control_ids - {0} == theirs.control_ids  # <unk> is of a type of its own in GGUF
    assert ours.strips_leading_space == theirs.strips_leading_space


def test_metadata_says_which_ids_are_which(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, byte_level(), bos_token_id=260, eos_token_id=261, add_bos_token=True)
    assert tokenizer.encode("a") == [260, 64]
    assert tokenizer.end_of_generation == {261}
    assert load(tmp_path, sentence_piece(), add_bos_token=False).encode("a") == [262]
    with pytest.raises(InvalidModelFile, match="eos_token_id"):
        load(tmp_path, byte_level(), eos_token_id=262)


def test_eos_without_metadata_is_a_turn_end(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, sentence_piece())
    assert tokenizer.eos_id == 2 and tokenizer.end_of_generation == {2}
    assert load(tmp_path, byte_level()).eos_id is None


def test_nothing_but_the_text_decides(tmp_path: Path) -> None:
    document = byte_level()
    document["model"]["dropout"] = 0.9
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = load(tmp_path, document)
    expected = load_tokenizer(tiny_bpe()).encode("hello hello")
    for _ in range(20):
        assert (
            tokenizer.encode("hello hello") == tokenizer.encode("hello hello", parse_special=True) == expected
        )


def test_added_tokens_that_are_not_special_are_text(tmp_path: Path) -> None:
    document = byte_level()
    document["added_tokens"][0]["special"] = False
    tokenizer = load(tmp_path, document)
    assert tokenizer.encode("a<|start|><|stop|>")[1] == 260
    assert tokenizer.control_ids == {261}


def test_gaps_between_ids(tmp_path: Path) -> None:
    document = byte_level()
    del document["model"]["vocab"]["hello"]
    document["model"]["merges"].remove("hell o")
    with pytest.raises(
        InvalidModelFile, match=r"has id 260 for '<\|start\|>', where the next free one is 259"
    ):
        load(tmp_path, document)
    document = byte_level()
    document["model"]["vocab"]["hello"] = 300
    document["added_tokens"] = []
    tokenizer = load(tmp_path, document)
    assert tokenizer.vocab_size == 301
    assert (tokenizer.token_bytes(299), tokenizer.token_bytes(300)) == (b"", b"hello")


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "the model is WordLevel"),
    ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}, "the model is Unigram"),
    ({"decoder": None}, "the decoder is"),
    ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, "supported are ByteLevel, ByteFallback"),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED)
def test_unsupported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    document = byte_level() | changes
    if "model" in changes:
        document["added_tokens"] = []
    with pytest.raises(UnsupportedTokenizer, match=message):
        load(tmp_path, document)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"model": 3}',
        "[" * 100_000,
        '{"model": {"type": "BPE", "vocab": {"a": -1}}}',
    ],
)
def test_not_a_tokenizer(tmp_path: Path, document: str) -> None:
    with pytest.raises(InvalidModelFile, match=r"tokenizer\.json"):
        load(tmp_path, document)


def test_contradictions(tmp_path: Path) -> None:
    document = byte_level()
    document["model"]["merges"] = ["h x1"]
    with pytest.raises(InvalidModelFile, match=r"tokenizer\.json"):
        load(tmp_path, document)
    document = byte_level()
    document["model"]["vocab"]["z" * 5000] = 259
    with pytest.raises(InvalidModelFile, match=r"tokenizer\.json"):
        load(tmp_path, document)
    document = byte_level()
    document["model"]["vocab"]["far"] = 2**31
    document["added_tokens"] = []
    with pytest.raises(InvalidModelFile, match="allowed are ids below"):
        load(tmp_path, document)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json cannot be read") as raised:
        load_tokenizer(Metadata({}), tmp_path / "nowhere.json")
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("seed", range(150))
def test_random_damage_is_an_error_or_a_tokenizer(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    text = json.dumps(draw.choice([byte_level, sentence_piece])())
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(text))
        text = (
            text[:start]
            + draw.choice(["", "0", '"', "}", "null", "-1", "1e9", "ab"])
            + text[start + draw.randint(0, 3) :]
        )
    try:
        tokenizer = load(tmp_path, text)
    except LoadError:
        return
    for special in (False, True):
        ids = tokenizer.encode("hello ab <|start|>", parse_special=special)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)
