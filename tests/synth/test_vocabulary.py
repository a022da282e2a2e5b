"""Made-up vocabularies: they load, any text comes back, control tokens are where the model has them."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.writer import GGUFWriter
from worker_orcd.synth import SHAPES
from worker_orcd.synth.vocabulary import VOCABULARIES, tokenizer_metadata
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

TINY = 640
TRUE = {shape.vocabulary: shape.vocab_size for shape in SHAPES.values()}
ARCHITECTURES = {shape.vocabulary: shape.architecture for shape in SHAPES.values()}
COMPOSES = ("qwen2",)  # its pre-tokenizer brings text to NFC
HARMONY = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
ENGLISH = (
    "The worker turns prompts into token streams, and something above it decides which model runs where. "
)

each_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synth-vocabularies")


@cache
def loaded(directory: Path, name: str, size: int) -> tuple[Tokenizer, str]:
    """The tokenizer as it is read from a file, and the chat template."""
    path = directory / f"{name}-{size}.gguf"
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", ARCHITECTURES[name])
        for key, value in tokenizer_metadata(name, size).items():
            writer.add(key, value)
    with GGUFFile(path) as file:
        return load_tokenizer(file.metadata), file.metadata.string("tokenizer.chat_template")


@each_vocabulary
@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_comes_back(directory: Path, name: str, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    tokenizer, _ = loaded(directory, name, TINY)
    wanted = unicodedata.normalize("NFC", text) if name in COMPOSES else text
    assert tokenizer.decode(tokenizer.encode(text)) == wanted


@pytest.mark.slow
@each_vocabulary
def test_in_its_true_size(directory: Path, name: str) -> None:
    tokenizer, _ = loaded(directory, name, TRUE[name])
    assert tokenizer.vocab_size == TRUE[name]
    text = ENGLISH + "naïve 漢字 🎉 \t\n\n  1234567890 <html> I'm « done ».  "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ENGLISH) / len(tokenizer.encode(ENGLISH)) > 2  # characters a token
    assert tokenizer.eos_id in tokenizer.end_of_generation


@each_vocabulary
def test_control_tokens_are_not_spelt_by_text(directory: Path, name: str) -> None:
    tokenizer, _ = loaded(directory, name, TINY)
    spec = VOCABULARIES[name]
    for text in {spec.bos, spec.eos, spec.padding, *filter(None, spec.tail)} - {None}:
        [number] = tokenizer.encode(str(text), add_special=False, parse_special=True)
        assert number in tokenizer.control_ids
        assert number not in tokenizer.encode(str(text), add_special=False)


@each_vocabulary
def test_chat_template(directory: Path, name: str) -> None:
    tokenizer, source = loaded(directory, name, TINY)
    template = ChatTemplate(source, bos_token=VOCABULARIES[name].bos or "")
    try:
        prompt = template.render([{"role": "user", "content": "Hi!"}])
    finally:
        template.close()
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    swallowed = prompt.replace("|>\n", "|>") if name == "phi3" else prompt  # its control tokens do that
    assert tokenizer.decode(ids, skip_control=False) == swallowed
    assert "user" in prompt
    assert "Hi!" in prompt
    assert len(tokenizer.control_ids.intersection(ids)) >= (0 if name == "gpt2" else 2)
    assert prompt.startswith(VOCABULARIES[name].bos or "") or not tokenizer.adds_bos


@pytest.mark.slow
def test_harmony_has_its_true_ids(directory: Path) -> None:
    tokenizer, _ = loaded(directory, "gpt-oss", 201088)
    for text, number in HARMONY.items():
        assert tokenizer.encode(text, parse_special=True) == [number]
    assert tokenizer.end_of_generation == {200002, 200012, 199999}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("qwen2", "<|im_end|>", 151645),
        ("llama3", "<|eot_id|>", 128009),
        ("smollm", "<|im_start|>", 1),
        ("gpt2", "<|endoftext|>", 50256),
        ("phi3", "<|end|>", 32007),
        ("phi3", "<|user|>", 32010),
        ("gemma3", "<bos>", 2),
    ],
)
def test_true_ids(directory: Path, name: str, text: str, number: int) -> None:
    tokenizer, _ = loaded(directory, name, TRUE[name])
    assert tokenizer.encode(text, add_special=False, parse_special=True) == [number]


def test_merges_are_made_of_what_stands_before_them() -> None:
    values = tokenizer_metadata("qwen2", 40_000)
    tokens, merges = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    ids = {text: number for number, text in enumerate(tokens)}
    assert len(ids) == 40_000
    for merge in merges:
        left, right = str(merge).split(" ")
        assert max(ids[left], ids[right]) < ids[left + right]


def test_too_small() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 100 tokens is too small; needs 259"):
        tokenizer_metadata("qwen2", 100)
