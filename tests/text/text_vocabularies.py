"""Vocabularies for tests: the published ones, unpacked and loaded at most once a session, and tiny ones."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from worker_orcd.gguf.metadata import Metadata
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

VOCAB = Path(__file__).parents[1] / "data" / "vocab"


class Vocabularies:
    """`tests/data/vocab` by name: `phi-3` (a GGUF), `qwen2.5.tokenizer.json` or `qwen2.5 in GGUF`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = cache(self._load)
        self.metadata = cache(self._metadata)
        self.hostile = cache(lambda: json.loads(lzma.decompress((VOCAB / "hostile.json.xz").read_bytes())))

    def path(self, name: str) -> Path:
        stored = name if name.endswith(".json") else f"ggml-vocab-{name}.gguf"
        path = self.directory / stored
        if not path.exists():
            path.write_bytes(lzma.decompress((VOCAB / f"{stored}.xz").read_bytes()))
        return path

    def _metadata(self, name: str) -> Metadata:
        with GGUFFile(self.path(name)) as file:
            return file.metadata

    def _load(self, name: str) -> Tokenizer:
        if name.endswith(" in GGUF"):
            return load_tokenizer(converted(self, name.removesuffix(" in GGUF")))
        if name.endswith(".json"):
            return load_tokenizer(Metadata({}), self.path(name))
        return load_tokenizer(self.metadata(name))


CONVERTED: dict[str, dict[str, Any]] = {
    "gpt-oss": {"rows": 201_088, "pre": "gpt-4o", "bos": 199_998, "eos": 200_002},
    "qwen2.5": {"rows": 151_936, "pre": "qwen2", "bos": 151_643, "eos": 151_645},
}


def converted(vocabularies: Vocabularies, model: str) -> Metadata:
    """A vocabulary as a converter writes it into a GGUF file, from the tokenizer.json of `model`."""
    document = json.loads(vocabularies.path(f"{model}.tokenizer.json").read_bytes())
    about = CONVERTED[model]
    tokens = [f"[PAD{i}]" for i in range(about["rows"])]
    types = np.full(len(tokens), 5, np.int32)
    for text, i in document["model"]["vocab"].items():
        tokens[i], types[i] = text, 1
    for added in document["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], 3 if added["special"] else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    return Metadata(
        {
            "general.architecture": model.replace("2.5", "2"),
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": about["pre"],
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": about["bos"],
            "tokenizer.ggml.eos_token_id": about["eos"],
            "tokenizer.ggml.add_bos_token": False,
        }
    )


def tiny_bpe(**changes: Any) -> Metadata:
    """A byte-level vocabulary of the 256 bytes, "he", "ll", "hell", "hello", and two control tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]
    tokens = [*alphabet, "he", "ll", "hell", "hello", "<|start|>", "<|stop|>"]
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    return _changed(values, changes)


HARMONY_NAMES = [
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]


def tiny_harmony(**changes: Any) -> Metadata:
    """The 256 bytes in their order, the control tokens of Harmony, and <|endoftext|>."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokens = [*(letters[byte] for byte in range(256)), *HARMONY_NAMES, "<|endoftext|>"]
    values = {
        "general.architecture": "gpt-oss",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * (len(tokens) - 256),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": tokens.index("<|return|>"),
    }
    return _changed(values, changes)


def tiny_spm(**changes: Any) -> Metadata:
    """A SentencePiece vocabulary: <unk> <s> </s>, the 256 bytes, ▁ a b, and ▁a ab ▁ab."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -10.0, -10.0, -3.0, -2.0, -1.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return _changed(values, changes)


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> Metadata:
    for name, value in changes.items():
        key = {"architecture": "general.architecture"}.get(name, f"tokenizer.ggml.{name}")
        values[key] = value(values[key]) if callable(value) else value
    for key, kind in (("token_type", np.int32), ("scores", np.float32)):
        full = f"tokenizer.ggml.{key}"
        if isinstance(values.get(full), list) and not any(isinstance(v, str) for v in values[full]):
            values[full] = np.array(values[full], kind)
    return Metadata({k: v for k, v in values.items() if v is not None})
