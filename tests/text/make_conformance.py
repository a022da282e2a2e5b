"""Record ids of the texts in `text_conformance` by the models' own tokenizers: conformance.json.xz.

    pip install tokenizers tiktoken sentencepiece gguf    # 0.23.3, 0.14.0, 0.2.3 and 0.19.0 were used
    python tests/text/make_conformance.py

Qwen2.5 and gpt-oss: `tokenizers` reads the published tokenizer.json, and `tiktoken`, given the same pieces,
has to agree before anything is written. Phi-3: `sentencepiece`, with which its tokenizer was trained, has the
pieces and scores of the vocabulary. Text is cut at control tokens; but for `<unk>`, `<s>` and `<|endoftext|>`
they swallow the white space behind them.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from text_conformance import large_text, texts

VOCAB = Path(__file__).parents[1] / "data" / "vocab"
Encode = Callable[[str, bool], list[int]]  # of a text, with the names of control tokens read or not
KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "qwen2.5": CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-oss": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTION
    + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTION + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def by_tokenizers(content: bytes) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(content)

    def encode(text: str, special: bool) -> list[int]:
        tokenizer.encode_special_tokens = not special
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


def by_tiktoken(content: bytes, pattern: str, *, composes: bool) -> Encode:
    import tiktoken

    document = json.loads(content)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    encoding = tiktoken.Encoding(
        "read",
        pat_str=pattern,
        mergeable_ranks={bytes(alphabet[c] for c in t): i for t, i in document["model"]["vocab"].items()},
        special_tokens={token["content"]: token["id"] for token in document["added_tokens"]},
    )
    always = {token["content"] for token in document["added_tokens"] if not token["special"]}

    def encode(text: str, special: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if composes else text
        return encoding.encode(text, allowed_special="all" if special else always, disallowed_special=())

    return encode


def by_sentencepiece(content: bytes) -> Encode:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    import gguf

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "vocabulary.gguf")
        path.write_bytes(content)
        fields = gguf.GGUFReader(path).fields
        tokens, scores, types = (
            fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
        )
    model = protobuf.ModelProto()
    for text, score, kind in zip(tokens, scores, types, strict=True):
        # Text is cut at control (3) and user-defined (4) tokens before; there may be one unknown (2) piece.
        kept = 2 if text == "<unk>" else kind if kind in (1, 6) else 3
        model.pieces.add(piece=text, score=score, type=kept)
    model.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(tokens)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def cutter(kinds: set[int]) -> re.Pattern[str]:
        names = sorted((t for t, k in zip(tokens, types, strict=True) if k in kinds), key=len, reverse=True)
        spaced = [re.escape(name) + ("" if name in KEEPS_SPACE else r"\s*") for name in names]
        return re.compile("(" + ("|".join(spaced) or "(?!)") + ")")

    cutters = {False: cutter({4}), True: cutter({3, 4})}

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate(cutters[special].split(text)):
            if position % 2:
                ids.append(tokens.index(part.rstrip() if part not in tokens else part))
            elif part:
                ids += pieces.encode(part)
        return ids

    return encode


def record(model: str, encode: Encode, second: Encode | None) -> dict[str, Any]:
    def ids_of(text: str, special: bool) -> list[int]:
        ids = encode(text, special)
        if second is not None and second(text, special) != ids:
            raise SystemExit(f"{model}: the references differ on {text[:80]!r}")
        return ids

    large = ids_of(large_text(), True)
    return {
        "texts": [[text, ids_of(text, False), ids_of(text, True)] for text in texts(model)],
        "large": [len(large), hashlib.sha256(" ".join(map(str, large)).encode()).hexdigest()],
    }


def main() -> None:
    made: dict[str, Any] = {}
    for model, pattern in PATTERNS.items():
        content = lzma.decompress((VOCAB / f"{model}.tokenizer.json.xz").read_bytes())
        second = by_tiktoken(content, pattern, composes=model == "qwen2.5")
        made[model] = record(model, by_tokenizers(content), second)
    content = lzma.decompress((VOCAB / "ggml-vocab-phi-3.gguf.xz").read_bytes())
    made["phi-3"] = record("phi-3", by_sentencepiece(content), None)
    document = json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()
    (VOCAB / "conformance.json.xz").write_bytes(lzma.compress(document, preset=9))


if __name__ == "__main__":
    main()
