"""Strings to token ids and back, exactly as the model was trained. Interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from worker_orcd.gguf.metadata import Metadata


class Tokenizer:
    """Immutable and safe to call from several threads.

    Built by `load_tokenizer`. Text given to `encode` never yields control tokens unless `parse_special`.
    """

    kind: Literal["gguf-bpe", "hf-json"]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool  # whether a plain prompt starts with BOS
    end_of_generation: frozenset[int]  # eos, eot, eom, turn tokens: sampling one ends the answer
    control_ids: frozenset[int]  # tokens that no user text may produce

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """`add_special`: BOS as the model wants. `parse_special`: `<|im_end|>` in text becomes its control token."""
        raise NotImplementedError

    def encode_segments(self, segments: Sequence[tuple[str, bool]], *, add_special: bool) -> list[int]:
        """Template text with user text in it: (text, trusted) pairs; only trusted ones may yield control tokens."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        """Whole text at once; invalid UTF-8 becomes U+FFFD."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for in the output stream: raw bytes, possibly a part of a character.

        Control tokens give their name's bytes. Raises InvalidParameter outside the vocabulary.
        """
        raise NotImplementedError

    def token_text(self, token_id: int) -> str:
        """For people and logprobs: the token's text, with U+FFFD for partial characters."""
        raise NotImplementedError


def load_tokenizer(metadata: Metadata, tokenizer_json: Path | None = None) -> Tokenizer:
    """From GGUF metadata, or from a tokenizer.json that overrides it. Raises UnsupportedTokenizer, InvalidModelFile."""
    raise NotImplementedError
