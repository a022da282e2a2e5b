"""Request bodies of the OpenAI API, with vLLM's names for what OpenAI does not have."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from worker_orcd.sequence import MAX_LOGPROBS
from worker_orcd.server.body import Wire, shown
from worker_orcd.server.wire import MAX_COUNT, MAX_MESSAGES, MAX_SEED, Messages, Sampling

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_IDENTITY = 1024  # characters of what a model is told that it is
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions

_PROMPT_RULE = f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either; none of them empty"


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    problem = ValueError(f"found {shown(value)}; allowed: {_PROMPT_RULE}")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise problem
    items = cast("list[object]", value)
    if all(isinstance(item, int) for item in items):
        items = [items]
    if len(items) > MAX_PROMPTS:
        raise ValueError(f"found {len(items)} prompts; allowed: {_PROMPT_RULE}")
    return tuple(_prompt(item, problem) for item in items)


def _prompt(item: object, problem: ValueError) -> str | tuple[int, ...]:
    if isinstance(item, str) and item:
        return item
    if isinstance(item, list) and item:
        ids = [
            token for token in cast("list[object]", item) if type(token) is int and 0 <= token <= MAX_COUNT
        ]
        if len(ids) == len(cast("list[object]", item)):
            return tuple(ids)
    raise problem


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}}
_LIST = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [_TEXT, _IDS, {**_LIST, "items": _TEXT}, {**_LIST, "items": _IDS}]}),
]


class StreamOptions(Wire):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # accepted: padding against eavesdroppers is for the wire, not for us


class OpenAIRequest(Sampling):
    """What completions and chat completions have in common. null means absent."""

    model_config = Sampling.model_config | {"extra": "allow"}
    null_is_absent: ClassVar[bool] = True

    model: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_COUNT)] = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] = 0
    seed: Annotated[int | None, Field(ge=-(2**63), le=MAX_SEED)] = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def sampling(self) -> Sampling:
        """The sampling fields as the rest of the server knows them: top_k −1 is 0, seeds are uint64."""
        changed = {"top_k": max(0, self.top_k), "seed": None if self.seed is None else self.seed & MAX_SEED}
        return self.model_copy(update=changed)


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions."""

    prompt: Prompts = Field(description=_PROMPT_RULE)
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs together with echo is not supported in this version of the worker")
        return self


Effort = Annotated[str | None, Field(min_length=1, max_length=32)]


class TemplateFields(Wire):
    """What may be told to a chat template besides the messages."""

    enable_thinking: bool | None = None
    reasoning_effort: Effort = None
    model_identity: Annotated[str | None, Field(min_length=1, max_length=MAX_IDENTITY)] = None


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: Messages = Field(description=f"a list of 1 to {MAX_MESSAGES} messages")
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_COUNT)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    reasoning_effort: Effort = None
    chat_template_kwargs: TemplateFields | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_fields(self) -> dict[str, object]:
        fields: dict[str, object] = {}
        if self.reasoning_effort is not None:
            fields["reasoning_effort"] = self.reasoning_effort
        if self.chat_template_kwargs is not None:
            fields |= self.chat_template_kwargs.model_dump(exclude_none=True)
        return fields
