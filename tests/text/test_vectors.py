"""Token ids against others: published vectors, llama.cpp's, and those of the models' own tokenizer.json."""

from __future__ import annotations

import random
import unicodedata
from itertools import islice

import pytest
from text_vocabularies import VOCAB, Vocabularies

from worker_orcd.text.tokenizer import Tokenizer

GGUF_NAMES = sorted(
    p.name.removeprefix("ggml-vocab-").removesuffix(".gguf.xz") for p in VOCAB.glob("*.gguf.xz")
)


def cases(name: str) -> list[tuple[str, list[int]]]:
    """The text and the ids of every case of a published vector file."""
    texts = (VOCAB / f"ggml-vocab-{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (VOCAB / f"ggml-vocab-{name}.out").read_text().split("\n")
    return list(zip(texts, [[int(i) for i in line.split()] for line in lines], strict=True))


def check(capsys: pytest.CaptureFixture[str], title: str, tried: int, wrong: list[object]) -> None:
    with capsys.disabled():
        print(f"\n  {title}: {tried} lines tried, {len(wrong)} wrong", end="")
    assert wrong == []


def test_all_vocabularies_are_tried():
    assert GGUF_NAMES == ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"]


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_published_vectors(name: str, vocabularies: Vocabularies, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = vocabularies.tokenizer(name)
    vectors = cases(name)
    assert len(vectors) == 47
    wrong = [text for text, ids in vectors if tokenizer.encode(text, add_special=False) != ids]
    check(capsys, name, len(vectors), wrong)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_vectors_come_back_as_text(name: str, vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer(name)
    assert [tokenizer.decode(tokenizer.encode(text)) for text, _ in cases(name)] == [
        t for t, _ in cases(name)
    ]


def test_qwen_vectors_by_tokenizer_json(
    vocabularies: Vocabularies, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = vocabularies.tokenizer("qwen2.5.tokenizer.json")
    vectors = cases("qwen2")
    check(
        capsys,
        "qwen2.5 tokenizer.json",
        len(vectors),
        [text for text, ids in vectors if tokenizer.encode(text) != ids],
    )


@pytest.mark.parametrize("name", [*GGUF_NAMES, "smollm2"])
def test_hostile_strings_as_llama_cpp(
    name: str, vocabularies: Vocabularies, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids recorded from llama.cpp, of text without and with control tokens read.

    Left out where we follow the model's own tokenizer and llama.cpp does not: text that Qwen's composes
    (NFC), and white space beyond ASCII, which Phi-3's special tokens swallow too.
    """
    tokenizer: Tokenizer = (
        request.getfixturevalue("smollm2") if name == "smollm2" else vocabularies.tokenizer(name)
    )
    wrong: list[object] = []
    rows = vocabularies.hostile()[name]
    for text, plain, special in rows:
        if tokenizer.encode(text, add_special=False) != plain:
            wrong.append((text, "plain"))
        if tokenizer.encode(text, add_special=False, parse_special=True) != special:
            wrong.append((text, "special"))
    check(capsys, f"{name} hostile", 2 * len(rows), wrong)


def hostile_strings(seed: int, count: int) -> list[str]:
    """Text of many scripts, decomposed accents and odd white space."""
    draw = random.Random(seed)
    blocks = [(32, 126), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x900, 0x97F), (0x3040, 0x30FF)]
    blocks += [(0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (9, 13), (32, 32), (48, 57), (65, 90), (97, 122)]
    return [
        "".join(chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(1, 24)))
        for _ in range(count)
    ]


def test_qwen_from_gguf_as_its_tokenizer_json(vocabularies: Vocabularies) -> None:
    """The vocabulary in the GGUF lacks later special tokens, but its 151643 ordinary ones are the same."""
    ours, theirs = vocabularies.tokenizer("qwen2"), vocabularies.tokenizer("qwen2.5.tokenizer.json")
    texts = hostile_strings(3, 1500)
    assert sum(unicodedata.normalize("NFC", t) != t for t in texts) > 100
    assert [t for t in texts if ours.encode(t) != theirs.encode(t)] == []
    assert all(ours.token_bytes(i) == theirs.token_bytes(i) for i in range(151_646))
    assert ours.end_of_generation == theirs.end_of_generation == {151643, 151645}


@pytest.mark.slow
def test_o200k_from_gguf_as_its_tokenizer_json(vocabularies: Vocabularies) -> None:
    """GPT-OSS: metadata made from its tokenizer.json, as a converter would, gives the same ids and bytes."""
    theirs = vocabularies.tokenizer("gpt-oss.tokenizer.json")
    ours = vocabularies.tokenizer("gpt-oss in GGUF")
    texts = hostile_strings(4, 1500)
    texts += ["<|start|>user<|message|>HTTPServer I'LL x+=1//\n<|end|><|call|>", "ʰªǅ ΑΒΓ straßeİi 12345"]
    for special in (False, True):
        wrong = (
            t
            for t in texts
            if ours.encode(t, parse_special=special) != theirs.encode(t, parse_special=special)
        )
        assert list(islice(wrong, 3)) == []
    assert all(ours.token_bytes(i) == theirs.token_bytes(i) for i in range(theirs.vocab_size))
    assert ours.end_of_generation == theirs.end_of_generation == {199999, 200002, 200012}
    assert theirs.eos_id == ours.eos_id == 200002
