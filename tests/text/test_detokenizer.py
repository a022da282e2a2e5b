"""Token ids to text: control tokens by id only, messages where the model and the prompt are for them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from harmony_streams import EXAMPLES
from text_vocabularies import HARMONY_NAMES, Vocabularies, tiny_bpe, tiny_harmony, tiny_spm

from worker_orcd.text.detokenizer import HarmonyDetokenizer, PlainDetokenizer, detokenizer
from worker_orcd.text.regions import Message
from worker_orcd.text.stream import Delta, TextStream
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

TINY = load_tokenizer(tiny_harmony())
IDS = {name: 256 + n for n, name in enumerate([*HARMONY_NAMES, "<|endoftext|>"])}


def deltas(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[Delta]:
    stream = detokenizer(tokenizer, [], **options)
    return [*map(stream.push, ids), stream.finish()]


def answer_ids(text: str) -> list[int]:
    return TINY.encode(text, add_special=False, parse_special=True)


ANSWER = (
    "<|channel|>analysis<|message|>Hm: é<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
)


# --- which models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "speaks"),
    [
        ({}, True),
        ({"architecture": "llama"}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "architecture": "llama"}, False),
        ({"pre": "o200k", "architecture": "llama"}, True),
        ({"tokens": lambda t: [x.replace("<|channel|>", "<|other|>") for x in t]}, False),
        ({"tokens": lambda t: [x.replace("<|call|>", "<|other|>") for x in t]}, False),
    ],
)
def test_who_speaks_harmony(changes: dict[str, Any], speaks: bool) -> None:
    tokenizer = load_tokenizer(tiny_harmony(**changes))
    assert tokenizer.speaks_harmony is speaks
    expected = HarmonyDetokenizer if speaks else PlainDetokenizer
    assert type(detokenizer(tokenizer, [], messages=True)) is expected
    assert type(detokenizer(tokenizer, [])) is PlainDetokenizer


def test_no_other_vocabulary_does(vocabularies: Vocabularies) -> None:
    others = [load_tokenizer(tiny_bpe()), load_tokenizer(tiny_spm())]
    others += [vocabularies.tokenizer(name) for name in ("qwen2", "phi-3", "llama-bpe", "gpt-2")]
    assert not any(tokenizer.speaks_harmony for tokenizer in others)
    assert vocabularies.tokenizer("gpt-oss in GGUF").speaks_harmony


@pytest.mark.parametrize("kind", [1, 4, 5])
def test_its_tokens_are_control_whatever_the_file_calls_them(kind: int) -> None:
    tokenizer = load_tokenizer(tiny_harmony(token_type=[1] * 256 + [kind] * len(IDS)))
    assert tokenizer.speaks_harmony
    assert tokenizer.control_ids == set(IDS.values())
    text = "<|start|>system<|message|>Obey.<|end|>"
    assert tokenizer.encode(text) == [*text.encode()]


def test_what_ends_an_answer(vocabularies: Vocabularies) -> None:
    assert {IDS[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>")} == TINY.end_of_generation
    declared = load_tokenizer(tiny_harmony(eot_token_id=IDS["<|end|>"]))  # some files say so
    assert declared.end_of_generation == TINY.end_of_generation
    for source in ("gpt-oss.tokenizer.json", "gpt-oss in GGUF"):
        assert vocabularies.tokenizer(source).end_of_generation == {199999, 200002, 200012}


# --- messages ----------------------------------------------------------------------------------------------


def test_each_token_gives_one_delta_with_its_message():
    ids = answer_ids(ANSWER)
    found = deltas(TINY, ids, messages=True)
    assert len(found) == len(ids) + 1
    analysis, final = (
        Message("analysis", header="<|channel|>analysis"),
        Message("final", header="<|start|>assistant<|channel|>final"),
    )
    for delta, token in zip(found, [*ids, None], strict=True):
        assert delta.message in (analysis, final, None)
        assert delta.text == "" or delta.message is not None
        assert delta.text == "" or token not in IDS.values()
    assert "".join(d.text for d in found if d.message == analysis) == "Hm: é"
    assert "".join(d.text for d in found if d.message == final) == "Yes."
    headers = [i for delta, i in zip(found, ids, strict=False) if delta.message is None]
    assert TINY.decode(headers, skip_control=False) == (
        "<|channel|>analysis<|message|><|start|>assistant<|channel|>final<|message|>"
    )


def test_only_control_tokens_are_control():
    """The names of control tokens, spelled by ordinary ones."""
    ids = [
        *answer_ids("<|channel|>final<|message|>"),
        *b"<|end|><|start|>assistant<|channel|>analysis<|message|>x",
    ]
    found = deltas(TINY, ids, messages=True)
    assert (
        "".join(delta.text for delta in found) == "<|end|><|start|>assistant<|channel|>analysis<|message|>x"
    )
    assert {delta.message.channel for delta in found if delta.message} == {"final"}
    spelled = [*b"<|channel|>analysis<|message|>x"]
    assert (
        "".join(delta.text for delta in deltas(TINY, spelled, messages=True))
        == "<|channel|>analysis<|message|>x"
    )


def test_other_control_tokens_and_padding_mean_nothing():
    start = answer_ids("<|channel|>final<|message|>")
    ids = [*start, *b"a", IDS["<|endoftext|>"], TINY.vocab_size + 7, *b"b", IDS["<|return|>"]]
    assert "".join(delta.text for delta in deltas(TINY, ids, messages=True)) == "ab"


def test_an_answer_to_a_raw_prompt_is_one_text():
    found = deltas(TINY, answer_ids(ANSWER))
    assert "".join(delta.text for delta in found) == "analysisHm: éassistantfinalYes."
    assert {delta.message for delta in found} == {None}


def test_stop_strings_of_messages():
    found = deltas(TINY, answer_ids(ANSWER), messages=True, stop=["Hm", "es"])
    assert "".join(delta.text for delta in found) == "Hm: éY"
    stopped = [delta for delta in found if delta.stopped]
    assert {delta.stopped for delta in stopped} == {"es"}
    assert [delta.text for delta in stopped[1:]] == [""] * (len(stopped) - 1)


@pytest.mark.parametrize("name", EXAMPLES["answers"])
def test_recorded_ids(name: str, vocabularies: Vocabularies) -> None:
    """Ids as the authors' library makes them of the examples, through the real vocabulary."""
    answer = EXAMPLES["answers"][name]
    tokenizer = vocabularies.tokenizer("gpt-oss in GGUF")
    assert tokenizer.encode(answer["text"], parse_special=True) == answer["ids"]
    found = deltas(tokenizer, answer["ids"], messages=True)
    text = "".join(delta.text for delta in found).strip()
    assert text == "".join(message[3] for message in answer["messages"])


# --- known texts ---


@pytest.mark.parametrize("name", ["qwen2", "phi-3", "llama-bpe", "gpt-2"])
def test_texts_of_tokens_that_are_known(name: str, vocabularies: Vocabularies) -> None:
    """None for control tokens, parts of characters, and what is no token; the others as they are decoded."""
    tokenizer = vocabularies.tokenizer(name)
    for token in [*range(0, tokenizer.vocab_size, 7), *tokenizer.control_ids, tokenizer.vocab_size + 1]:
        whole = tokenizer.whole_text(token)
        assert tokenizer.whole_text(token) is whole
        if token in tokenizer.control_ids or token >= tokenizer.vocab_size:
            assert whole is None
        else:
            data = tokenizer.token_bytes(token)
            text = data.decode("utf-8", "replace")
            assert whole == (Delta(text) if text.encode() == data else None)


@pytest.mark.parametrize("name", ["qwen2", "phi-3"])
@pytest.mark.parametrize("stop", [(), ("th", "e \N{GREEK SMALL LETTER ALPHA}")])
def test_any_tokens_in_any_order(name: str, stop: tuple[str, ...], vocabularies: Vocabularies) -> None:
    """Parts of characters among whole ones, control tokens, padding: the texts joined are what bytes give."""
    tokenizer = vocabularies.tokenizer(name)
    generator = random.Random(name)
    parts = [i for i in range(tokenizer.vocab_size) if tokenizer.whole_text(i) is None]
    for _ in range(300):
        ids = [generator.randrange(tokenizer.vocab_size + 3) for _ in range(generator.randrange(12))]
        ids += generator.choices(parts, k=generator.randrange(6))
        generator.shuffle(ids)
        first, data = True, b""
        for token in filter(tokenizer.is_text, ids):
            data += tokenizer.stream_bytes(token, first=first)
            first = False
        stream = TextStream(stop)
        expected = stream.push(data).text + stream.finish().text
        assert "".join(delta.text for delta in deltas(tokenizer, ids, stop=stop)) == expected


# --- one text ----------------------------------------------------------------------------------------------


def test_plain_answers_are_what_decoding_gives():
    spm = load_tokenizer(tiny_spm())
    ids = spm.encode("ab a", add_special=False)
    assert "".join(delta.text for delta in deltas(spm, [1, *ids, 2])) == spm.decode([1, *ids, 2]) == "ab a"
    continued = detokenizer(spm, [ids[0]])
    assert continued.push(ids[0]).text == " ab"
    bpe = load_tokenizer(tiny_bpe())
    ids = bpe.encode("hello é🚀", add_special=False)
    assert "".join(delta.text for delta in deltas(bpe, [*ids, 99_999])) == "hello é🚀"
    assert "".join(delta.text for delta in deltas(bpe, ids, stop=["é"])) == "hello "
