"""The parts of request bodies that both dialects share: sampling, stop conditions, messages.

What is out of range is refused with the range; nothing that is accepted is ignored. Checks that need the
vocabulary or the context length are made in `server.prompt`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from worker_orcd.sequence import MAX_LOGPROBS
from worker_orcd.server.body import Wire, shown

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_SEED = 2**64 - 1
MAX_COUNT = 2**31 - 1  # of anything counted in tokens
MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # of an assistant's message, by any of its names

_STOP_RULE = f"a text or a list of at most {MAX_STOP_STRINGS} texts, each of 1 to {MAX_STOP_CHARS} characters"
_BIAS_RULE = f"an object of at most {MAX_BIASES} token ids with a number from -100 to 100 each"


def _stop(value: object) -> tuple[str, ...]:
    items: object = [value] if isinstance(value, str) else value
    if isinstance(items, list | tuple):
        texts = [text for text in cast("list[object]", items) if isinstance(text, str)]
        fits = len(texts) == len(items) <= MAX_STOP_STRINGS  # pyright: ignore[reportUnknownArgumentType]
        if fits and all(1 <= len(text) <= MAX_STOP_CHARS for text in texts):
            return tuple(texts)
    raise ValueError(f"found {shown(value)}; allowed: {_STOP_RULE}")


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    problem = ValueError(f"found {shown(value)}; allowed: {_BIAS_RULE}")
    if not isinstance(value, dict) or len(cast("dict[str, object]", value)) > MAX_BIASES:
        raise problem
    biases: dict[int, float] = {}
    for token, bias in cast("dict[str, object]", value).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 11):
            raise problem
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise problem
        if not -100 <= bias <= 100:  # NaN is not; math.isfinite fails for the largest integers
            raise problem
        biases[int(token)] = float(bias)
    return tuple(sorted(biases.items()))


Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOP_STRINGS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                },
            ]
        }
    ),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_COUNT)]], Field(min_length=1)]


class Message(Wire):
    """One turn of a conversation. Content is text, or a list of text parts, which are joined by newlines."""

    model_config = Wire.model_config | {"extra": "allow"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError(f"found {shown(value)}; allowed: an object with role and content")
        message = dict(cast("dict[str, Any]", value))
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role: found {shown(role)}; allowed: {', '.join(ROLES)}")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                raise ValueError(f"{name} is not supported in this version")
        if message.get("content") is None and role == "assistant":
            message["content"] = ""
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(_text_part(part) for part in message["content"])
        for name in REASONING if role == "assistant" else ():
            if not isinstance(message.get(name), str | None):
                raise ValueError(f"{name}: found {shown(message.get(name))}; allowed: a text")
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"content: found {shown(message.get('content'))}; allowed: a text, or text parts"
            )
        return message

    @property
    def reasoning(self) -> str:
        """Of an assistant's message: what clients send back as they got it."""
        extra = self.model_extra or {} if self.role == "assistant" else {}
        return next((extra[name] for name in REASONING if extra.get(name)), "")

    @property
    def num_chars(self) -> int:
        """Of all that a chat template sees."""
        return len(self.content) + len(self.reasoning) + len(self.name)

    @property
    def name(self) -> str:
        name = (self.model_extra or {}).get("name")
        return name if isinstance(name, str) else ""

    def for_template(self) -> dict[str, str]:
        """What a chat template sees. Models know no `developer`: it is OpenAI's newer name for `system`."""
        seen = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name:
            seen["name"] = self.name
        if self.reasoning:  # gpt-oss' template calls it thinking, Qwen3's reasoning_content
            seen |= {"thinking": self.reasoning, "reasoning_content": self.reasoning}
        return seen


def _text_part(part: object) -> str:
    if isinstance(part, dict):
        fields = cast("dict[str, object]", part)
        text = fields.get("text")
        if fields.get("type") == "text" and isinstance(text, str):
            return text
        raise ValueError(
            f"a content part of type {shown(fields.get('type'))} is not supported; allowed: text"
        )
    raise ValueError(f"content: found the part {shown(part)}; allowed: objects of type text")


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class Sampling(Wire):
    """How tokens are drawn and when to stop; the same names in both dialects."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: LogitBias = Field(default=(), description=_BIAS_RULE)
    stop: Stop = Field(default=(), description=_STOP_RULE)
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_COUNT)]] = Field(
        default=[], max_length=MAX_STOP_TOKENS, description=f"a list of at most {MAX_STOP_TOKENS} token ids"
    )
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    deadline_ms: Annotated[int | None, Field(ge=1, le=MAX_DEADLINE_MS)] = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=256)] = None


class ExecuteRequest(Sampling):
    """POST /execute."""

    model_config = Sampling.model_config | {
        "json_schema_extra": {
            "oneOf": [{"required": [name]} for name in ("prompt", "prompt_token_ids", "messages")]
        }
    }

    job_id: Annotated[str, Field(min_length=1, max_length=128)]
    prompt: Annotated[str | None, Field(min_length=1)] = None
    prompt_token_ids: TokenIds | None = Field(default=None, description="a list of token ids, at least one")
    messages: Messages | None = Field(default=None, description=f"a list of 1 to {MAX_MESSAGES} messages")
    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_COUNT)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_constraints(cls, value: object) -> object:
        for name in ("response_format", "json_schema", "grammar", "regex"):
            if isinstance(value, dict) and name in value:
                raise PydanticCustomError(
                    "not_supported", "{field} is not supported in this version", {"field": name}
                )
        return cast("object", value)

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if sum(part is not None for part in (self.prompt, self.prompt_token_ids, self.messages)) != 1:
            raise ValueError("exactly one of prompt, prompt_token_ids and messages is needed")
        return self


class CancelRequest(Wire):
    """POST /cancel."""

    job_id: Annotated[str, Field(min_length=1, max_length=128)]


class TokenizeRequest(Wire):
    """POST /tokenize."""

    prompt: str
    add_special_tokens: bool = True
    parse_special: bool = False


class DetokenizeRequest(Wire):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, le=MAX_COUNT)]] = Field(description="a list of token ids")
    skip_special_tokens: bool = False


class ApplyTemplateRequest(Wire):
    """POST /apply-template."""

    messages: Messages = Field(description=f"a list of 1 to {MAX_MESSAGES} messages")
    add_generation_prompt: bool = True
