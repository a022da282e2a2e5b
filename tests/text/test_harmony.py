"""Harmony streams: as their authors' parser reads them, however they are cut, whatever is wrong with them."""

from __future__ import annotations

import itertools
import random

import pytest
from harmony_streams import EXAMPLES, NAME, Item, Reading, cut, damaged, items_of, read

from worker_orcd.text.harmony import CONTROLS, MAX_HEADER, Control, HarmonyScanner
from worker_orcd.text.regions import Message

ANSWERS = EXAMPLES["answers"]
STREAMS = {name: answer["text"] for name, answer in ANSWERS.items()}
HEAD = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"


def told(stream: str) -> list[list[str | None]]:
    return read(items_of(stream)).told


# --- as others read them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANSWERS)
def test_as_the_authors_parser_reads_them(name: str) -> None:
    """Recorded from `openai-harmony`, not strict. Where we differ on purpose:

    no channel is `final`; the content type has no `<|constrain|>` before it, and is no recipient; text of a
    header keeps the space before it.
    """
    theirs = [list(message) for message in ANSWERS[name]["messages"] if message[3]]
    if name == "structured":
        assert theirs[0][1:3] == ["<|constrain|>json", None]
        theirs[0][1:3] = [None, "<|constrain|>json"]
    for message in theirs:
        message[0] = message[0] or "final"
        message[2] = message[2] and message[2].removeprefix("<|constrain|>")
    ours = told(STREAMS[name])
    if name == "channel without message":
        assert ours[0][3] == " I must refuse"
        ours[0][3] = "I must refuse"
    assert ours == theirs


def test_the_parts_of_an_answer():
    reading = read(items_of(STREAMS["preamble"]))
    assert reading.of_kind("reasoning") == "{long chain of thought}"
    assert reading.of_kind("content").startswith("**Action plan**:\n1.")
    assert reading.of_kind("call") == '{"template": "basic_html", "path": "index.html"}'
    call = reading.messages[-1][0]
    assert (
        call.header == "<|start|>assistant<|channel|>commentary to=functions.generate_file<|constrain|>json"
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("<|channel|>final", Message("final")),
        ("<|channel|>final json", Message("final", None, "json")),
        ("<|channel|>final <|constrain|>JSON", Message("final", None, "JSON")),
        ("<|channel|>commentary", Message("commentary")),
        ("<|channel|>final text<|constrain|>json", Message("final", None, "json")),
        ("<|channel|>commentary to=assistant", Message("commentary", "assistant")),
        ("<|channel|>commentary functions.f code", Message("commentary", "functions.f", "code")),
        (
            "<|channel|>commentary to=functions.f typescript",
            Message("commentary", "functions.f", "typescript"),
        ),
        ("<|channel|>commentaryto=functions.f<|constrain|>x", Message("commentary", "functions.f", "x")),
        ("<|channel|>commentary<|constrain|>json to=f", Message("commentary", "f", "json")),
        (" to=functions.f<|channel|>analysis", Message("analysis", "functions.f")),
        (" to=functions.f", Message("commentary", "functions.f")),
        ("assistant<|channel|>analysis", Message("analysis")),
        ("<|start|>assistantassistant<|channel|>analysis", Message("analysis")),
        ("<|start|><|start|>assistant<|channel|> analysis\n", Message("analysis")),
        ("<|start|>assistant", Message("final")),
        ("", Message("final")),
        ("<|channel|>", Message("final")),
        ("<|channel|>commentary to=assistant<|channel|>analysis", Message("analysis")),
        ("<|end|>\n<|start|>assistant<|channel|>analysis", Message("analysis")),
        ("<|end|>assistant<|channel|>analysis", Message("analysis")),
    ],
)
def test_headers(header: str, expected: Message) -> None:
    assert told(f"{header}<|message|>text") == [
        [expected.channel, expected.recipient, expected.content_type, "text"]
    ]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Message("analysis"), "reasoning"),
        (Message("analysis", "assistant"), "reasoning"),
        (Message("analysis", "python"), "call"),
        (Message("commentary"), "content"),
        (Message("commentary", "user"), "content"),
        (Message("commentary", "functions.f"), "call"),
        (Message("final"), "content"),
    ],
)
def test_what_a_message_is_for(message: Message, kind: str) -> None:
    assert message.kind == kind


# --- malformed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("Hello, world", [["final", None, None, "Hello, world"]]),
        ("to be or not", [["final", None, None, "to be or not"]]),
        (" assistant", [["final", None, None, " assistant"]]),
        ("assistants help<|return|>", [["final", None, None, "assistants help"]]),
        ("<|channel|>??<|end|>", [["final", None, None, "??"]]),
        ("<|channel|>commentary?commentary?<|end|>", [["commentary", None, None, "?commentary?"]]),
        ("<|channel|>finalThe answer<|return|>", [["final", None, None, "The answer"]]),
        ("<|channel|>final json is nice", [["final", None, None, " json is nice"]]),
        ("<|channel|>final json<|return|>", [["final", None, None, " json"]]),
        ("<|channel|>commentary to=f{}<|message|>x", [["commentary", "f", None, "{}x"]]),
        ("<|channel|>commentary to= x<|message|>y", [["commentary", None, None, " to= xy"]]),
        ("<|channel|><|constrain|>json<|message|>y", [["final", None, None, "jsony"]]),
        ("<|channel|>final<|constrain|><|constrain|>x<|message|>y", [["final", None, None, "xy"]]),
        ("<|channel|>Final<|message|>y", [["final", None, None, "Finaly"]]),
        ("<|channel|>fin<|message|>y", [["final", None, None, "finy"]]),
        ("<|start|>user<|message|>y", [["final", None, None, "usery"]]),
        (f"{HEAD}a<|message|>b<|constrain|>c<|reserved|>d", [["analysis", None, None, "abcd"]]),
        (f"{HEAD}a<|channel|>final<|message|>b", [["analysis", None, None, "a"], ["final", None, None, "b"]]),
        (f"{HEAD}a<|channel|>so on<|end|>", [["analysis", None, None, "aso on"]]),
        (f"{HEAD}a<|channel|>final<|channel|>so on", [["analysis", None, None, "aso on"]]),
        (f"{HEAD}a<|channel|><|message|>b", [["analysis", None, None, "a"], ["analysis", None, None, "b"]]),
        (f"{HEAD}a{FINAL}b", [["analysis", None, None, "a"], ["final", None, None, "b"]]),
        (f"{HEAD}a<|end|>then b", [["analysis", None, None, "a"], ["final", None, None, "then b"]]),
        (
            f"{HEAD}a<|end|>{FINAL}b<|return|>\n\n",
            [["analysis", None, None, "a"], ["final", None, None, "b"]],
        ),
        (f"{HEAD}a<|end|><|start|>assistant to=functions.f<|channel|>comm", [["analysis", None, None, "a"]]),
    ],
)
def test_malformed_headers_become_text(stream: str, expected: list[list[str | None]]) -> None:
    assert told(stream) == expected


def everything(items: list[Item]) -> str:
    return squeezed(b"".join(item for item in items if isinstance(item, bytes)).decode("utf-8", "replace"))


def squeezed(text: str) -> str:
    """White space between messages is no text."""
    return "".join(text.split()).replace("\ufffd", "")


def kept(items: list[Item]) -> tuple[str, str]:
    """All ordinary text that came out in order, as headers or text; and that of a last header without end."""
    scanner, found = HarmonyScanner(), ""
    known: list[Message] = []
    for item in [*items, None]:
        if item is None:
            segment = scanner.finish()
        elif isinstance(item, bytes):
            segment = scanner.text(item.decode("utf-8", "replace"))
        else:
            control = CONTROLS.get(item)
            segment = scanner.control(control) if control else None
        if segment is not None:
            if not any(segment.message is message for message in known):
                known.append(segment.message)
                found += NAME.sub("", segment.message.header)
            found += segment.text
    return squeezed(found), squeezed(scanner._header.text if scanner.current is None else "")


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_damage_anywhere_loses_no_text(name: str) -> None:
    items = items_of(STREAMS[name], words=True)
    number = 0
    for what, stream in damaged(items):
        number += 1
        found, unfinished = kept(stream)
        assert found + unfinished == everything(stream), what
        reading = read(stream)
        assert reading.held <= MAX_HEADER, what
        assert read(cut(stream, [])).told == reading.told, what
    assert number > 15 * len(items)


def test_random_streams_lose_no_text_either():
    draw = random.Random(5)
    parts: list[Item] = [*CONTROLS, *CONTROLS, "<|reserved|>"]
    parts += [
        b"assistant",
        b" to=functions.f",
        b"analysis",
        b"final",
        b"commentary",
        b"json",
        b" ",
        b"\n",
        b"to",
    ]
    parts += ["é🚀".encode(), b"a", b"\xff", b"\xe2\x82", b"Hello, world. "]
    for _ in range(2000):
        stream = draw.choices(parts, k=draw.randint(1, 30))
        found, unfinished = kept(stream)
        assert found + unfinished == everything(stream), stream
        reading = read(stream)
        assert read(cut(stream, range(1000))).told == reading.told, stream
        assert read(cut(stream, [])).told == reading.told, stream


def test_no_more_of_a_header_than_its_limit_is_held_back():
    for header in ("<|channel|>commentary to=", " to=", "<|channel|>final <|constrain|>", "<|channel|>", ""):
        for unit in ("x", " ", "\n"):
            reading = read(items_of(header + unit * 5000 + "<|message|>end"))
            assert reading.held <= MAX_HEADER
            assert reading.messages[-1][1].endswith("end")
            assert sum(len(text) for _, text in reading.messages) >= 5000 - MAX_HEADER


def test_text_without_header_streams_word_by_word():
    scanner = HarmonyScanner()
    texts = [scanner.text(text) for text in ("The", " answer", " is")]
    assert [segment and segment.text for segment in texts] == ["The", " answer", " is"]


# --- however it is cut -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_and_every_pair_of_cuts(name: str) -> None:
    items = items_of(STREAMS[name])
    size = sum(1 if isinstance(item, str) else len(item) for item in items)
    expected = read(items).told
    assert read(cut(items, range(size))).told == expected  # byte by byte
    for places in itertools.combinations(range(0, size, 1 + size // 150), 2):
        assert read(cut(items, places)).told == expected, places
    for stop in (["4.", "us"], ["a"]):
        expected = read(items, stop).told
        for place in range(size):
            assert read(cut(items, [place]), stop).told == expected, (place, stop)


def test_characters_do_not_go_across_control_tokens():
    start, rest = "🚀".encode()[:2], "🚀".encode()[2:]
    items = [*items_of(f"{HEAD}a"), start, "<|end|>", *items_of(FINAL), rest, b"b", "<|return|>"]
    assert read(items).told == [["analysis", None, None, "a\ufffd"], ["final", None, None, "\ufffd\ufffdb"]]
    assert read([*items_of(FINAL), start]).told == [["final", None, None, "\ufffd"]]
    assert read(["<|channel|>", start, "<|message|>", b"a"]).told == [["final", None, None, "\ufffda"]]


# --- stop strings ------------------------------------------------------------------------------------------


def stopped(stream: str, *stop: str) -> tuple[list[list[str | None]], str | None]:
    reading = read(items_of(stream), stop)
    return reading.told, reading.stopped


def test_stop_strings_are_for_content():
    stream = f"{HEAD}One. Two.<|end|>{FINAL}One. Two. Three.<|return|>"
    told, found = stopped(stream, "Two", "Three")
    assert told == [["analysis", None, None, "One. Two."], ["final", None, None, "One. "]]
    assert found == "Two"
    call = "<|channel|>commentary to=functions.f json<|message|>{}<|call|>"
    assert stopped(call, "{", "json", "f") == ([["commentary", "functions.f", "json", "{}"]], None)
    assert stopped("no header: stop here", "stop") == ([["final", None, None, "no header: "]], "stop")


def test_stop_strings_match_in_one_message_only():
    stream = f"<|channel|>commentary<|message|>a ST<|end|>{FINAL}OP b<|return|>"
    assert stopped(stream, "STOP") == (
        [["commentary", None, None, "a ST"], ["final", None, None, "OP b"]],
        None,
    )
    assert stopped(f"{FINAL}x ST<|end|>", "STOP") == ([["final", None, None, "x ST"]], None)
    assert stopped(f"{FINAL}x ST", "STOP") == ([["final", None, None, "x ST"]], None)


def test_every_control_token_has_a_name():
    assert set(CONTROLS.values()) == set(Control)
    assert Reading().told == []
