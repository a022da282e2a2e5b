"""Nothing a user can send takes more than linear time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from harmony_streams import Item, cut, items_of
from text_vocabularies import Vocabularies

from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.harmony import CONTROLS, HarmonyStream

pytestmark = pytest.mark.slow

SMALL = 30_000  # characters; the large ones are four times as long
UNITS = ["a", " ", "🚀", "世", "\n", "É", "1", "<|im_end|>", "e\u0301", "<0x0A>"]


def seconds(work: Callable[[], object]) -> float:
    """Of this process, so that other processes do not count; the better of two."""
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def check(work: Callable[[str], object], unit: str) -> None:
    small, large = (seconds(lambda n=n: work((unit * n)[:n])) for n in (SMALL, 4 * SMALL))
    assert large < max(10 * small, 0.2), f"{unit!r}: {small:.3f} s, of four times the length {large:.3f} s"
    assert large < 30


@pytest.mark.parametrize("name", ["llama-bpe", "phi-3", "starcoder"])
def test_encoding(name: str, vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer(name)
    for unit in UNITS:
        check(lambda text: tokenizer.encode(text, parse_special=True), unit)


def test_decoding(vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer("phi-3")
    check(lambda text: tokenizer.decode(list(map(ord, text))), "\x03")


@pytest.mark.parametrize("start", ["", "<|channel|>final<|message|>"])
def test_harmony_streams(start: str) -> None:
    for unit in ("<|channel|>", "<|start|>assistant", "<|constrain|>", "to=", "<|channel|>final", "ababab"):
        pieces = list(cut(items_of(unit), []))

        def work(text: str, pieces: list[Item] = pieces, unit: str = unit) -> None:
            stream = HarmonyStream(["abababababac", "c"])
            for item in [*cut(items_of(start), []), *pieces * (len(text) // len(unit))]:
                if isinstance(item, str):
                    stream.control(CONTROLS[item])
                else:
                    stream.text(item)
            stream.finish()

        check(work, unit)


def test_messages_full_of_control_tokens(vocabularies: Vocabularies) -> None:
    tokenizer = vocabularies.tokenizer("llama-bpe")
    template = ChatTemplate("<|start_header_id|>{{ messages[0].content }}<|eot_id|>")
    for unit in ("<|eot_id|>", "<|eot_id|", "< ", ">"):
        check(lambda text: template.encode(tokenizer, [{"role": "user", "content": text}]), unit)
    template.close()
