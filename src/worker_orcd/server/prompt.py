"""From a validated request to what the engine computes: token ids, stop tokens, a seed, room for the answer.

`encode` is the expensive part and runs in a thread, after the request was admitted. Everything that needs the
vocabulary or the context length is checked here.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from worker_orcd.clock import Clock
from worker_orcd.errors import ContextLengthExceeded, InvalidParameter, PayloadTooLarge
from worker_orcd.sequence import SamplingParams
from worker_orcd.server.auth import cache_salt
from worker_orcd.server.client import Generation
from worker_orcd.server.context import Context
from worker_orcd.server.status import Serving
from worker_orcd.server.wire import MAX_SEED, Message, Sampling

DEFAULT_MAX_TOKENS = 2048
_FEW = 2048  # token ids are checked in the time that it takes to begin a thread's work …
_PER_CHAR = 16  # … and so many while a character of text is tokenised, of whatever kind it is
_SEED_BITS = 53  # of a seed made up here: exact in every JSON parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to continue: exactly one of text, token ids and messages. `param` names it in errors."""

    param: str
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    template_fields: Mapping[str, object] | None = None  # what else the chat template is told

    @property
    def content(self) -> str:
        """What the caller wrote, for the log's digest."""
        if self.messages is not None:
            return "\n".join(message.content for message in self.messages)
        if self.text is not None:
            return self.text
        return msgspec.json.encode(self.token_ids or ()).decode()[1:-1].replace(",", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One sequence to compute and how its answer is cut."""

    generation: Generation
    stop: tuple[str, ...]
    end_ids: frozenset[int]  # of the stop tokens, those that mean the end of an answer
    to_messages: bool = False  # the answer is to messages, so a model may give it in messages

    def answering_messages(self) -> Plan:
        """The plan where the chat template made the prompt."""
        return dataclasses.replace(self, to_messages=True)

    def choice(self, index: int) -> Plan:
        """The plan of the `index`th answer to the same prompt: the seed counts up."""
        if index == 0:
            return self
        sampling = self.generation.sampling
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + index) & MAX_SEED)
        return dataclasses.replace(self, generation=dataclasses.replace(self.generation, sampling=sampling))


def is_quick(prompts: Sequence[Prompt]) -> bool:
    """Whether `encode` has so little to do that no thread is worth it: a few token ids, or a short text. A
    chat template may always take its time.
    """
    return all(prompt.messages is None for prompt in prompts) and sum(map(_work, prompts)) <= _FEW


def _work(prompt: Prompt) -> int:
    if prompt.text is not None:
        return _PER_CHAR * max(8, len(prompt.text))  # even the shortest takes some microseconds
    return len(prompt.token_ids or ())


def encode(context: Context, serving: Serving, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt. Raises InvalidParameter, PayloadTooLarge. Takes time: call it in a thread."""
    if prompt.token_ids is not None:
        _require_tokens(prompt.token_ids, serving, prompt.param)
        return tuple(prompt.token_ids)
    tokenizer = serving.tokenizer
    if prompt.messages is not None:
        require_short(context, sum(message.num_chars for message in prompt.messages), prompt.param)
        if serving.chat_template is None:
            raise InvalidParameter(
                f"there is nothing to make a prompt of messages with: {serving.no_chat_template}"
            )
        ids = serving.chat_template.encode(
            tokenizer,
            [message.for_template() for message in prompt.messages],
            add_generation_prompt=True,
            extra=dict(prompt.template_fields or {}),
        )
    else:
        text = prompt.text or ""
        require_short(context, len(text), prompt.param)
        ids = tokenizer.encode(text, add_special=True, parse_special=False)
    if not ids:
        raise InvalidParameter(f"{prompt.param} is empty: it has no tokens", param=prompt.param)
    return tuple(ids)


def require_short(context: Context, num_chars: int, param: str) -> None:
    """Raises PayloadTooLarge for a text that is too long to be tokenised."""
    allowed = context.config.max_prompt_chars
    if num_chars > allowed:
        raise PayloadTooLarge(f"{param} has {num_chars} characters; at most {allowed} are taken", param=param)


def _require_tokens(ids: Sequence[int], serving: Serving, param: str) -> None:
    size = serving.tokenizer.vocab_size
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < size:
            raise InvalidParameter(
                f"{param}[{index}]: found {token_id}; allowed: token ids from 0 to {size - 1}", param=param
            )


def plan(
    serving: Serving,
    sampling: Sampling,
    prompt_token_ids: tuple[int, ...],
    *,
    identity: bytes,
    max_tokens: int | None,
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
    logprobs: int | None = None,
    deadline: float | None = None,
) -> Plan:
    """What to submit for this request of `identity`. `default_max_tokens` None: as much as the context holds.

    Raises ContextLengthExceeded with the numbers, InvalidParameter for ids outside the vocabulary.
    """
    tokenizer = serving.tokenizer
    room = serving.facts.context_length - len(prompt_token_ids)
    if room < (max_tokens or 1):
        raise _too_long(serving, len(prompt_token_ids), max_tokens)
    limit = max_tokens if max_tokens is not None else min(default_max_tokens or room, room)
    if sampling.min_tokens > limit:
        raise InvalidParameter(
            f"min_tokens: found {sampling.min_tokens}; allowed: at most max_tokens, {limit}",
            param="min_tokens",
        )
    _require_tokens(sampling.stop_token_ids, serving, "stop_token_ids")
    _require_tokens([token_id for token_id, _ in sampling.logit_bias], serving, "logit_bias")
    end_ids: frozenset[int] = frozenset() if sampling.ignore_eos else tokenizer.end_of_generation
    generation = Generation(
        prompt_token_ids=prompt_token_ids,
        max_tokens=limit,
        stop_token_ids=end_ids | frozenset(sampling.stop_token_ids),
        sampling=_sampling_params(sampling, logprobs),
        min_tokens=sampling.min_tokens,
        priority=sampling.priority,
        deadline=deadline,
        cache_salt=cache_salt(identity, sampling.cache_salt or ""),
    )
    return Plan(generation=generation, stop=sampling.stop, end_ids=end_ids)


def _too_long(serving: Serving, num_prompt: int, max_tokens: int | None) -> ContextLengthExceeded:
    wanted = max_tokens or 1
    return ContextLengthExceeded(
        f"This model's maximum context length is {serving.facts.context_length} tokens."
        f" However, you requested {num_prompt + wanted} tokens"
        f" ({num_prompt} in the prompt, {wanted} in the answer).",
        param="prompt" if num_prompt >= serving.facts.context_length else "max_tokens",
    )


def _sampling_params(sampling: Sampling, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        seed=secrets.randbits(_SEED_BITS) if sampling.seed is None else sampling.seed,
        logprobs=logprobs,
    )


def deadline_of(deadline_ms: int | None, header: str | None, max_ms: int, clock: Clock) -> float | None:
    """By the clock, the earlier of field and `X-Deadline` header, both milliseconds from now."""
    waits = [] if deadline_ms is None else [deadline_ms]
    if header is not None:
        if not (header.isascii() and header.isdecimal() and len(header) <= 12 and 1 <= int(header) <= max_ms):
            raise InvalidParameter(
                f"X-Deadline: found {header[:32]!r}; allowed: milliseconds from now, 1 to {max_ms}",
                param="X-Deadline",
            )
        waits.append(int(header))
    return clock() + min(waits) / 1000 if waits else None
