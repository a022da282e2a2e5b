"""
Are the tests any good? Each mutant is the real source with one mistake put in, and must be caught.

A mutant is tried with every promise of `engine_checks` and then with generated scenarios, the same ones
each time, until something fails. One that survives is a hole in the tests.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
from engine_checks import CHECKS
from engine_world import Code, Scenario, play, scenarios
from hypothesis import HealthCheck, Phase, given, settings

from worker_orcd.engine import blocks, scheduler

MUTANT_BLOCKS = "worker_orcd_mutant_blocks"


@dataclass(frozen=True)
class Mutant:
    name: str
    module: ModuleType
    old: str
    new: str


def in_blocks(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, blocks, old, new)


def in_scheduler(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, scheduler, old, new)


MUTANTS = [
    in_blocks("the parent hash is left out", "parent + array", "array"),
    in_blocks("the salt is ignored", "blake2b(salt,", 'blake2b(b"",'),
    in_blocks("the null block is given out", "range(NULL_BLOCK + 1, num_blocks)", "range(num_blocks)"),
    in_blocks("heads are freed before tails", "in reversed(block_ids)", "in block_ids"),
    in_blocks("the latest freed is reused first", "popitem(last=False)", "popitem(last=True)"),
    in_blocks("what cached nothing is kept", "if self._hashes[block_id] is None:", "if False:"),
    in_blocks("a reused block is still found", "del self._by_hash[block_hash]", "pass"),
    in_blocks("the last of equal blocks wins", "if block_hash not in self._by_hash:", "if True:"),
    in_blocks("a found block stays in the free list", "del self._free[block_id]", "pass"),
    in_blocks("a found block is not counted", "self._ref_counts[block_id] += 1", "pass"),
    in_blocks(
        "a shared block is freed with its first holder",
        "if self._ref_counts[block_id] == 0:\n                self._free",
        "if True:\n                self._free",
    ),
    in_blocks("held blocks count as free ones", "if self._ref_counts[block_id] == 0)", "if True)"),
    in_blocks("a gap in a prefix is jumped over", "break", "continue"),
    in_scheduler(
        "blocks are published before they are computed",
        "        self._pool.take(found)\n        sequence.block_ids = found + self._pool.allocate(missing)\n",
        "        self._pool.take(found)\n        sequence.block_ids = found + self._pool.allocate(missing)\n"
        "        for b, h in zip(sequence.block_ids, sequence.block_hashes): self._pool.publish(b, h)\n",
    ),
    in_scheduler(
        "a failed row is published",
        "        if isinstance(result, RowFailure):\n",
        "        if isinstance(result, RowFailure):\n"
        "            self._publish_blocks(sequence, sequence.num_computed_tokens + row.num_tokens)\n",
    ),
    in_scheduler(
        "a failed step is published",
        "        self._end_step(step)\n        return [",
        "        for row in step.rows:\n"
        "            self._publish_blocks(row.sequence, row.sequence.num_computed_tokens + row.num_tokens)\n"
        "        self._end_step(step)\n        return [",
    ),
    in_scheduler("only the last of several blocks is published", "range(first, end)", "range(end - 1, end)"),
    in_scheduler("blocks are not chained", "hashes[-1] if i else hash_salt", "hash_salt"),
    in_scheduler(
        "a whole prompt may be cached", "(len(sequence.token_ids) - 1) //", "len(sequence.token_ids) //"
    ),
    in_scheduler("found blocks are not taken", "        self._pool.take(found)\n", ""),
    in_scheduler("a preempted sequence keeps its count", "        sequence.num_computed_tokens = 0\n", ""),
    in_scheduler(
        "a preempted sequence keeps its blocks",
        "        self._release(sequence)\n        sequence",
        "        sequence",
    ),
    in_scheduler("blocks are released twice", "        sequence.block_ids = []\n", ""),
    in_scheduler("the best is preempted", "victim = self.running[-1]", "victim = self.running[0]"),
    in_scheduler(
        "a preempted sequence loses its place",
        "insort(self.waiting, sequence, key=_rank)\n\n",
        "self.waiting.append(sequence)\n\n",
    ),
    in_scheduler("nobody is preempted for a decode", "while self._pool.num_free == 0:", "while False:"),
    in_scheduler(
        "an equal is preempted", "s.priority > sequence.priority", "s.priority >= sequence.priority"
    ),
    in_scheduler("some are preempted in vain", "bool(victims) and missing", "bool(victims) or missing"),
    in_scheduler(
        "a preempted row stays in the step", "self.rows.pop(sequence, 0)", "self.rows.get(sequence, 0)"
    ),
    in_scheduler(
        "a preempted row's share is lost",
        "self.budget += self.rows.pop(sequence, 0)",
        "self.rows.pop(sequence, 0)",
    ),
    in_scheduler(
        "blocks are freed on cancel in flight",
        "self._ended_in_flight.append(sequence)",
        "self._release(sequence)",
    ),
    in_scheduler(
        "blocks are not freed after cancel in flight",
        "        for sequence in self._ended_in_flight:\n            self._release(sequence)\n",
        "",
    ),
    in_scheduler(
        "a cancelled sequence still gets tokens", "if row.sequence.finish_reason is None and (", "if ("
    ),
    in_scheduler("stop tokens do not stop", "if may_stop and", "if False and"),
    in_scheduler("min_tokens is ignored", "may_stop = sequence.may_stop", "may_stop = True"),
    in_scheduler(
        "one token too many",
        "num_output_tokens >= sequence.max_tokens",
        "num_output_tokens > sequence.max_tokens",
    ),
    in_scheduler(
        "a deadline is missed by a step", "self._deadlines[0][0] <= now", "self._deadlines[0][0] < now"
    ),
    in_scheduler("a deadline outlives its sequence", " and sequence.arrival == arrival", ""),
    in_scheduler("the budget is not spent", "        self.budget -= num_tokens\n", ""),
    in_scheduler("the rest of the budget is lost", "        plan.spend_rest()\n", ""),
    in_scheduler("a long prompt takes all", "-(-self.budget // 2)", "self.budget"),
    in_scheduler(
        "prompts go before decodes",
        "        self._plan_decodes(plan)\n        self._plan_prompts(plan)\n",
        "        self._plan_prompts(plan)\n        self._plan_decodes(plan)\n",
    ),
    in_scheduler(
        "there are always seats",
        "and plan.budget > 0 and len(self.running) < self._config.max_num_seqs",
        "and plan.budget > 0",
    ),
    in_scheduler("no block is spared", "missing + len(self.running) >", "missing >"),
    in_scheduler(
        "the pool does not bound the length",
        "min(config.max_model_len or capacity, capacity)",
        "config.max_model_len or capacity",
    ),
    in_scheduler("a resume counts as an arrival", "if sequence.num_preemptions == 0:", "if True:"),
]


def load(mutant: Mutant) -> Code:
    """The modules under test with the mistake put in."""
    sources = {module: inspect.getsource(module) for module in (blocks, scheduler)}
    assert sources[mutant.module].count(mutant.old) == 1, f"not found once: {mutant.old!r}"
    sources[mutant.module] = sources[mutant.module].replace(mutant.old, mutant.new)
    sources[scheduler] = sources[scheduler].replace("worker_orcd.engine.blocks", MUTANT_BLOCKS)
    loaded = []
    for name, module in ((MUTANT_BLOCKS, blocks), ("worker_orcd_mutant_scheduler", scheduler)):
        spec = importlib.util.spec_from_loader(name, loader=None)
        assert spec is not None
        made = sys.modules[name] = importlib.util.module_from_spec(spec)
        exec(compile(sources[module], name, "exec"), made.__dict__)
        loaded.append(made)
    return Code(scheduler=loaded[1], blocks=loaded[0])


def killer(code: Code) -> str | None:
    """What notices that the code is wrong: the name of a promise, or "scenarios"."""
    for check in CHECKS:
        try:
            check(code)
        except BaseException:  # pytest.raises fails with a BaseException
            return check.__name__
    try:
        run_scenarios(code)
    except Exception:
        return "scenarios"
    return None


def run_scenarios(code: Code) -> None:
    @settings(
        max_examples=120,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(scenarios())
    def run(scenario: Scenario) -> None:
        play(code, scenario)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_mistake_is_noticed(mutant: Mutant):
    assert killer(load(mutant)) is not None, "the mutant survives"


@pytest.mark.slow
def test_without_a_mistake_nothing_is_noticed():
    nothing = Mutant("none", blocks, "class BlockPool", "class BlockPool")
    assert killer(load(nothing)) is None
