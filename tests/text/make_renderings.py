"""Record what `transformers` makes of conversations: data/templates/renderings.json.

    python tests/text/make_renderings.py        # transformers 5.23.0 was used

By their published chat templates, as of a fixed date.
"""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import make_harmony
from text_conversations import CONVERSATIONS, TEMPLATES

TODAY = datetime.fromisoformat(make_harmony.DATE)
BOS, EOS = "<s>", "</s>"


def conversations_of(template: Path) -> dict[str, dict[str, Any]]:
    """Those of every model, and for gpt-oss those of its published guide, too."""
    guide = {f"guide: {name}": asked for name, asked in make_harmony.CONVERSATIONS.items()}
    return CONVERSATIONS | (guide if "gpt-oss" in template.name else {})


class Today(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return TODAY


def rendered(source: str, conversation: dict[str, Any]) -> str:
    from transformers.utils import chat_template_utils

    with mock.patch.object(chat_template_utils, "datetime", Today):
        return _rendered(chat_template_utils.render_jinja_template, source, conversation)


def _rendered(render: Any, source: str, conversation: dict[str, Any]) -> str:
    texts, _ = render(
        [copy.deepcopy(conversation["messages"])],
        tools=conversation.get("tools"),
        chat_template=source,
        add_generation_prompt=conversation.get("add_generation_prompt", True),
        bos_token=BOS,
        eos_token=EOS,
        **conversation.get("extra", {}),
    )
    return texts[0]


if __name__ == "__main__":
    made = {
        path.stem: {
            name: rendered(path.read_text(encoding="utf-8"), conversation)
            for name, conversation in conversations_of(path).items()
        }
        for path in sorted(TEMPLATES.glob("*.jinja"))
    }
    document = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    (TEMPLATES / "renderings.json").write_text(document, encoding="utf-8")
