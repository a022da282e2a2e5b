"""Text streams: any way of cutting the bytes gives the text of the whole, and stop strings never show."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.text.stream import Delta, TextStream


def run(tokens: list[bytes], stop: list[str]) -> tuple[list[str], str | None]:
    """The deltas, `finish` included, and the stop string; pushes a token behind the end, too."""
    stream = TextStream(stop)
    deltas: list[str] = []
    for token in tokens:
        delta = stream.push(token)
        deltas.append(delta.text)
        if delta.stopped is not None:
            assert stream.push(b"more") == stream.finish() == Delta("", delta.stopped)
            return deltas, delta.stopped
    last = stream.finish()
    assert stream.push(b"more") == stream.finish() == Delta("", last.stopped)
    return [*deltas, last.text], last.stopped


def reference(data: bytes, stop: list[str]) -> tuple[str, str | None]:
    """Whole text, cut before the stop string that is complete first, the longest of several."""
    text = data.decode("utf-8", "replace")
    for end in range(len(text) + 1):
        matching = [s for s in stop if s and text[:end].endswith(s)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(borders)]


BYTES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    st.lists(
        st.sampled_from([b"\xf0\x9f", b"\x98\x80", b"\xe2\x82", b"\xac", b"\xff", b"\xc3", b"a", b"\xed\xa0"])
    ).map(b"".join),
)
PLACES = st.lists(st.integers(0, 1000), max_size=12)


@settings(max_examples=500, deadline=None)
@given(BYTES, PLACES)
def test_any_cut_of_any_bytes_gives_the_same_text(data: bytes, places: list[int]) -> None:
    deltas, stopped = run(cut(data, places), [])
    assert "".join(deltas) == data.decode("utf-8", "replace")
    assert stopped is None


@settings(max_examples=500, deadline=None)
@given(
    st.text("ab\u20ac", max_size=30).map(str.encode),
    PLACES,
    st.lists(st.text("ab\u20ac", max_size=5), max_size=4),
)
def test_stop_strings_as_the_reference(data: bytes, places: list[int], stop: list[str]) -> None:
    deltas, stopped = run(cut(data, places), stop)
    assert ("".join(deltas), stopped) == reference(data, stop)


@settings(max_examples=500, deadline=None)
@given(BYTES, PLACES, st.lists(st.text("a\ufffd\u20ac\U0001f600\x00", max_size=3), max_size=3))
def test_stop_strings_in_any_bytes(data: bytes, places: list[int], stop: list[str]) -> None:
    deltas, stopped = run(cut(data, places), stop)
    assert ("".join(deltas), stopped) == reference(data, stop)


@settings(max_examples=300, deadline=None)
@given(st.text("ab<|", max_size=30), st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_could_match(text: str, stop: list[str]) -> None:
    stream = TextStream(stop)
    sent = ""
    for n, character in enumerate(text, start=1):
        delta = stream.push(character.encode())
        sent += delta.text
        if delta.stopped is not None:
            return
        held = text[len(sent) : n]
        assert sent + held == text[:n]
        assert held == "" or any(s.startswith(held) for s in stop)
        assert not any(s.startswith(text[k:n]) for s in stop for k in range(len(sent)))


def test_an_incomplete_character_waits():
    stream = TextStream()
    assert [stream.push(bytes([b])).text for b in "é🚀".encode()] == ["", "é", "", "", "", "🚀"]
    assert stream.finish() == Delta("")


def test_an_incomplete_end_is_replaced_once():
    stream = TextStream()
    assert stream.push(b"a\xf0\x9f\x98") == Delta("a")
    assert stream.finish() == Delta("\ufffd")
    assert stream.finish() == Delta("")


def test_a_stray_byte_does_not_hold_up_what_follows():
    stream = TextStream()
    assert stream.push(b"a\xff") == Delta("a\ufffd")
    assert stream.push(b"\xe2\x82") == Delta("")
    assert stream.push(b"b") == Delta("\ufffdb")


def test_a_stop_string_over_three_tokens():
    stream = TextStream(["\n\nUser:"])
    assert [stream.push(t).text for t in (b"Yes.\n", b"\nUs", b"er")] == ["Yes.", "", ""]
    assert stream.push(b": next") == Delta("", "\n\nUser:")


def test_held_text_comes_when_the_match_fails():
    stream = TextStream(["<|im_end|>"])
    assert stream.push(b"a <|im_") == Delta("a ")
    assert stream.push(b"start") == Delta("<|im_start")
    assert stream.push(b"<") == Delta("")
    assert stream.finish() == Delta("<")


def test_the_first_complete_match_wins_and_of_those_the_longest():
    assert run([b"xabcy"], ["abc", "b"]) == (["xa"], "b")
    assert run([b"xabcy"], ["bc", "abc", "c"]) == (["x"], "abc")
    assert run([b"stop"], ["stop", "stop"]) == ([""], "stop")


def test_a_stop_string_with_an_incomplete_character():
    stream = TextStream(["€"])
    assert stream.push(b"1\xe2\x82") == Delta("1")
    assert stream.push(b"\xac2") == Delta("", "€")


def test_a_replacement_character_can_be_a_stop_string():
    assert run([b"a\xf0"], ["\ufffd"]) == (["a", ""], "\ufffd")


def test_empty_stop_strings_match_nothing():
    assert run([b"ab"], ["", ""]) == (["ab", ""], None)
    assert run([], [""]) == ([""], None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [["a" * 5000 + "b"], ["ab" * 2000 + "c", "a" * 4000 + "x"], ["b", "ab" * 50 + "z"]]
)
def test_adversarial_stop_strings_take_linear_time(stop: list[str]) -> None:
    def seconds(characters: int) -> float:
        """Of this process, so that other processes do not count; the best of three."""
        best = float("inf")
        for _ in range(3):
            stream = TextStream(stop)
            start = time.process_time()
            for _ in range(characters // 100):
                stream.push(b"a" * 99 + b"a")
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(50_000), seconds(200_000)
    assert large < 10 * small  # 4 times the text; what is quadratic takes 16 times as long
    assert large < 30
