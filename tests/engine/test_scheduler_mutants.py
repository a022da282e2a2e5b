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

from worker_orcd.engine import block_tables, blocks, scheduler, step_plan

MODULES = (blocks, block_tables, step_plan, scheduler)  # in the order in which they import each other


@dataclass(frozen=True)
class Mutant:
    name: str
    module: ModuleType
    old: str
    new: str


def in_blocks(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, blocks, old, new)


def in_tables(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, block_tables, old, new)


def in_scheduler(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, scheduler, old, new)


def in_plan(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, step_plan, old, new)


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
    in_blocks(
        "a gap among the last is jumped over", "                length = index\n", "                pass\n"
    ),
    in_blocks("a gap is found one block late", "length = index\n", "length = index + 1\n"),
    in_blocks("the first of the last is not looked at", "max(0, length - num_last)", "length - num_last + 1"),
    in_tables(
        "blocks are published before they are computed",
        "        sequence.num_computed_tokens = sequence.num_scheduled_tokens = prefix",
        "        for g, t in zip(self.groups, sequence.block_tables):\n"
        "            for b, h in zip(t, sequence.block_hashes):\n"
        "                if b != 0: g.pool.publish(b, h)\n"
        "        sequence.num_computed_tokens = sequence.num_scheduled_tokens = prefix",
    ),
    in_tables("found blocks are not taken", "            group.pool.take(found)\n", ""),
    in_tables("blocks are released twice", "        sequence.block_tables = []\n", ""),
    in_tables("the null block is released", " if block_id != NULL_BLOCK])", "])"),
    in_tables("one block too many is released", "window + 1) //", "window + self._block_size) //"),
    in_tables("a block is released one token early", "window + 1) //", "window + 2) //"),
    in_tables("a block is released one token late", "window + 1) //", "window) //"),
    in_tables("nothing is released behind the window", "if first < end:", "if False:"),
    in_tables("what lies far behind is not released", "while first > 0 and table", "if first > 0 and table"),
    in_tables(
        "a released block stays in the table",
        "                table[first:end] = [NULL",
        "                [NULL",
    ),
    in_tables(
        "a prefix does without its window's first block",
        "self._num_blocks(g.window - 1) for",
        "self._num_blocks(max(0, g.window - 2)) for",
    ),
    in_tables(
        "a prefix needs none of its window",
        "pool.longest_prefix(known, behind)",
        "pool.longest_prefix(known, 0)",
    ),
    in_tables("the first group decides on a prefix", "num_agreeing < len(self.groups)", "num_agreeing < 1"),
    in_tables(
        "each group is asked once", "num_agreeing + 1 if longest == num_blocks else 1", "num_agreeing + 1"
    ),
    in_tables(
        "the window takes the prefix's first blocks",
        " - len(found)) + found + fresh",
        " - len(found)) + fresh + found",
    ),
    in_tables(
        "a table has no place for what is behind",
        "[NULL_BLOCK] * (prefix.num_blocks - len(found)) + found",
        "found",
    ),
    in_tables(
        "an admission takes more than a window",
        "if behind is not None:\n            end = min",
        "if False:\n            end = min",
    ),
    in_tables("an admission takes less than a window", "behind + 1)\n        return", "1)\n        return"),
    in_tables(
        "only the first group must have room",
        "                return False\n        return True\n\n    def admit",
        "                return False\n            return True\n        return True\n\n    def admit",
    ),
    in_tables(
        "only the last group bounds a chunk",
        "num_blocks = min(\n            len(table)",
        "num_blocks = max(\n            len(table)",
    ),
    in_tables(
        "only one group is published",
        "            for index in range(first, end):",
        "            for index in range(first, end if group is self.groups[0] else first):",
    ),
    in_tables("a shared block is given twice", "if group.pool.ref_count(block_id) == 1)", "if True)"),
    in_tables("what is found counts as given", ".difference(found)", ""),
    in_tables(
        "a window bounds the length", "if behind is None or group.pool.num_usable < behind + 1", "if True"
    ),
    in_tables("a small pool does not bound the length", " or group.pool.num_usable < behind + 1", ""),
    in_scheduler(
        "nothing behind a window is given back", "        self._tables.release_behind(sequence)\n", ""
    ),
    in_scheduler(
        "a chunk is longer than its blocks",
        "min(share, self._tables.reach(sequence))",
        "share",
    ),
    in_scheduler(
        "a chunk may be empty",
        "            if self._grow(sequence, plan):\n                self._add_chunk",
        "            if sequence.block_tables:\n                self._add_chunk",
    ),
    in_scheduler("the rest is spent without blocks", "min(wanted, self._tables.reach(sequence))", "wanted"),
    in_scheduler("who was preempted goes on", "if not sequence.block_tables:  #", "if False:  #"),
    in_scheduler(
        "a failed row is published",
        "        if failure is not None:\n",
        "        if failure is not None:\n            self._publish_blocks(sequence, row.end)\n",
    ),
    in_scheduler(
        "a failed step is published",
        "        self._updated = self._end_step(step)\n        return [",
        "        for row in step.rows:\n"
        "            self._publish_blocks(row.sequence, row.sequence.num_computed_tokens + row.num_tokens)\n"
        "        self._updated = self._end_step(step)\n        return [",
    ),
    in_tables("only the last of several blocks is published", "range(first, end)", "range(end - 1, end)"),
    in_scheduler("blocks are not chained", "hashes[-1] if i else hash_salt", "hash_salt"),
    in_scheduler(
        "a whole prompt may be cached", "(len(sequence.token_ids) - 1) //", "len(sequence.token_ids) //"
    ),
    in_scheduler(
        "a preempted sequence keeps its count",
        "        sequence.num_computed_tokens = sequence.num_scheduled_tokens = 0\n",
        "",
    ),
    in_scheduler(
        "a preempted sequence keeps its blocks",
        "        self._tables.release(sequence)\n        sequence",
        "        sequence",
    ),
    in_scheduler("the best is preempted", "victim = self.running[-1]", "victim = self.running[0]"),
    in_scheduler(
        "a preempted sequence loses its place",
        "insort(self.waiting, sequence, key=_rank)\n\n",
        "self.waiting.append(sequence)\n\n",
    ),
    in_scheduler(
        "nobody is preempted for a decode", "while not self._tables.extend(sequence, 1):", "while False:"
    ),
    in_scheduler(
        "an equal is preempted", "s.priority > sequence.priority", "s.priority >= sequence.priority"
    ),
    in_scheduler("some are preempted in vain", "bool(victims) and self", "bool(victims) or self"),
    in_plan("a preempted row stays in the step", "self.rows.pop(sequence, 0)", "self.rows.get(sequence, 0)"),
    in_plan(
        "a preempted row's share is lost",
        "self.budget += self.rows.pop(sequence, 0)",
        "self.rows.pop(sequence, 0)",
    ),
    in_scheduler(
        "blocks are freed on cancel in flight",
        "if sequence.num_steps_under_way == 0:  #",
        "if True:  #",
    ),
    in_scheduler(
        "blocks are not freed after cancel in flight",
        "sequence.finish_reason is not None and sequence.num_steps_under_way == 0:",
        "False:",
    ),
    in_scheduler(
        "blocks are freed when the first of two steps is over",
        "sequence.finish_reason is not None and sequence.num_steps_under_way == 0:",
        "sequence.finish_reason is not None:",
    ),
    in_scheduler("a step ahead is planned as any other", "ahead=bool(self._in_flight)", "ahead=False"),
    in_scheduler(
        "a step ahead preempts for blocks", "self._tables.extend_all(dict.fromkeys(growing, 1))", "True"
    ),
    in_scheduler(
        "a step ahead preempts for a priority",
        "if has_seat and self.waiting and self.waiting[0].priority < self.running[-1].priority:",
        "if False:",
    ),
    in_plan("a draw is named by its row", "draw_index = num_drawing", "draw_index = len(rows) - 1"),
    in_scheduler(
        "what was dropped is not computed again",
        "row.sequence.num_scheduled_tokens = row.sequence.num_computed_tokens",
        "pass",
    ),
    in_tables(
        "each has room alone, all have not",
        "if missing and missing + spare > group.pool.num_free:",
        "if False:",
    ),
    in_scheduler(
        "a cancelled sequence still gets tokens",
        "if row.sequence.finish_reason is None:\n                outputs",
        "if True:\n                outputs",
    ),
    in_scheduler("stop tokens do not stop", "stopped = result", "stopped = False and result"),
    in_scheduler("min_tokens is ignored", " and sequence.may_stop", ""),
    in_scheduler(
        "one token too many",
        "num_output_tokens >= sequence.max_tokens",
        "num_output_tokens > sequence.max_tokens",
    ),
    in_scheduler(
        "a deadline is missed by a step", "self._deadlines[0][0] <= now", "self._deadlines[0][0] < now"
    ),
    in_scheduler("a deadline outlives its sequence", " and sequence.arrival == arrival", ""),
    in_plan("the budget is not spent", "        self.budget -= num_tokens\n", ""),
    in_scheduler("the rest of the budget is lost", "        self._spend_rest(plan)\n", ""),
    in_plan("a long prompt takes all", "-(-self.budget // 2)", "self.budget"),
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
    in_scheduler(
        "no block is spared", "len(sequence.token_ids), len(self.running))", "len(sequence.token_ids), 0)"
    ),
    in_scheduler(
        "the pool does not bound the length",
        "min(config.max_model_len or capacity, capacity)",
        "config.max_model_len or capacity",
    ),
    in_plan(
        "of several draws one is under way", "num_draws_under_way += num_draws", "num_draws_under_way += 1"
    ),
    in_scheduler(
        "of several draws one is over", "num_draws_under_way -= row.num_draws", "num_draws_under_way -= 1"
    ),
    in_plan(
        "a row goes on in front of the last draw",
        "Row(sequence, num_tokens, sequence.num_scheduled_tokens,",
        "Row(sequence, num_tokens, sequence.num_scheduled_tokens - (previous is not None and num_draws > 1),",
    ),
    in_plan(
        "a draw is told to be that of the step before it",
        "sequence.draw_index = num_drawing",
        "sequence.draw_index = sequence.draw_index or num_drawing",
    ),
    in_plan("what is excluded is for all rounds", "and 0 < num_excluding < num_left:", "and False:"),
    in_plan(
        "more is drawn than max_tokens",
        "min(max_rounds, sequence.num_undrawn_tokens)",
        "max_rounds",
    ),
    in_plan(
        "a round's token is computed again",
        "num_scheduled_tokens += row.num_computed",
        "num_scheduled_tokens += num_tokens",
    ),
    in_scheduler("prompts are in rounds", "any(s.num_unscheduled_tokens != 1 for s in plan.rows)", "False"),
    in_scheduler("rounds pass those who stay behind", "plan.budget == 0 or any", "any"),
    in_scheduler(
        "rounds have no blocks",
        "most if self._tables.extend_all(wanted, spare=len(self.running)) else 1",
        "most",
    ),
    in_scheduler("rounds take the last blocks", "spare=len(self.running)", "spare=0"),
    in_scheduler(
        "a seat stays empty for rounds", "if self.waiting:\n            most", "if False:\n            most"
    ),
    in_scheduler("a row's results are another's", "end + (row.num_draws or 1)", "end + 1"),
    in_scheduler(
        "what is behind a stop counts",
        "if stopped:\n                    break",
        "if stopped:\n                    pass",
    ),
    in_scheduler("rounds are not computed", "row.end + max(0, len(tokens) - 1)", "row.end"),
    in_scheduler("a resume counts as an arrival", "if sequence.num_preemptions == 0:", "if True:"),
]


def load(mutant: Mutant) -> Code:
    """The modules under test with the mistake put in."""
    made: list[ModuleType] = []
    for module in MODULES:
        source, name = inspect.getsource(module), f"mutant_{module.__name__.rpartition('.')[2]}"
        if module is mutant.module:
            assert source.count(mutant.old) == 1, f"not found once: {mutant.old!r}"
            source = source.replace(mutant.old, mutant.new)
        for original, copy in zip(MODULES, made, strict=False):
            source = source.replace(f"{original.__name__} import", f"{copy.__name__} import")
        spec = importlib.util.spec_from_loader(name, loader=None)
        assert spec is not None
        made.append(importlib.util.module_from_spec(spec))
        sys.modules[name] = made[-1]
        exec(compile(source, name, "exec"), made[-1].__dict__)
    return Code(blocks=made[0], tables=made[1], scheduler=made[-1])


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
