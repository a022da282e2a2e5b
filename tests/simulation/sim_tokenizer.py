"""The tokenizer of the simulated model: its 24 tokens first, then the bytes that are left."""

from __future__ import annotations

from functools import cache

import numpy as np
from sim_clients import TEXTS

from worker_orcd.gguf.metadata import Metadata
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer


@cache
def tokenizer() -> Tokenizer:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte if byte in plain else next(others)) for byte in range(256)]
    named = ["".join(letters[byte] for byte in text) for text in TEXTS[1:]]
    rest = [letter for letter in letters if letter not in named]
    return load_tokenizer(
        Metadata(
            {
                "general.architecture": "llama",
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "smollm",
                "tokenizer.ggml.tokens": ["<|end|>", *named, *rest],
                "tokenizer.ggml.token_type": np.array([3] + [1] * (len(named) + len(rest))),
                "tokenizer.ggml.merges": ["q r"],
                "tokenizer.ggml.bos_token_id": 0,
                "tokenizer.ggml.eos_token_id": 0,
                "tokenizer.ggml.add_bos_token": False,
            }
        )
    )
