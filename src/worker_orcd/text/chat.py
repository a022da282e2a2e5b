"""Messages to a prompt, by the model's own template, in a sandbox.

Templates see what `transformers` shows them (messages, tools, add_generation_prompt, bos_token, eos_token,
extra variables; raise_exception, strftime_now, tojson) and are rendered in a process of their own. The
template alone decides about BOS: none is added to what it renders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from worker_orcd.errors import InvalidModelFile, InvalidParameter
from worker_orcd.text.marks import ControlNames, Marker, Plain, plain
from worker_orcd.text.template_process import RenderLimits, TemplateFailed, TemplateProcess
from worker_orcd.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content, and what the template knows (name, tool_calls, …)

# Templates put roles between the parts of control tokens: `'<|' + message['role'] + '|>'`.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

MAX_SOURCE = 1 << 20  # characters
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
_ARGUMENTS_DEPTH = 4  # of them in a message: tool_calls, a call, its function, its arguments
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplate:
    """A compiled template. `source` is untrusted: it comes with the model file.

    Safe to call from several threads; calls block (0.2 ms and up), so not from an event loop.
    """

    source: str
    sha256: str

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        limits: RenderLimits | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`clock` tells templates the date, in local time.

        Raises InvalidModelFile for a template that cannot be compiled within the limits.
        """
        self.source = source
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._clock = clock
        self._constants = {"bos_token": bos_token, "eos_token": eos_token}
        if len(source) > MAX_SOURCE:
            raise InvalidModelFile(
                f"the chat template has {len(source)} characters; allowed are {MAX_SOURCE}"
            )
        try:
            self._process = TemplateProcess(source, limits or RenderLimits())
        except TemplateFailed as error:
            raise InvalidModelFile(f"the chat template cannot be compiled: {_public(error)}") from None
        self._names = (frozenset[str](), ControlNames(()))  # of the tokenizer that was used last

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text.

        Raises InvalidParameter (bad messages, the template's own raise_exception, time or size limit
        exceeded).
        """
        return self._render(_request(messages, add_generation_prompt, tools, extra), self._clock())

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the rendered prompt, in which message contents never yield control tokens.

        Where no string of the request spells (a part of) a control token, these are the ids of `render`'s
        text.
        """
        request = _request(messages, add_generation_prompt, tools, extra)
        names = self._control_names(tokenizer)
        now = self._clock()  # both renderings below are of the same day
        text, mask = self._masked(request, names, tokenizer.filler, now, strict=False)
        ids = tokenizer.encode_masked(text, mask, add_special=False)
        if not names.concern(request):
            return ids
        # A template that takes user strings apart, or puts them between pieces of a name, might make control
        # tokens of them. With every character marked that could be part of one, none can be the user's: both
        # ways must find the same.
        text, strict_mask = self._masked(request, names, tokenizer.filler, now, strict=True)
        if strict_mask == mask:
            return ids
        checked = tokenizer.encode_masked(text, strict_mask, add_special=False)
        controls = tokenizer.control_ids
        same = [i for i in ids if i in controls] == [i for i in checked if i in controls]
        return ids if same else checked

    @property
    def process_id(self) -> int | None:
        """Of the template's process, where one is running."""
        return self._process.pid

    def close(self) -> None:
        """Ends the template's process."""
        self._process.close()

    def _masked(
        self, request: dict[str, Plain], names: ControlNames, filler: str, now: datetime, *, strict: bool
    ) -> tuple[str, str]:
        marker = Marker(names, request, self.source)
        marked = cast("dict[str, Any]", marker.mark(request, strict=strict))
        for message, original in zip(marked["messages"], cast("Any", request["messages"]), strict=True):
            message["role"] = original["role"]  # one of ROLES
        return marker.reveal(self._render(marked, now), filler)

    def _render(self, request: Mapping[str, Plain], now: datetime) -> str:
        try:
            return self._process.render({**request, **self._constants}, now)
        except TemplateFailed as error:
            raise InvalidParameter(f"the chat template fails: {_public(error)}", param="messages") from None

    def _control_names(self, tokenizer: Tokenizer) -> ControlNames:
        texts, names = self._names
        if texts != tokenizer.control_texts:
            names = ControlNames(tokenizer.control_texts)
            self._names = (
                tokenizer.control_texts,
                names,
            )  # one assignment: other threads see both or neither
        return names


def _public(error: TemplateFailed) -> str:
    return _ADDRESS.sub("…", str(error))


def _request(
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Plain]:
    """The template's variables, checked and copied as plain data."""
    if isinstance(messages, str) or not messages:
        raise InvalidParameter("messages must be a list of at least one message", param="messages")
    copied: list[Plain] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidParameter(f"{where} must be an object with role and content", param=where)
        role = message.get("role")
        if role not in ROLES:
            raise InvalidParameter(
                f"{where}.role is {str(role)[:40]!r}; allowed are {', '.join(ROLES)}", param=f"{where}.role"
            )
        copied.append(_with_parsed_arguments(cast("dict[str, Any]", plain(message, where))))
    variables = cast("dict[str, Plain]", plain(extra or {}, "chat_template_kwargs"))
    clash = _RESERVED & variables.keys()
    if clash:
        raise InvalidParameter(
            f"chat_template_kwargs may not set {', '.join(sorted(clash))}", param="chat_template_kwargs"
        )
    return {
        "documents": None,
        **variables,
        "messages": copied,
        "tools": plain(tools, "tools") if tools else None,
        "add_generation_prompt": add_generation_prompt,
    }


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as objects: clients send them as JSON text, templates want objects."""
    calls = message.get("tool_calls")
    for call in cast("list[Any]", calls) if isinstance(calls, list) else []:
        function = cast("dict[str, Any]", call).get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            continue
        arguments = cast("dict[str, Any]", function).get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = plain(json.loads(arguments), "arguments", _ARGUMENTS_DEPTH)
            except (ValueError, RecursionError, InvalidParameter):
                continue  # the model wrote it; the template shows it as it is
            if isinstance(parsed, dict):
                function["arguments"] = parsed
    return message
