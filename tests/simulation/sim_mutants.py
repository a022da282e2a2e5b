"""Mistakes that the simulation must find: functions of the code under test, rewritten while it runs."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from worker_orcd.engine import scheduler
from worker_orcd.engine.block_tables import BlockTables
from worker_orcd.engine.blocks import BlockPool
from worker_orcd.engine.engine import Engine
from worker_orcd.engine.scheduler import Scheduler
from worker_orcd.server import execute
from worker_orcd.server.answer import Answer
from worker_orcd.server.client import EngineClient
from worker_orcd.server.jobs import Job
from worker_orcd.server.protocol import BoundedProtocol
from worker_orcd.server.sse import EventStream
from worker_orcd.worker.process import Worker


@dataclass(frozen=True)
class Mutant:
    name: str
    owner: Any  # a class or a module
    function: str
    old: str
    new: str


MUTANTS = [
    # Blocks.
    Mutant(
        "a cancelled job keeps its blocks", Scheduler, "_finish",
        "if sequence.num_steps_under_way == 0:", "if reason is not FinishReason.CANCELLED:",
    ),
    Mutant(
        "blocks are freed while a step writes to them", Scheduler, "_finish",
        "if sequence.num_steps_under_way == 0:", "if True:",
    ),
    Mutant("a reused block is still found", BlockPool, "allocate", "del self._by_hash[block_hash]", "pass"),
    Mutant("found blocks are not taken", BlockTables, "admit", "group.pool.take(found)", "pass"),
    Mutant(
        "salts share blocks", Scheduler, "_extend_hashes", "hash_salt(sequence.cache_salt)", 'hash_salt(b"")'
    ),
    Mutant(
        "a step that failed is found in the cache", Scheduler, "fail",
        "self._updated = self._end_step(step)",
        "[self._publish_blocks(r.sequence, r.end) for r in step.rows if r.sequence.block_tables];"
        " self._updated = self._end_step(step)",
    ),
    # Steps and sequences.
    Mutant(
        "a preempted job loses its last token", Scheduler, "_preempt",
        "sequence.num_preemptions += 1",
        "sequence.num_preemptions += 1; sequence.token_ids[sequence.num_prompt_tokens:][-1:] and"
        " sequence.token_ids.pop()",
    ),
    Mutant(
        "what was dropped is not computed again", Scheduler, "drop",
        "row.sequence.num_scheduled_tokens = row.sequence.num_computed_tokens", "pass",
    ),
    Mutant("a step behind one that failed is kept", Engine, "_end_oldest", "self._drop_launched()", "pass"),
    Mutant("deadlines are forgotten", Engine, "_launch_next", "self._scheduler.expire(now)", "[]"),
    Mutant(
        "priorities are turned round", scheduler, "_rank",
        "(sequence.priority, sequence.arrival)", "(-sequence.priority, sequence.arrival)",
    ),
    Mutant(
        "the worst goes first", Scheduler, "_admit_waiting",
        "sequence = self.waiting[0]", "self.waiting.reverse(); sequence = self.waiting[0]",
    ),
    Mutant(
        "the best starves", Scheduler, "_plan_decodes", "if self._grow(sequence, plan):",
        "if (sequence is not self.running[0] or len(self.running) == 1) and self._grow(sequence, plan):",
    ),
    Mutant(
        "a cancel is lost", Engine, "_receive",
        "self._outputs += self._scheduler.cancel(id)",
        "self._outputs += [] if self._launched else self._scheduler.cancel(id)",
    ),
    Mutant(
        "a failed job is told twice", Engine, "_fail",
        "self._outputs += self._scheduler.fail(step, error.code, error.message)",
        "self._outputs += 2 * self._scheduler.fail(step, error.code, error.message)",
    ),
    Mutant("a lost device ends only its step", Engine, "_fail", "isinstance(error, DeviceError) or ", ""),
    Mutant("nobody hears that the engine is gone", Engine, "_collapse", "self._on_failure(error)", "pass"),
    # The server.
    Mutant(
        "a client that is gone keeps the device", EngineClient, "_cancel_stream",
        "self._send(Cancel(stream_id))", "pass",
    ),
    Mutant(
        "a request gives back one place of several", EngineClient, "release",
        "self._num_admitted -= admission.num_sequences", "self._num_admitted -= 1",
    ),
    Mutant(
        "the queue has no bound", EngineClient, "admit",
        "if self._num_admitted + num_sequences > self._max_queue:", "if False:",
    ),
    Mutant(
        "streams are woken once", EngineClient, "_wake_some",
        "if self._ready:\n            self._loop", "if False:\n            self._loop",
    ),
    Mutant(
        "a stream that nobody reads grows", EngineClient, "_wake_some",
        "if stream.num_left >= self._max_buffered_outputs:", "if False:",
    ),
    Mutant(
        "two bursts lose a stream", EngineClient, "follow",
        "stream.num_left -= 1", "stream.num_left -= 0",
    ),
    Mutant(
        "an error is told twice", execute, "_events",
        "+ _error(job, error)", "+ 2 * _error(job, error)",
    ),
    Mutant(
        "an error is not told", execute, "_events",
        "+ _error(job, error)", "",
    ),
    Mutant("a success is not counted", Job, "succeeded", 'self._outcome = "success"', "pass"),
    Mutant("text that was held back is lost", Answer, "_last_piece", "text += delta.text", "pass"),
    Mutant(
        "news of a busy stream is lost", EventStream, "_wake",
        "self._tell()\n        return\n    known", "return\n    known",
    ),
    Mutant(
        "nobody sees that a client is gone", EventStream, "_hung_up",
        "self._tell()", "pass",
    ),
    Mutant(
        "a peer that reads nothing is kept", BoundedProtocol, "pause_writing",
        "self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)", "pass",
    ),
    Mutant(
        "a peer that leaves the rest is kept", BoundedProtocol, "_watch_rest",
        "self.transport.abort()", "pass",
    ),
    # The worker.
    Mutant("nobody is cut off at the end", Worker, "_drain", "client.cancel_all()", "pass"),
    Mutant(
        "a signal after a shutdown ends all", Worker, "_signalled",
        "if self._was_signalled:", "if self._ended is None or self._ended.done():",
    ),
    Mutant("new jobs are taken at the end", Worker, "_drain", "self._status.begin_drain()", "pass"),
]  # fmt: skip


@contextmanager
def planted(mutant: Mutant) -> Generator[None]:
    """The code under test with the mistake in it."""
    original = inspect.getattr_static(mutant.owner, mutant.function)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(mutant.old) == 1, f"not found once: {mutant.old!r}"
    module = sys.modules[original.__module__]
    made: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(mutant.old, mutant.new)
    if "super()" in source:  # its class is found by a cell that a function in a class has
        code = code.replace("super()", f"super({mutant.owner.__name__}, self)")
    exec(compile(code, f"<{mutant.name}>", "exec"), module.__dict__, made)
    setattr(mutant.owner, mutant.function, made[mutant.function])
    try:
        yield
    finally:
        setattr(mutant.owner, mutant.function, original)
