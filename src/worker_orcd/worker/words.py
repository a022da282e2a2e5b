"""
The tokenizer and the chat template of a model, loaded on a thread of their own while the weights are.

A large vocabulary takes seconds that neither a disk nor a device needs to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from worker_orcd.config import ServerConfig, WorkerConfig
from worker_orcd.errors import InvalidConfiguration, InvalidModelFile
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.template_process import RenderLimits
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Words:
    tokenizer: Tokenizer
    template: ChatTemplate | None
    no_template: str  # why there is none
    warning: str | None


class BackgroundWords:
    """Leaving the context waits for the thread, and undoes what nobody has taken with `wait`."""

    def __init__(self, config: WorkerConfig, file: GGUFFile, vocab_size: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="words")
        self._words = self._pool.submit(_load, config, file, vocab_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        if self._words.exception() is None and (template := self._words.result().template) is not None:
            template.close()

    def raise_what_failed(self) -> None:
        """Raises LoadError once the thread has found that the model has no usable words."""
        if self._words.done():
            self._words.result()

    def wait(self, warn: Callable[[str], None]) -> Words:
        """What was loaded; the template is the caller's to close. Raises LoadError."""
        words = self._words.result()
        self._pool.shutdown(wait=True)
        if words.warning is not None:
            warn(words.warning)
        return words


def _load(config: WorkerConfig, file: GGUFFile, vocab_size: int) -> Words:
    tokenizer = load_tokenizer(file.metadata, config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise InvalidModelFile(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the network knows {vocab_size}"
        )
    return _with_template(config.server, file, tokenizer)


def _with_template(server: ServerConfig, file: GGUFFile, tokenizer: Tokenizer) -> Words:
    """A model whose own template is broken still completes text."""
    override = server.chat_template
    if override is not None:
        try:
            source = override.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InvalidConfiguration(
                f"the chat template {override.name} cannot be read: {reason}"
            ) from None
    else:
        source = file.metadata.string("tokenizer.chat_template", default="")
        if not source:
            return Words(tokenizer, None, "the model file has no chat template", None)
    bos_token, eos_token = (
        "" if token_id is None else tokenizer.token_text(token_id)
        for token_id in (tokenizer.bos_id, tokenizer.eos_id)
    )
    try:
        limits = RenderLimits(max_chars=server.max_prompt_chars)
        template = ChatTemplate(source, bos_token=bos_token, eos_token=eos_token, limits=limits)
    except InvalidModelFile as error:
        if override is not None:
            raise InvalidConfiguration(f"{override.name}: {error.message}") from None
        warning = f"Chat is not available: {error.message}"
        return Words(tokenizer, None, error.message, warning)
    return Words(tokenizer, template, "", None)
