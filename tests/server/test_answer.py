"""One answer: which text each token stands for, in vocabularies of both kinds."""

from __future__ import annotations

import numpy as np
import pytest

from worker_orcd.engine.messages import Output
from worker_orcd.errors import Internal
from worker_orcd.gguf.metadata import Metadata
from worker_orcd.sequence import FinishReason, SampledToken, SamplingParams
from worker_orcd.server.answer import Answer
from worker_orcd.server.client import Generation
from worker_orcd.server.prompt import Plan
from worker_orcd.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def spm():
    """SentencePiece style: words begin with a space, and a text does not begin with one."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁a", "▁b", "c"]
    types = [2, 3, 3] + [6] * 256 + [1] * 3
    return load_tokenizer(
        Metadata(
            {
                "general.architecture": "llama",
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": np.array(types),
                "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2,
            }
        )
    )


def answer_to(tokenizer, prompt, *, stop=(), max_tokens=9):
    generation = Generation(
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        stop_token_ids=tokenizer.end_of_generation,
        sampling=SamplingParams(),
    )
    plan = Plan(generation=generation, stop=stop, end_ids=tokenizer.end_of_generation)
    return Answer(plan, tokenizer)


def push(answer, *ids, finish=None):
    return answer.push(Output(1, tuple(SampledToken(i) for i in ids), finish_reason=finish))


A, B, C, EOS = 259, 260, 261, 2


@pytest.mark.parametrize(("prompt", "text"), [((1,), "a b"), ((1, A), " a b"), ((A, EOS), "a b")])
def test_a_text_does_not_begin_with_the_space_of_its_first_word(spm, prompt, text):
    answer = answer_to(spm, prompt)
    for token in (A, B):
        push(answer, token)
    push(answer, EOS, finish=FinishReason.STOP)
    assert answer.text == text
    assert (answer.stop_reason, answer.num_tokens) == ("eos", 3)


def test_control_tokens_before_the_first_word_do_not_count_as_text(spm):
    answer = answer_to(spm, (1,))
    push(answer, 1)
    push(answer, A)
    assert answer.text == "a"


def test_several_tokens_in_one_output(spm):
    answer = answer_to(spm, (1,))
    pieces = push(answer, A, B, C, finish=FinishReason.LENGTH)
    assert [(piece.index, piece.text) for piece in pieces] == [(0, "a"), (1, " b"), (2, "c")]
    assert answer.stop_reason == "length"


def test_nothing_follows_a_stop_string(spm):
    answer = answer_to(spm, (1,), stop=("b",))
    pieces = push(answer, A, B, C, C)
    assert [piece.text for piece in pieces] == ["a", " "]
    assert (answer.stop_reason, answer.matched) == ("stop", "b")


def test_rows_that_only_pad_the_network_have_no_text(spm):
    answer = answer_to(spm, (1,))
    push(answer, spm.vocab_size + 3)
    push(answer, A, finish=FinishReason.LENGTH)
    assert answer.text == "a"


def test_an_end_without_a_token_is_a_fault_of_ours(spm):
    with pytest.raises(Internal):
        push(answer_to(spm, (1,)), finish=FinishReason.LENGTH)


def test_times(spm):
    answer = answer_to(spm, (1,))
    assert (answer.ttft_ms, answer.decode_ms) == (None, 0.0)
    push(answer, A)
    assert answer.ttft_ms >= 0
    assert answer.decode_ms == 0
    push(answer, A)
    assert answer.decode_ms > 0
