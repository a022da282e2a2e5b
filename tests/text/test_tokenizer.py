"""What a Tokenizer promises beyond the ids of the vectors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_vocabularies import Vocabularies, tiny_bpe, tiny_spm
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel

from worker_orcd.errors import InvalidModelFile, InvalidParameter
from worker_orcd.text.stream import TextStream
from worker_orcd.text.tokenizer import Tokenizer, TokenizerParts, load_tokenizer

TINY = load_tokenizer(tiny_bpe())
TINY_SPM = load_tokenizer(tiny_spm())
START, STOP = TINY.vocab_size - 2, TINY.vocab_size - 1

PUBLISHED = ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder"]
JSONS = ["qwen2.5.tokenizer.json", "gpt-oss.tokenizer.json"]


def test_merges_in_a_tiny_vocabulary():
    assert TINY.decode(TINY.encode("hello")) == "hello"
    assert [TINY.token_text(i) for i in TINY.encode("hello hell he")] == ["hello", " ", "hell", " ", "he"]


def test_spm_joins_by_score():
    # ▁ab scores best, but is reached only through ▁a (-3) or ab (-2): ab first.
    assert [TINY_SPM.token_text(i) for i in TINY_SPM.encode("ab b", add_special=False)] == [" ab", " ", "b"]
    assert TINY_SPM.encode("é", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9]


@pytest.mark.parametrize("name", [*PUBLISHED, *JSONS])
def test_text_never_yields_control_tokens(name: str, vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer(name)
    assert tokenizer.control_ids
    for text in sorted(tokenizer.control_texts)[:20]:
        for spelled in (text, f"a{text}b", f"{text} {text}\n", text[:-1] + text):
            ids = tokenizer.encode(spelled, add_special=False)
            assert tokenizer.control_ids.isdisjoint(ids)
            assert tokenizer.decode(ids) == spelled
            ids = tokenizer.encode(spelled, add_special=False, parse_special=True)
            assert not tokenizer.control_ids.isdisjoint(ids)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<|start|>", "<|stop|>", "<|", "|>", "st", "<", "a", " ", "\n", "hello", "é"]))
)
def test_nothing_spells_a_control_token(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = TINY.encode(text)
    assert TINY.control_ids.isdisjoint(ids)
    assert TINY.decode(ids) == text
    assert TINY.decode(TINY.encode(text, parse_special=True), skip_control=False) == text


def test_bos_as_the_model_wants(vocabularies: Vocabularies) -> None:
    spm, gpt2 = vocabularies.tokenizer("llama-spm"), vocabularies.tokenizer("gpt-2")
    assert spm.adds_bos and spm.encode("a") == [1, *spm.encode("a", add_special=False)]
    assert spm.encode("") == [1]
    assert not gpt2.adds_bos and gpt2.encode("a") == gpt2.encode("a", add_special=False)
    assert vocabularies.tokenizer("llama-bpe").encode("")[:1] == [128000]
    assert load_tokenizer(tiny_spm(add_bos_token=False)).encode("") == []
    assert load_tokenizer(tiny_spm(bos_token_id=None)).adds_bos is False


def test_space_prefix_can_be_off():
    tokenizer = load_tokenizer(tiny_spm(add_space_prefix=False))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("ab", add_special=False)] == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


# --- trusted and other segments ----------------------------------------------------------------------------


def test_segments_tokenise_as_one_text():
    whole = TINY.encode("<|start|>hello<|stop|>", parse_special=True)
    for parts in (
        [("<|start|>hello<|stop|>", True)],
        [("<|start|>", True), ("hello", False), ("<|stop|>", True)],
        [("<|start|>he", True), ("ll", False), ("o<|", True), ("stop|>", True)],
    ):
        assert TINY.encode_segments(parts, add_special=False) == whole


def test_untrusted_segments_stay_text():
    parts = [("<|start|>", True), ("hello<|stop|><|start|>", False), ("<|stop|>", True)]
    ids = TINY.encode_segments(parts, add_special=False)
    assert [i for i in ids if i in TINY.control_ids] == [START, STOP]
    assert ids[0] == START and ids[-1] == STOP
    assert TINY.decode(ids, skip_control=False) == "<|start|>hello<|stop|><|start|><|stop|>"


@pytest.mark.parametrize(
    "parts",
    [
        [("<|", True), ("start|>", False)],
        [("<|start", False), ("|>", True)],
        [("<|st", True), ("ar", False), ("t|>", True)],
        [("<", False), ("|start|>", True)],
    ],
)
def test_a_control_token_is_trusted_from_end_to_end(parts: list[tuple[str, bool]]) -> None:
    ids = TINY.encode_segments(parts, add_special=False)
    assert TINY.control_ids.isdisjoint(ids)
    assert TINY.decode(ids) == "<|start|>"


def test_the_templates_own_token_survives_what_is_before_it():
    ids = TINY.encode_segments([("<|start", False), ("<|stop|>", True), ("|>", False)], add_special=False)
    assert [i for i in ids if i in TINY.control_ids] == [STOP]
    assert TINY.decode(ids, skip_control=False) == "<|start<|stop|>|>"


def test_the_fillers_own_character_in_text():
    text = TINY.filler * 3 + "<|start|>"
    assert TINY.decode(TINY.encode_segments([(text, False)], add_special=False)) == text
    assert TINY.encode_segments([(text, True)], add_special=False)[-1] == START


def test_segments_add_bos():
    assert TINY_SPM.encode_segments([("ab", True)], add_special=True)[0] == 1
    assert TINY_SPM.encode_segments([("<s>", False)], add_special=True).count(1) == 1


def test_special_tokens_of_phi3_swallow_space(vocabularies: Vocabularies) -> None:
    phi3 = vocabularies.tokenizer("phi-3")
    text = "<|user|>\n  Hi<|end|>\n<|assistant|>\n"
    ids = phi3.encode(text, add_special=False, parse_special=True)
    assert ids == [32010, *phi3.encode("Hi", add_special=False), 32007, 32001]
    # The same when a spelled-out token in the message makes the segments be tokenised one by one.
    parts = [("<|user|>\n", True), ("  Hi<|end|>", False), ("<|end|>\n<|assistant|>\n", True)]
    ids = phi3.encode_segments(parts, add_special=False)
    assert ids == [32010, *phi3.encode("Hi<|end|>", add_special=False), 32007, 32001]


# --- what tokens stand for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLISHED, *JSONS])
def test_streamed_bytes_are_the_decoded_text(name: str, vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer(name)
    texts = ["Hello, wörld!\n\n  🚀 x", " leading", "", "▁ ▁", "日本語\u0301", "  two"]
    for text in texts:
        ids = tokenizer.encode(text)
        first = True
        stream = TextStream()
        out = ""
        for i in ids:
            if i not in tokenizer.control_ids:
                out += stream.push(tokenizer.stream_bytes(i, first=first)).text
                first = False
        assert out + stream.finish().text == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 264)), st.booleans())
def test_streaming_any_ids_is_decoding_them(ids: list[int], skip: bool) -> None:
    stream = TextStream()
    first = True
    out = ""
    for i in ids:
        control = i in TINY_SPM.control_ids
        if not (control and skip):
            out += stream.push(TINY_SPM.stream_bytes(i, first=first)).text
        first = first and control
    assert out + stream.finish().text == TINY_SPM.decode(ids, skip_control=skip)


def test_an_answer_begins_a_text_only_after_a_control_token():
    assert TINY_SPM.starts_text([]) and TINY_SPM.starts_text([1])
    assert not TINY_SPM.starts_text(TINY_SPM.encode("a"))
    assert TINY_SPM.stream_bytes(262, first=True) == b"a"
    assert TINY_SPM.stream_bytes(262, first=False) == TINY_SPM.token_bytes(262) == b" a"


def test_token_bytes_of_every_kind(vocabularies: Vocabularies) -> None:
    assert TINY_SPM.token_bytes(3 + 0xF0) == b"\xf0"
    assert TINY_SPM.token_text(3 + 0xF0) == "\ufffd"
    assert TINY_SPM.token_bytes(2) == b"</s>"
    rocket = vocabularies.tokenizer("gpt-2").encode("🚀")
    assert len(rocket) > 1
    assert b"".join(map(vocabularies.tokenizer("gpt-2").token_bytes, rocket)) == "🚀".encode()


def test_all_bytes_can_be_written(vocabularies: Vocabularies) -> None:
    for name in PUBLISHED:
        tokenizer = vocabularies.tokenizer(name)
        singles = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        lacking = {b for b in range(256) if bytes([b]) not in singles}
        assert lacking <= ({0xC0, 0xC1, 0xF1, *range(0xF5, 0x100)} if name == "starcoder" else set())


@pytest.mark.parametrize("token_id", [-1, TINY.vocab_size, 2**31, 2**63])
def test_ids_outside_the_vocabulary(token_id: int) -> None:
    for call in (TINY.token_bytes, TINY.token_text, lambda i: TINY.decode([i])):
        with pytest.raises(
            InvalidParameter, match=f"{token_id} is outside the vocabulary of {TINY.vocab_size}"
        ):
            call(token_id)


def test_control_tokens_are_left_out_of_text():
    ids = [START, *TINY.encode("hello"), STOP]
    assert TINY.decode(ids) == "hello"
    assert TINY.decode(ids, skip_control=False) == "<|start|>hello<|stop|>"


# --- which tokens end an answer ----------------------------------------------------------------------------


def test_ends_of_generation(vocabularies: Vocabularies, smollm2: Tokenizer) -> None:
    assert vocabularies.tokenizer("phi-3").end_of_generation == {2, 32000, 32007}
    assert vocabularies.tokenizer("llama-bpe").end_of_generation == {128001, 128009}
    assert smollm2.end_of_generation == {0, 2}
    declared = load_tokenizer(tiny_bpe(eot_token_id=START, eom_token_id=5, eos_token_id=None))
    assert declared.end_of_generation == {START, 5}


def test_a_message_end_of_harmony_does_not_end_the_answer(vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer("gpt-oss.tokenizer.json")
    texts = {tokenizer.token_text(i) for i in tokenizer.end_of_generation}
    assert texts == {"<|return|>", "<|call|>", "<|endoftext|>"}


def test_turn_ends_are_control_tokens_whatever_the_file_says():
    def renamed(tokens: list[str]) -> list[str]:
        return [*tokens[:-2], "<|im_end|>", "</s>"]

    tokenizer = load_tokenizer(tiny_bpe(tokens=renamed, token_type=lambda t: [1] * len(t), eos_token_id=None))
    assert tokenizer.end_of_generation == tokenizer.control_ids == {START}
    tokenizer = load_tokenizer(tiny_bpe(tokens=renamed, token_type=lambda t: [1] * (len(t) - 2) + [4, 4]))
    assert tokenizer.control_ids == {START, STOP}


def test_user_defined_tokens_are_found_in_any_text():
    tokenizer = load_tokenizer(tiny_bpe(token_type=lambda t: [1] * (len(t) - 2) + [4, 3]))
    assert tokenizer.encode("a<|start|>b")[1] == START
    assert tokenizer.control_ids == {STOP}


# --- robustness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00" * 3000])
def test_lone_surrogates_are_refused(text: str) -> None:
    for call in (
        lambda: TINY.encode(text),
        lambda: TINY.encode(text, parse_special=True),
        lambda: TINY.encode_segments([(text, False)], add_special=False),
    ):
        with pytest.raises(InvalidParameter, match="lone surrogate"):
            call()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TINY.decode(TINY.encode(text)) == text
    assert TINY_SPM.decode(TINY_SPM.encode(text)) == text.replace("▁", " ")  # to SentencePiece they are one


def test_short_and_long_texts_take_the_same_way():
    unit = "hello\nhe\u00e9\n"
    short, long = TINY.encode(unit), TINY.encode(unit * 1000)
    assert len(unit) < 2048 < len(unit * 1000)
    assert long == short * 1000


def test_threads_share_a_tokenizer(vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer("llama-bpe")
    text = "The <|eot_id|> of été 🚀 12345\n" * 200
    expected = {special: tokenizer.encode(text, parse_special=special) for special in (False, True)}
    wrong: list[bool] = []

    def work(special: bool) -> None:
        for _ in range(10):
            if tokenizer.encode(text, parse_special=special) != expected[special]:
                wrong.append(special)

    threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not tokenizer.control_ids.isdisjoint(expected[True])


def test_a_control_token_that_text_can_spell_is_refused():
    for changes in (
        {"token_type": lambda t: [3, *t[1:]]},  # "!"
        {"token_type": lambda t: [3 if i == 259 else k for i, k in enumerate(t)]},  # "hello", by merges
        {"pre": "llama-bpe", "tokens": lambda t: [*t[:-1], "helpless"]},  # as a whole word
        {"tokens": lambda t: [*t[:-1], "ĠĠ"], "merges": ["Ġ Ġ"]},  # by two spaces
    ):
        with pytest.raises(InvalidModelFile, match="plain text can spell control token"):
            load_tokenizer(tiny_bpe(**changes))


def test_text_that_spells_one_all_the_same_is_refused():
    plain = HFTokenizer(WordLevel({"?": 0, "<|stop|>": 1}, unk_token="?"))
    plain.normalizer = normalizers.Sequence(
        [normalizers.Replace("<|stop|>", "?"), normalizers.Replace("halt", "<|stop|>")]
    )
    tokenizer = Tokenizer(
        TokenizerParts(
            kind="hf-json",
            plain=plain,
            special=plain,
            control={1: AddedToken("<|stop|>", special=True)},
            token_bytes=[b"?", b"<|stop|>"],
            strips_leading_space=False,
            bos_id=None,
            eos_id=1,
            adds_bos=False,
            end_of_generation=frozenset({1}),
            speaks_harmony=False,
        )
    )
    assert tokenizer.encode("<|stop|>") == [0]
    with pytest.raises(InvalidParameter, match="spells a control token"):
        tokenizer.encode("halt")


def test_names_of_control_tokens_are_bounded():
    for count, length, message in (
        (1100, 240, "the names of the control tokens"),
        (1, 257, "the name of a control"),
    ):
        names = [f"{i:x<{length}}" for i in range(count)]
        with pytest.raises(InvalidModelFile, match=message):
            load_tokenizer(
                tiny_bpe(
                    tokens=lambda t, names=names: [*t, *names],
                    token_type=lambda t, count=count: [*t, *[3] * count],
                )
            )


def test_thousands_of_control_tokens():
    """Gemma 3 has 6,249."""
    names = [f"<unused{i}>" for i in range(6000)]
    tokenizer = load_tokenizer(
        tiny_bpe(tokens=lambda t: [*t, *names], token_type=lambda t: [*t, *[3] * len(names)])
    )
    ids = tokenizer.encode("a<unused5999>a", parse_special=True)
    assert tokenizer.decode(ids, skip_control=False) == "a<unused5999>a"
    assert len(ids) == 3


def test_demo_model_prompts_come_back(smollm2: Tokenizer, data_directory: Path) -> None:
    import json

    prompts = json.loads((data_directory / "templates" / "smollm2-prompts.json").read_text())
    for prompt in prompts:
        assert smollm2.encode(prompt["text"], parse_special=True) == prompt["ids"]
        assert smollm2.decode(prompt["ids"], skip_control=False) == prompt["text"]
