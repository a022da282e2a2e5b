"""Conversations to render, and where the chat templates of published models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


def user(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **others}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather <now> & "here", à l\'instant',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where, e.g. 東京"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": ["integer", "null"]},
                "at": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "東京", "days": 2}},
        }
    ],
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [user("Hi")]},
    "no generation prompt": {"messages": [user("Hi")], "add_generation_prompt": False},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user(" 日本語? 🚀\n\n")]},
    "turns": {
        "messages": [
            user("1 < 2?"),
            {"role": "assistant", "content": "Yes.\n"},
            user("{{ 7 * 7 }} {% raw %}"),
        ],
    },
    "tools": {"messages": [user("Weather in Tokyo?")], "tools": [WEATHER]},
    "calls": {
        "messages": [
            {"role": "system", "content": "Use tools."},
            user("Weather in Tokyo?"),
            CALL,
            {"role": "tool", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "Clear."},
            user("Thanks"),
        ],
        "tools": [WEATHER],
    },
    "thinking": {
        "messages": [
            user("2+2?"),
            {"role": "assistant", "content": "4", "thinking": "Adding."},
            user("3+3?"),
        ],
        "extra": {"reasoning_effort": "high", "model_identity": "You are a test."},
    },
    "empty system": {"messages": [{"role": "system", "content": ""}, user("é <br> |>")]},
    "answered": {
        "messages": [user("2+2?"), {"role": "assistant", "content": "4", "thinking": "Adding."}],
        "add_generation_prompt": False,
    },
}
