"""SentencePiece vocabularies (Llama 2, Phi-3, Mistral) from GGUF: pieces with scores, bytes for what they
lack.

A space is the character ▁. Of all neighbours whose concatenation is a piece, the one of the highest score is
joined first (Kudo and Richardson 2018, the BPE variant); that is byte-pair merging with the ranks that follow
from the scores. Pieces of equal score are joined in the order of their ids, which no published vocabulary
needs.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from worker_orcd.errors import InvalidModelFile
from worker_orcd.text.bpe import add_tokens
from worker_orcd.text.vocabulary import BYTE_NAME, TokenType, Vocabulary, of_type

SPACE = "▁"
_MAX_SPLITS = 1 << 26  # characters looked at to find the merges; Llama 2's vocabulary needs 1 million

# Phi-3's special tokens swallow the white space behind them, except these.
_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    tokens, scores = vocabulary.tokens, vocabulary.scores
    ids = {t: i for i, t in enumerate(tokens) if vocabulary.types[i] == TokenType.NORMAL}
    if sum(len(t) ** 2 for t in ids) > _MAX_SPLITS:
        raise InvalidModelFile("tokenizer.ggml.tokens has too many long pieces")
    ranked: list[tuple[float, int, list[tuple[str, str]]]] = []
    for text, i in ids.items():
        pairs = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ids and text[k:] in ids]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        if pairs:
            ranked.append((-scores[i], i, pairs))
    ranked.sort(key=lambda r: r[:2])
    return [pair for _, _, pairs in ranked for pair in pairs]


def build_spm(vocabulary: Vocabulary) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer for text and one that also reads control tokens."""
    unknown = vocabulary.unknown_id
    if unknown is None:
        unknown = next((i for i, t in enumerate(vocabulary.types) if t == TokenType.UNKNOWN), None)
    if unknown is None and not has_all_bytes(vocabulary):
        raise InvalidModelFile(
            "tokenizer.ggml.unknown_token_id is missing, "
            "and tokenizer.ggml.tokens lacks some of <0x00> to <0xFF>"
        )
    model = models.BPE(
        vocab={text: i for i, text in enumerate(vocabulary.tokens)},
        merges=_merges(vocabulary),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.adds_space_prefix else []
    swallows = vocabulary.architecture == "phi3"
    user, control = (
        [
            AddedToken(t, normalized=False, rstrip=swallows and t not in _KEEPS_SPACE)
            for t in (vocabulary.tokens[i] for i in of_type(vocabulary.types, k))
        ]
        for k in (TokenType.USER_DEFINED, TokenType.CONTROL)
    )
    built: list[Tokenizer] = []
    for special in ([], control):
        tokenizer = Tokenizer(model)  # both share the model
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        add_tokens(tokenizer, user=user, control=special)
        built.append(tokenizer)
    return built[0], built[1]


def has_all_bytes(vocabulary: Vocabulary) -> bool:
    names = {t for t in vocabulary.tokens if BYTE_NAME.fullmatch(t)}
    return all(f"<0x{b:02X}>" in names for b in range(256))


def piece_bytes(text: str, *, is_byte: bool, is_text: bool) -> bytes:
    """What a piece stands for: its byte, its text with spaces for ▁, or literally its name."""
    if is_byte:
        return bytes([int(text[3:5], 16)])
    return (text.replace(SPACE, " ") if is_text else text).encode()


def spm_bytes(vocabulary: Vocabulary) -> list[bytes]:
    return [
        piece_bytes(
            text, is_byte=kind == TokenType.BYTE, is_text=kind in (TokenType.NORMAL, TokenType.UNUSED)
        )
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
