"""A step while the scheduler makes it, and the step that it becomes."""

from __future__ import annotations

from worker_orcd.sequence import Row, Sequence, Step

_UNBOUNDED = 1 << 31


class StepPlan:
    """The step being made: who computes how much, what is left of the budget, what to tell the observer."""

    def __init__(self, budget: int, *, ahead: bool = False) -> None:
        self.budget = budget
        self.ahead = ahead  # behind a step that is under way
        self.num_rounds = 1  # of the step, once it is made
        self.num_tokens = 0  # likewise, of all rounds
        self.rows: dict[Sequence, int] = {}  # in the order of the step
        self.num_preempted = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.num_prompt_tokens = 0
        self.num_sampled = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.rows[sequence] = num_tokens
        self.budget -= num_tokens

    def enlarge(self, sequence: Sequence, num_tokens: int) -> None:
        """Make a row as long as that."""
        self.budget -= num_tokens - self.rows[sequence]
        self.rows[sequence] = num_tokens

    def share(self, wanted: int, *, others_behind: bool) -> int:
        """All that is wanted if it fits, else half of the budget if others want some too, else all."""
        return min(wanted, -(-self.budget // 2) if wanted > self.budget and others_behind else self.budget)

    def remove(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        self.budget += self.rows.pop(sequence, 0)


def start(plan: StepPlan, max_rounds: int) -> Step:
    """The step that was planned; its sequences are told that it is under way."""
    rows: list[Row] = []
    num_drawing = 0
    for sequence, num_tokens in plan.rows.items():
        previous = sequence.draw_index if sequence.num_draws_under_way else None
        samples = num_tokens == sequence.num_unscheduled_tokens
        num_draws = min(max_rounds, sequence.num_undrawn_tokens) if samples else 0
        row = Row(sequence, num_tokens, sequence.num_scheduled_tokens, num_draws, previous)
        rows.append(row)
        plan.num_rounds = max(plan.num_rounds, num_draws)
        plan.num_tokens += row.num_computed
        sequence.num_scheduled_tokens += row.num_computed
        sequence.num_steps_under_way += 1
        if samples:
            sequence.num_draws_under_way += num_draws
            sequence.draw_index = num_drawing
            num_drawing += 1
    return Step(tuple(rows))


def max_draws_of(sequence: Sequence) -> int:
    """How many tokens can be drawn of it before which tokens may be drawn changes."""
    num_left = sequence.num_undrawn_tokens
    num_excluding = sequence.min_tokens - (sequence.max_tokens - num_left)  # draws that no stop token may be
    if sequence.stop_token_ids and 0 < num_excluding < num_left:
        return num_excluding
    return _UNBOUNDED
