"""Record what the `openai-harmony` package makes of conversations and answers: data/harmony/examples.json.

    pip install openai-harmony        # into an environment of its own; 0.0.8 was used
    python tests/text/make_harmony.py

The package wants the o200k vocabulary as a file; it is written from our copy of the tokenizer, and the
package checks its SHA-256 before it takes it. Conversations are those of the published guide (docs/format.md
of the package's repository), answers those of the guide, of the package's tests and of reports of malformed
ones.
"""

from __future__ import annotations

import base64
import json
import lzma
import os
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
DATE = "2025-06-28"

LOCATION = {"name": "get_location", "description": "Gets the location of the user."}
_FORMAT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
WEATHER = {
    "name": "get_current_weather",
    "description": "Gets the current weather in the provided location.",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": _FORMAT,
        },
        "required": ["location"],
    },
}
WEATHERS = {
    "name": "get_multiple_weathers",
    "description": "Gets the current weather in the provided list of locations.",
    "parameters": {
        "type": "object",
        "properties": {
            "locations": {
                "type": "array",
                "items": {"type": "string"},
                "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
            },
            "format": _FORMAT,
        },
        "required": ["locations"],
    },
}
TOOLS = [{"type": "function", "function": tool} for tool in (LOCATION, WEATHER, WEATHERS)]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {
    "type": "function",
    "function": {"name": "get_current_weather", "arguments": {"location": "San Francisco"}},
}
FRIENDLY = said("developer", "Use a friendly tone.")
ASKED = said("user", "What is the weather like in SF?")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "question": {"messages": [said("user", "What is 2 + 2?")]},
    "low effort": {"messages": [said("user", "What is 42 * pi?")], "extra": {"reasoning_effort": "low"}},
    "identity": {
        "messages": [said("user", "Who are you?")],
        "extra": {"reasoning_effort": "high", "model_identity": "You are a worker of few words."},
    },
    "reasoning is dropped": {
        "messages": [
            said("user", "What is 2 + 2?"),
            said("assistant", "2 + 2 = 4.", thinking="User asks a simple question."),
            said("user", "What about 9 / 2?"),
        ],
    },
    "instructions": {
        "messages": [said("developer", "Always respond in riddles"), said("user", "Where is Tokyo?")],
        "extra": {"reasoning_effort": "high"},
    },
    "tools": {"messages": [FRIENDLY, ASKED], "tools": TOOLS, "extra": {"reasoning_effort": "high"}},
    "call and result": {
        "messages": [
            FRIENDLY,
            ASKED,
            said("assistant", "", thinking="Need to use function get_current_weather.", tool_calls=[CALL]),
            said("tool", '{"sunny": true, "temperature": 20}'),
        ],
        "tools": TOOLS,
        "extra": {"reasoning_effort": "high"},
    },
}

ANALYSIS = (
    '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.<|end|>'
)
NEXT = "<|start|>assistant"
ANSWERS: dict[str, str] = {
    "reasoning and answer": f"{ANALYSIS}{NEXT}<|channel|>final<|message|>2 + 2 = 4.<|return|>",
    "answer alone": "<|channel|>final<|message|>Grüße 👋🏽 aus 東京!\n\n* 1 < 2 <|end|<|return|>",
    "call": "<|channel|>analysis<|message|>Need to use function get_weather.<|end|>"
    f"{NEXT}<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"location":"San Francisco"}<|call|>',
    "call, recipient in the role": f"{ANALYSIS}{NEXT} to=functions.lookup_weather<|channel|>commentary"
    ' <|constrain|>json<|message|>{"location": "Tokyo"}<|call|>',
    "call, no space before constrain": "<|channel|>commentary to=functions.get_weather<|constrain|>json"
    '<|message|>{"latitude":48.8566,"longitude":2.3522}<|call|>',
    "call of a built-in tool": '<|channel|>analysis to=browser.search code<|message|>{"query":"x"}<|call|>',
    "preamble": "<|channel|>analysis<|message|>{long chain of thought}<|end|>"
    f"{NEXT}<|channel|>commentary<|message|>**Action plan**:\n1. Generate an HTML file\n---\n"
    f"Will start executing the plan step by step<|end|>{NEXT}<|channel|>commentary to=functions.generate_file"
    '<|constrain|>json<|message|>{"template": "basic_html", "path": "index.html"}<|call|>',
    "structured": '<|channel|>final <|constrain|>json<|message|>{"items":["coffee"]}<|return|>',
    "no channel": "<|message|>Hello.<|return|>",
    "refusal without header": f"I must refuse<|end|>{NEXT}<|channel|>analysis<|message|>We must refuse<|end|>"
    f"{NEXT}<|channel|>final<|message|>I'm sorry, but I can't help with that.<|return|>",
    "channel without message": f"<|channel|>analysis I must refuse<|end|>{NEXT}<|channel|>final<|message|>"
    "No.<|return|>",
    "text before a call": f"... Let's use the tool.<|end|>{NEXT} to=functions.get_weather"
    '<|channel|>commentary json<|message|>{"location": "Tokyo"}<|call|>',
    "header and no message": f"<|channel|>analysis<|end|>{NEXT}<|channel|>final<|message|>Yes.<|return|>",
}


def harmony() -> Any:
    document = json.loads(lzma.decompress((DATA / "vocab" / "gpt-oss.tokenizer.json.xz").read_bytes()))
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = sorted((i, bytes(alphabet[c] for c in text)) for text, i in document["model"]["vocab"].items())
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "o200k_base.tiktoken").write_bytes(b"".join(lines))
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = directory
        import openai_harmony

        return openai_harmony, openai_harmony.load_harmony_encoding("HarmonyGptOss")


def conversation(package: Any, asked: dict[str, Any]) -> Any:
    """A request of ours in the package's own words."""
    system = package.SystemContent.new().with_conversation_start_date(DATE)
    extra = asked.get("extra", {})
    effort = extra.get("reasoning_effort", "medium").capitalize()
    system = system.with_reasoning_effort(package.ReasoningEffort(effort))
    if "model_identity" in extra:
        system = system.with_model_identity(extra["model_identity"])
    made = [package.Message.from_role_and_content(package.Role.SYSTEM, system)]
    for message in asked["messages"]:
        made += _messages(package, message, asked.get("tools", []))
    return package.Conversation.from_messages(made)


def _messages(package: Any, message: dict[str, Any], tools: list[Any]) -> list[Any]:
    new, role = package.Message.from_role_and_content, package.Role(message["role"])
    if role is package.Role.DEVELOPER:
        content = package.DeveloperContent.new().with_instructions(message["content"])
        described = [package.ToolDescription.new(**tool["function"]) for tool in tools]
        return [new(role, content.with_function_tools(described) if described else content)]
    if role is package.Role.TOOL:
        name = "functions." + CALL["function"]["name"]
        author = package.Author.new(role, name)
        made = package.Message.from_author_and_content(author, message["content"])
        return [made.with_channel("commentary").with_recipient("assistant")]
    if role is package.Role.USER:
        return [new(role, message["content"])]
    made = [new(role, message["thinking"]).with_channel("analysis")] if "thinking" in message else []
    for call in message.get("tool_calls", []):
        arguments = json.dumps(call["function"]["arguments"])
        made.append(
            new(role, arguments)
            .with_channel("commentary")
            .with_recipient("functions." + call["function"]["name"])
            .with_content_type("<|constrain|>json")
        )
    return made if "tool_calls" in message else [*made, new(role, message["content"]).with_channel("final")]


def main() -> None:
    package, encoding = harmony()
    renderings = {
        name: encoding.decode(
            encoding.render_conversation_for_completion(conversation(package, asked), package.Role.ASSISTANT)
        )
        for name, asked in CONVERSATIONS.items()
    }
    answers: dict[str, Any] = {}
    for name, text in ANSWERS.items():
        ids = encoding.encode(text, allowed_special="all")
        parser = package.StreamableParser(encoding, package.Role.ASSISTANT, strict=False)
        for i in ids:
            parser.process(i)
        answers[name] = {
            "text": text,
            "ids": ids,
            "messages": [
                [m.channel, m.recipient, m.content_type, "".join(part.text for part in m.content)]
                for m in parser.messages
            ],
        }
    document = {"date": DATE, "renderings": renderings, "answers": answers}
    path = DATA / "harmony" / "examples.json"
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
