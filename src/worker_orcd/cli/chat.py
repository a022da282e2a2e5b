"""`worker-orcd run`: one prompt, or a conversation in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import secrets
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker_orcd.cli.options import ConfigFile, ModelArgument, with_model, with_settings
from worker_orcd.cli.settings import load_config
from worker_orcd.cli.terminal import warn_all
from worker_orcd.errors import InvalidConfiguration, RequestError
from worker_orcd.sequence import FinishReason, SamplingParams

if TYPE_CHECKING:
    from worker_orcd.cli.local import LocalEngine
    from worker_orcd.text.stream import Delta

Message = dict[str, str]

DIM, NORMAL = "\x1b[2m", "\x1b[0m"

HELP = """\
/exit          leave (Ctrl-D does too)
/reset         forget the conversation
/system TEXT   forget the conversation and begin with this system message
/help          this
Ctrl-C stops the answer."""


@with_settings(["model", "device", "engine"], without=["worker_id"])
def run(
    given: dict[str, Any],
    named: ModelArgument = None,
    prompt: Annotated[
        str | None,
        typer.Argument(help="answer this and exit (-: standard input)", metavar="PROMPT", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="system message", show_default=False)] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue PROMPT as it is, without chat template")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="length of an answer, at most", min=1)] = 2048,
    temperature: Annotated[
        float, typer.Option(help="0: always the most likely token", min=0.0, max=2.0)
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="draw from the most likely tokens of this mass", min=0.0, max=1.0)
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from so many tokens (0: all)", min=0)] = 0,
    min_p: Annotated[
        float, typer.Option(help="leave out what is this much less likely", min=0.0, max=1.0)
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="of the draws (default: a fresh one)", min=0, show_default=False)
    ] = None,
    stats: Annotated[
        bool | None, typer.Option(help="print speed (default: on a terminal)", show_default=False)
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Answer a prompt, or chat in the terminal."""
    if "model" in given and prompt is None:  # `run --model demo "Hello"`
        named, prompt = None, named
    settings, warnings = load_config(with_model(given, named), config_file=config)
    warn_all(warnings)
    interactive = prompt is None and sys.stdin.isatty()
    if prompt == "-" or (prompt is None and not interactive):
        prompt = sys.stdin.read()
    if prompt is not None and not prompt:
        raise InvalidConfiguration("PROMPT is empty")
    if raw and (interactive or system is not None):
        raise InvalidConfiguration("--raw needs a PROMPT and no --system: it does without the chat template")
    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=_seed(seed)
    )
    from worker_orcd.cli.local import local_engine

    with local_engine(settings) as engine:
        show_stats = sys.stderr.isatty() if stats is None else stats
        chat = Chat(engine, sampling, max_tokens=max_tokens, system=system, show_stats=show_stats)
        if interactive:
            chat.converse(fixed_seed=seed is not None)
        elif raw:
            chat.complete(prompt or "")
        else:
            chat.answer(prompt or "")


def _seed(given: int | None) -> int:
    if given is None:
        return secrets.randbits(64)
    if given >= 1 << 64:
        raise InvalidConfiguration(f"--seed: found {given}; expected an integer from 0 to {(1 << 64) - 1}")
    return given


@dataclass(slots=True)
class Chat:
    """A conversation so far, and the engine that continues it."""

    engine: LocalEngine
    sampling: SamplingParams
    max_tokens: int
    system: str | None
    show_stats: bool
    messages: list[Message] = field(default_factory=list[Message])

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def converse(self, *, fixed_seed: bool) -> None:
        """Read prompts from the terminal until the end of input or /exit."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives input() history and editing
        print(f"{self.engine.loaded.model_id}; /help for help, Ctrl-D to leave")
        while True:
            try:
                if not self._turn(fixed_seed):
                    return
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("  (Ctrl-D or /exit to leave)")

    def _turn(self, fixed_seed: bool) -> bool:
        """Read a line and do what it says; False to leave."""
        line = input("> ").strip()
        if line in ("/exit", "/quit"):
            return False
        if line.startswith("/"):
            self._command(line)
        elif line:
            if not fixed_seed:
                self.sampling = replace(self.sampling, seed=secrets.randbits(64))
            self._try_to_answer(line)
        return True

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        if name == "/reset":
            self.reset()
        elif name == "/system" and text:
            self.system = text
            self.reset()
        else:
            print(HELP)

    def _try_to_answer(self, line: str) -> None:
        """A prompt that cannot be answered is forgotten, and the conversation goes on."""
        before = list(self.messages)
        try:
            self.answer(line)
        except KeyboardInterrupt:  # before the answer began or after it ended
            self.messages = before
            raise
        except RequestError as error:
            self.messages = before
            print(f"error: {error.message} (/reset forgets the conversation)", file=sys.stderr)

    def answer(self, text: str) -> None:
        """Add a message of the user and stream the answer. Raises RequestError, InvalidConfiguration."""
        loaded = self.engine.loaded
        if loaded.chat_template is None:
            raise InvalidConfiguration(f"{loaded.no_chat_template}; use --raw")
        self.messages.append({"role": "user", "content": text})
        answer = self._stream(loaded.chat_template.encode(loaded.tokenizer, self.messages), messages=True)
        self.messages.append({"role": "assistant", "content": answer})

    def complete(self, text: str) -> None:
        """Stream a continuation of the text."""
        self._stream(self.engine.loaded.tokenizer.encode(text))

    def _stream(self, prompt: list[int], *, messages: bool = False) -> str:
        """Print the answer as it comes; the whole of its content. Ctrl-C ends it early."""
        from worker_orcd.text.detokenizer import detokenizer

        loaded = self.engine.loaded
        longest = loaded.engine_config.max_model_len or loaded.plan.max_model_len
        room = longest - len(prompt)
        if room < 1:
            raise RequestError(f"the prompt has {len(prompt)} tokens; at most {longest - 1} fit")
        text = detokenizer(loaded.tokenizer, prompt, messages=messages)
        screen = Screen()
        times: list[float] = []
        started = time.perf_counter()
        number = self.engine.submit(
            tuple(prompt),
            self.sampling,
            max_tokens=min(room, self.max_tokens),
            stop_token_ids=loaded.tokenizer.end_of_generation,
        )
        with (
            contextlib.closing(self.engine.outputs(number)) as outputs,
            contextlib.suppress(KeyboardInterrupt),
        ):
            for when, output in outputs:
                ends = output.finish_reason is FinishReason.STOP
                num_text = len(output.tokens) - ends
                times += [when] * num_text
                for position, token in enumerate(output.tokens):
                    if position < num_text or not loaded.tokenizer.is_text(token.token_id):
                        screen.show(text.push(token.token_id))
        screen.show(text.finish())
        screen.end()
        if self.show_stats:
            print(_speed(len(prompt), started, times), file=sys.stderr)
        return "".join(screen.content)


class Screen:
    """Where an answer is printed. Reasoning is dim on a terminal and left out where a program reads."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self._terminal = sys.stdout.isatty()
        self._dim = False

    def show(self, delta: Delta) -> None:
        """What a model says may hold escape sequences; a terminal gets none of them."""
        is_content = delta.message is None or delta.message.kind == "content"
        if is_content:
            self.content.append(delta.text)
        if not delta.text or not (is_content or self._terminal):
            return
        text = delta.text
        if self._terminal:
            text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
            text = self._style(dim=not is_content) + text
        print(text, end="", flush=True)

    def end(self) -> None:
        if self._dim:
            print(NORMAL, end="")
        print(flush=True)

    def _style(self, *, dim: bool) -> str:
        if dim == self._dim:
            return ""
        self._dim = dim
        return DIM if dim else NORMAL + "\n\n"


def _speed(num_prompt_tokens: int, started: float, times: list[float]) -> str:
    if not times:
        return f"[{num_prompt_tokens} prompt tokens, no answer]"
    first = f"first token after {1000 * (times[0] - started):.0f} ms"
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return f"[{num_prompt_tokens} prompt tokens, {first}, {len(times)} tokens, {rate:.1f} tok/s]"
