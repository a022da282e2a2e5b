"""Published chat templates: prompts as `transformers` renders them, and as in the published examples."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import make_harmony
import pytest
from harmony_streams import EXAMPLES
from make_renderings import BOS, EOS, TODAY, conversations_of, rendered
from text_conversations import TEMPLATES, user
from text_vocabularies import Vocabularies

from worker_orcd.text.chat import ChatTemplate

PATHS = sorted(TEMPLATES.glob("*.jinja"))
STORED = json.loads((TEMPLATES / "renderings.json").read_text(encoding="utf-8"))
GPT_OSS = TEMPLATES / "openai-gpt-oss-120b.jinja"


def template_of(path: Path) -> ChatTemplate:
    return ChatTemplate(path.read_text(encoding="utf-8"), bos_token=BOS, eos_token=EOS, clock=lambda: TODAY)


def test_every_template_has_stored_renderings():
    assert {p.stem: set(conversations_of(p)) for p in PATHS} == {k: set(v) for k, v in STORED.items()}
    assert [len(STORED[path.stem]) for path in PATHS] == [9, 9, 16]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_as_stored(path: Path) -> None:
    template = template_of(path)
    for name, conversation in conversations_of(path).items():
        assert template.render(**conversation) == STORED[path.stem][name], name
        assert len(STORED[path.stem][name]) > 10
    template.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the other library
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_as_transformers_renders_them_now(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    for name, conversation in conversations_of(path).items():
        assert rendered(source, conversation) == STORED[path.stem][name], name


# Where gpt-oss' own template writes something else than its authors' library, by which the examples in the
# guide were made. The model was published with both; a file's own template is what counts here.
DIFFERENT = {
    "instructions": [("riddles<|end|>", "riddles\n\n<|end|>")],
    "tools": [("// default: celsius\n}", "// default: celsius,\n}")],
    "call and result": [
        ("// default: celsius\n}", "// default: celsius,\n}"),
        ("commentary <|constrain|>json", "commentary json"),
        ('{"sunny": true, "temperature": 20}', '"{\\"sunny\\": true, \\"temperature\\": 20}"'),
    ],
}


@pytest.mark.parametrize("name", make_harmony.CONVERSATIONS)
def test_as_the_published_examples(name: str, vocabularies: Vocabularies) -> None:
    expected = EXAMPLES["renderings"][name]
    for theirs, ours in DIFFERENT.get(name, []):
        assert theirs in expected
        expected = expected.replace(theirs, ours)
    template = template_of(GPT_OSS)
    assert template.render(**make_harmony.CONVERSATIONS[name]) == expected
    assert f"Current date: {EXAMPLES['date']}\n" in expected
    assert expected.endswith("<|end|><|start|>assistant")
    tokenizer = vocabularies.tokenizer("gpt-oss.tokenizer.json")
    ids = template.encode(tokenizer, **make_harmony.CONVERSATIONS[name])
    assert ids == tokenizer.encode(expected, add_special=False, parse_special=True)
    template.close()


def test_reasoning_of_earlier_turns_is_dropped():
    ours, theirs = STORED[GPT_OSS.stem], EXAMPLES["renderings"]
    for dropped, still in [
        (ours["guide: reasoning is dropped"], ours["guide: call and result"]),
        (theirs["reasoning is dropped"], theirs["call and result"]),
    ]:
        assert "simple question" not in dropped
        assert "Need to use function" in still


def test_the_date_is_that_of_the_clock(vocabularies: Vocabularies) -> None:
    dates = iter([datetime(2026, 12, 31, 23, 59, second) for second in range(9)])
    source = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0].content }}"
    template = ChatTemplate(source, clock=dates.__next__)
    assert template.render([user("a")]) == "2026-12-31 23:59:00 a"
    assert template.render([user("a")]) == "2026-12-31 23:59:01 a"
    tokenizer = vocabularies.tokenizer("phi-3")
    ids = template.encode(tokenizer, [user("<|end|> <x")])  # rendered twice, at one time
    assert tokenizer.decode(ids) == "2026-12-31 23:59:02 <|end|> <x"
    assert template.render([user("a")]) == "2026-12-31 23:59:03 a"
    template.close()
    before = datetime.now()
    told = ChatTemplate("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }}").render([user("a")])
    assert before <= datetime.fromisoformat(told) <= datetime.now()
