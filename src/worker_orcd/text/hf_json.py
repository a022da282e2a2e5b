"""Tokenizers from a `tokenizer.json` file of the Hugging Face library: BPE, byte-level or with byte fallback.

The library reads the file; what would make ids depend on anything but the text (truncation, padding, dropout)
is turned off, and what each token stands for is worked out from the file's decoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from worker_orcd.errors import InvalidModelFile, ModelNotFound, UnsupportedTokenizer
from worker_orcd.gguf.metadata import quoted
from worker_orcd.text.bpe import add_tokens, byte_level_bytes
from worker_orcd.text.spm import piece_bytes
from worker_orcd.text.vocabulary import BYTE_NAME, MAX_TOKEN_BYTES, MAX_TOKENS

MAX_FILE_BYTES = 256 << 20

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HFJson:
    plain: Tokenizer  # for text
    special: Tokenizer  # also reads control tokens
    tokens: list[str]  # by id; "" where the file has none
    token_bytes: list[bytes]
    control: dict[int, AddedToken]
    strips_leading_space: bool  # the first token of a text starts with a space that is not in it
    bos_id: int | None  # what the post-processor puts before a text


def read_hf_json(path: Path) -> HFJson:
    """Raises ModelNotFound, InvalidModelFile or UnsupportedTokenizer."""
    content = _content(path)
    special = Tokenizer.from_buffer(content)
    _check_ids(special, content)
    model = special.model
    if not isinstance(model, BPE):
        raise UnsupportedTokenizer(f"tokenizer.json: the model is {type(model).__name__}; supported is BPE")
    model.dropout = None
    special.no_truncation()
    special.no_padding()
    byte_level, strips = _decoder(special)
    plain = _reading_no_control(special)
    added = special.get_added_tokens_decoder()
    tokens = _tokens(special)
    control = {i: token for i, token in added.items() if token.special}
    if byte_level:
        stand_for = byte_level_bytes((t, i not in added) for i, t in enumerate(tokens))
    else:
        stand_for = [
            piece_bytes(t, is_byte=BYTE_NAME.fullmatch(t) is not None, is_text=i not in added)
            for i, t in enumerate(tokens)
        ]
    before = special.encode("", add_special_tokens=True).ids
    return HFJson(
        plain=plain,
        special=special,
        tokens=tokens,
        token_bytes=stand_for,
        control=control,
        strips_leading_space=strips,
        bos_id=before[0] if before and before[0] in control else None,
    )


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelNotFound(f"tokenizer.json cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidModelFile(f"tokenizer.json is larger than {MAX_FILE_BYTES} bytes")
    return data


def _check_ids(tokenizer: Tokenizer, content: bytes) -> None:
    """Where ids in the file leave a gap, the library silently gives added tokens the next free ones."""
    document: Json = json.loads(content)
    added: list[Json] = document.get("added_tokens") or []
    for token in added:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise InvalidModelFile(
                f"tokenizer.json: added_tokens has id {token['id']} for {quoted(token['content'])}, "
                f"where the next free one is {found}"
            )


def _reading_no_control(special: Tokenizer) -> Tokenizer:
    """The same tokenizer, to which names of control tokens are plain text. Shares the model."""
    plain = Tokenizer(special.model)
    if special.normalizer is not None:
        plain.normalizer = special.normalizer
    if special.pre_tokenizer is not None:
        plain.pre_tokenizer = special.pre_tokenizer
    added = special.get_added_tokens_decoder()
    add_tokens(plain, user=[added[i] for i in sorted(added)])
    if plain.get_added_tokens_decoder() != added:  # ids outside the model's vocabulary with gaps between them
        raise UnsupportedTokenizer("tokenizer.json: added_tokens do not follow the vocabulary without gaps")
    plain.encode_special_tokens = True  # set once, before anybody else can see it
    return plain


def _decoder(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether tokens are written in the byte alphabet, and whether a text's leading space is dropped."""
    steps: list[Json] = []
    if tokenizer.decoder is not None:
        found: Json = json.loads(tokenizer.decoder.__getstate__())
        steps = found["decoders"] if found["type"] == "Sequence" else [found]
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return True, False
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        strips = any(
            (step.get("type") == "Strip" and step.get("content") == " " and step.get("start"))
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        return False, strips
    raise UnsupportedTokenizer(
        f"tokenizer.json: the decoder is {quoted(str(kinds))}; "
        "supported are ByteLevel, ByteFallback and Metaspace"
    )


def _tokens(tokenizer: Tokenizer) -> list[str]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise InvalidModelFile("tokenizer.json: model.vocab is empty")
    size = max(vocabulary.values()) + 1
    if size > MAX_TOKENS:
        raise InvalidModelFile(
            f"tokenizer.json: model.vocab has id {size - 1}; allowed are ids below {MAX_TOKENS}"
        )
    tokens = [""] * size
    for text, i in vocabulary.items():
        if len(text.encode("utf-8", "replace")) > MAX_TOKEN_BYTES:
            raise InvalidModelFile(f"tokenizer.json: token {i} is longer than {MAX_TOKEN_BYTES} bytes")
        if tokens[i]:
            raise InvalidModelFile(f"tokenizer.json: two tokens have id {i}")
        tokens[i] = text
    return tokens
