"""Messages to a prompt, by the model's own template, in a sandbox. Interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from worker_orcd.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content, and what the template knows (name, tool_calls, …)


class ChatTemplate:
    """A compiled template. `source` is untrusted: it comes with the model file."""

    source: str
    sha256: str

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. Raises InvalidParameter (bad messages, the template's own raise_exception, time or
        size limit exceeded)."""
        raise NotImplementedError

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of the rendered prompt, in which message contents never yield control tokens."""
        raise NotImplementedError
