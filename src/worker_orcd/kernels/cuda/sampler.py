"""
Drawing the tokens of a step on a GPU.

A step is `prepare`, `upload`, `launch`, `download`, `results`. A second may be begun before the results of
the first are taken; nothing but `results` waits then. `launch` may be captured in a CUDA graph: what it is
given in a step is read from device memory. Rows beyond a step's draws are skipped. The rules are those of
`runner.sampler`, which gives the same tokens but where rounding decides.

A step of several rounds is launched as often; what each draws goes to a slot of its own, the last to the
first, and comes to the host at once. What a step has drawn stays where it is until the next one draws: there
penalties find the tokens that the host did not know, those of the step before and of the rounds before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels
from worker_orcd.kernels.cuda.draw_slab import (
    CHUNK,
    GROUPS,
    LIMITS,
    MAX_DRAWS,
    MAX_VOCAB,
    NONE_LEFT,
    OK,
    ROUNDS,
    DrawSlab,
    Wanted,
    entries_needed,
    entry_bytes,
    parameter_bytes,
)
from worker_orcd.kernels.cuda.inputs import HostSide
from worker_orcd.kernels.draw import Draw, no_numbers, none_left
from worker_orcd.sequence import MAX_LOGPROBS, RowFailure, RowResult, SampledToken

CAPACITY = 4096  # tokens that a list of what filters may keep has room for
_FEW_PROGRAMS = 1024  # of a kernel that most rows do not need
WARPS = 8  # of every kernel: fixes the order in which the sums of chunks are added
_UNIT = 2.0**-44  # of a weight, see `sampling`

_TYPES = {
    "logits": "*fp32", "ints": "*i64", "reals": "*fp64", "entries": "*i32", "entry_reals": "*fp32",
    "saved": "*fp32", "chunk_max": "*fp32", "chunk_sum": "*i64", "group_max": "*fp32", "group_sum": "*i64",
    "floors": "*i32", "counts": "*i32", "highs": "*fp32", "masses": "*fp64", "values": "*fp32", "ids": "*i32",
    "more_counts": "*i32", "limits": "*i32", "sums": "*i64", "ends": "*i32", "lasts": "*i32",
    "tokens": "*i32", "statuses": "*i32", "token_logits": "*fp32", "top_ids": "*i32", "top_logits": "*fp32",
    "drawn": "*i32", "stride": "i32",
}  # fmt: skip
_STATS = "logits ints reals chunk_max chunk_sum group_max group_sum stride"
_FLOOR = "ints reals chunk_max group_max group_sum floors counts highs masses more_counts sums"
_COLLECT = "logits ints chunk_max group_max floors counts values ids stride"
_TALLY = "logits ints reals chunk_max floors counts highs masses limits sums stride"
_BETWEEN = (
    "logits ints reals chunk_max group_max floors counts masses limits sums more_counts values ids stride"
)
_DRAW = "logits ints reals chunk_max chunk_sum counts ends lasts tokens statuses stride"
# Module, function, arguments in order, constants beside those that all have. Those named raw are for log
# probabilities, see `DeviceSampler.launch`.
_KERNELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "stats": ("sampling", "chunk_stats", _STATS, {"RAW": False, "BY_GROUP": False}),
    "stats by group": ("sampling", "chunk_stats", _STATS, {"RAW": False, "BY_GROUP": True}),
    "raw stats": ("sampling", "chunk_stats", _STATS, {"RAW": True, "BY_GROUP": True}),
    "draw": ("sampling", "draw", _DRAW, {"FILTERS": False}),
    "draw what is kept": ("sampling", "draw", _DRAW, {"FILTERS": True}),
    "count drawn": ("sampling", "count_drawn", "drawn ints entries", {}),
    "adjust": ("sampling", "adjust", "logits ints reals entries entry_reals saved stride", {}),
    "finish": ("sampling", "finish", "logits ints entries saved tokens statuses token_logits stride", {}),
    "find floor": ("filtering", "find_floor", _FLOOR, {"RAW": False}),
    "raw find floor": ("filtering", "find_floor", _FLOOR, {"RAW": True}),
    "collect": ("filtering", "collect", _COLLECT, {"RAW": False}),
    "raw collect": ("filtering", "collect", _COLLECT, {"RAW": True}),
    "choose": (
        "filtering", "choose", "ints reals floors counts highs masses values ids tokens statuses", {},
    ),
    "raw list top": (
        "filtering", "list_top", "logits ints counts values ids top_ids top_logits stride", {},
    ),
    "tally": ("cutting", "tally", _TALLY, {"ROUND": 0}),
    "tally again": ("cutting", "tally", _TALLY, {"ROUND": 1}),
    "collect between": ("cutting", "collect_between", _BETWEEN, {}),
    "cut": (
        "cutting", "cut",
        "ints reals floors counts highs masses limits sums more_counts values ids ends lasts", {},
    ),
    "cut long": (
        "cutting", "cut_long", "logits ints reals counts highs masses more_counts ends lasts stride", {},
    ),
    "cut stats": (
        "cutting", "cut_stats", "logits ints reals chunk_max chunk_sum counts highs ends lasts stride", {},
    ),
}  # fmt: skip
_WITHOUT_VOCAB = ("adjust", "count_drawn")
_WITH_CHUNKS = ("draw", "find_floor")
_WITHOUT_CAPACITY = ("chunk_stats", "adjust", "count_drawn", "finish", "find_floor")


def padded_rows(max_rows: int) -> int:
    """Rows of every array: so many that each begins at a multiple of 16 bytes."""
    return -(-max_rows // 4) * 4


def sampling_kernels(vocab_size: int, max_rows: int, *, aligned: bool = True) -> dict[str, Kernel]:
    """All kernels for a vocabulary. `aligned`: the logits and their rows begin at multiples of 16."""
    chunks = -(-vocab_size // CHUNK)

    def constants(function: str, more: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {} if function in _WITHOUT_VOCAB else {"VOCAB": vocab_size}
        found["ROWS"] = padded_rows(max_rows)
        if function in _WITH_CHUNKS:
            found["CHUNKS_PADDED"] = 1 << (chunks - 1).bit_length()
        if function not in _WITHOUT_CAPACITY:
            found["CAPACITY"] = CAPACITY
        return found | more

    return {
        name: Kernel(
            module=module,
            function=function,
            arguments=tuple((argument, _TYPES[argument]) for argument in arguments.split()),
            constants=tuple(constants(function, more).items()),
            aligned=("stride",) if aligned else (),
            loose=() if aligned else ("logits",),
            warps=WARPS,
        )
        for name, (module, function, arguments, more) in _KERNELS.items()
    }


class _Results:
    """Where the results of every other step come to on the host. Arrays are (slots, rows) or wider."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.side = HostSide(_result_bytes(rows), device)
        views = _result_views(self.side.buffer, rows)
        self.found = {name: view.numpy() for name, view in views.items()}


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A step whose results are being copied to the host."""

    draws: list[Draw | None]
    failures: dict[int, RowFailure]
    results: _Results
    num_rounds: int


class DeviceSampler:
    """Draws on the current stream of one device, step after step. Allocates when built, and never again.

    Many very long rows with penalties may have more entries than there is room for, see
    `draw_slab.entries_needed`: then the last of them fail.
    """

    def __init__(self, kernels: Kernels, vocab_size: int, max_rows: int, longest: int = 0) -> None:
        """`longest`: tokens that a row may have."""
        if not 1 <= vocab_size <= MAX_VOCAB:
            raise ValueError(f"a vocabulary of {vocab_size}; 1 to {MAX_VOCAB} can be sampled from")
        self._kernels, self.vocab_size, self.max_rows = kernels, vocab_size, max_rows
        self._chunks = -(-vocab_size // CHUNK)
        device, rows = kernels.device, padded_rows(max_rows)
        self._of = {flag: sampling_kernels(vocab_size, max_rows, aligned=flag) for flag in (False, True)}
        self._slab = DrawSlab(vocab_size, rows, device, entries_needed(vocab_size, max_rows, longest))
        self._scratch = {
            name: torch.zeros(size, dtype=dtype, device=device)
            for name, (size, dtype) in _scratch_sizes(vocab_size, rows).items()
        }
        self._brief = 8 * rows * MAX_DRAWS  # bytes of tokens and statuses
        self._host_results = [_Results(rows, device) for _ in range(2)]
        self._results = torch.zeros(_result_bytes(rows), dtype=torch.uint8, device=device)
        self._views = _result_views(self._results, rows)
        self._arguments = [self._arguments_of(slot) for slot in range(MAX_DRAWS)]
        self._plain: dict[int, SampledToken] = {}  # those without log probabilities, made once
        self._drawn: deque[_Drawn] = deque()  # whose results nobody has taken, the oldest first
        self._draws: list[Draw | None] = []
        self._failures: dict[int, RowFailure] = {}
        self._wanted = Wanted()
        self._named: dict[str, list[torch.Tensor]] = {}  # arguments of the slot of the launch

    @staticmethod
    def device_bytes(vocab_size: int, max_rows: int, longest: int = 0) -> int:
        """What one takes on the device."""
        rows = padded_rows(max_rows)
        scratch = sum(size * dtype.itemsize for size, dtype in _scratch_sizes(vocab_size, rows).values())
        entries = entry_bytes(entries_needed(vocab_size, max_rows, longest))
        return scratch + _result_bytes(rows) + parameter_bytes(rows) + entries

    @property
    def allocated_bytes(self) -> int:
        slab = self._slab
        arrays = (*self._scratch.values(), self._results, slab.ints, slab.reals, slab.entries, slab.saved)
        return sum(array.nbytes for array in arrays)

    @property
    def token_ids(self) -> torch.Tensor:
        """(slots, rows) int32 on the device: the tokens of the last step; where a row failed, any token."""
        return self._views["tokens"]

    @property
    def ints(self) -> torch.Tensor:
        """`draw_slab.Int` of each row, int64, on the device."""
        return self._slab.ints

    def prepare(self, draws: Sequence[Draw | None]) -> Wanted:
        """Note what the rows of a step are drawn with, None for rows that have no logits."""
        self._draws = list(draws)
        self._wanted, self._failures = self._slab.fill([draw for draw in draws if draw is not None])
        return self._wanted

    def upload(self) -> None:
        """Start the copy of what was prepared."""
        self._slab.upload()

    def launch(self, logits: torch.Tensor, wanted: Wanted, slot: int = 0, behind: int = 0) -> None:
        """Draw: a row of `logits` (rows, vocab_size) float32 for each draw that is not None, and maybe more.

        What is drawn goes to `slot`: that of round i of n is n - 1 - i. What was drawn last is in `behind`:
        the slot of the round before, and 0 in a step's first round.
        Logits are changed meanwhile where `wanted.adjusts`, and back when it is done.
        """
        rows = len(logits)
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows of logits, but there is room for {self.max_rows}")
        by_chunk, by_row = (self._chunks, rows, 1), (rows, 1, 1)
        if wanted.counts:
            self._named = self._arguments[behind]
            self._run("count drawn", by_row, logits)
        self._named = self._arguments[slot]
        if wanted.logprobs:
            self._run("raw stats", by_chunk, logits)
            self._run("raw find floor", by_row, logits)
            self._run("raw collect", by_chunk, logits)
            self._run("raw list top", by_row, logits)
        if wanted.adjusts:
            self._run("adjust", by_row, logits)
        if wanted.filters:
            self._run("stats by group", by_chunk, logits)
            self._run("find floor", by_row, logits)
            self._run("collect", by_chunk, logits)
            self._run("choose", by_row, logits)
            few = (max(1, min(self._chunks, _FEW_PROGRAMS // rows)), rows, 1)
            self._run("tally", few, logits)
            self._run("tally again", few, logits)
            self._run("collect between", few, logits)
            self._run("cut", by_row, logits)
            self._run("cut long", by_row, logits)
            self._run("cut stats", few, logits)
            self._run("draw what is kept", by_row, logits)
        else:
            self._run("stats", by_chunk, logits)
            self._run("draw", by_row, logits)
        if wanted.adjusts or wanted.logprobs:
            self._run("finish", by_row, logits)

    def launch_all(self, logits: torch.Tensor) -> None:
        """Every kernel once, while nothing is drawn: to compile them, or load them onto the device."""
        for filters in (False, True):
            self.launch(logits, Wanted(adjusts=True, counts=True, filters=filters, logprobs=True))

    def _arguments_of(self, slot: int) -> dict[str, list[torch.Tensor]]:
        """Which arrays each kernel is given, beside the logits."""
        slab, views = self._slab, {name: view[slot] for name, view in self._views.items()}
        named = self._scratch | {
            "ints": slab.ints, "reals": slab.reals, "entries": slab.entries, "entry_reals": slab.entries,
            "saved": slab.saved, "tokens": views["tokens"], "statuses": views["statuses"],
            "token_logits": views["token_logits"], "top_ids": views["top_ids"],
            "top_logits": views["top_logits"], "drawn": views["tokens"],
        }  # fmt: skip
        raw = named | {"highs": views["highs"], "masses": views["masses"]}
        return {
            name: [
                (raw if name.startswith("raw") else named)[argument]
                for argument in arguments.split()
                if argument not in ("logits", "stride")
            ]
            for name, (_, _, arguments, _) in _KERNELS.items()
        }

    def _run(self, name: str, grid: Grid, logits: torch.Tensor) -> None:
        stride = logits.stride(0)
        kernel = self._of[stride % 16 == 0 and logits.data_ptr() % 16 == 0][name]
        if kernel.arguments[0][0] == "logits":
            self._kernels.launch(kernel, grid, logits, *self._named[name], stride)
        else:
            self._kernels.launch(kernel, grid, *self._named[name])

    def download(self, num_rounds: int = 1) -> None:
        """Start the copy of what was drawn. The results of all steps but the last must have been taken."""
        results = self._host_results[0]
        self._host_results.reverse()
        size = len(self._results) if self._wanted.logprobs else self._brief
        results.side.buffer[:size].copy_(self._results[:size], non_blocking=True)
        results.side.queued()
        self._drawn.append(_Drawn(self._draws, self._failures, results, num_rounds))

    def results(self) -> list[RowResult]:
        """Wait for what was drawn, once a `download`, in order: `count` entries a draw, None for None."""
        drawn = self._drawn.popleft()
        drawn.results.side.wait()
        found, last = drawn.results.found, drawn.num_rounds - 1
        tokens: list[list[int]] = found["tokens"][last::-1].T.tolist()  # by row, then by round
        statuses: list[list[int]] = found["statuses"][last::-1].T.tolist()
        results: list[RowResult] = []
        row = 0
        for draw in drawn.draws:
            if draw is None:
                results.append(None)
                continue
            if row in drawn.failures:
                results += [drawn.failures[row]] * draw.count
            else:
                for number in range(draw.count):
                    token_id, status = tokens[row][number], statuses[row][number]
                    if status != OK:
                        results.append(none_left() if status == NONE_LEFT else no_numbers())
                    elif draw.params.logprobs is None:
                        results.append(self._plain.get(token_id) or self._made(token_id))
                    else:
                        of_round = {name: values[last - number, row] for name, values in found.items()}
                        results.append(self._with_logprobs(of_round, token_id, draw.params.logprobs))
            row += 1
        return results

    def _made(self, token_id: int) -> SampledToken:
        made = self._plain[token_id] = SampledToken(token_id)
        return made

    def _with_logprobs(
        self, found: dict[str, NDArray[Any]], token_id: int, count: int
    ) -> SampledToken | RowFailure:
        """`found`: the results of one draw."""
        highest = float(found["highs"])
        if not math.isfinite(highest):
            return no_numbers()
        normaliser = highest + math.log(float(found["masses"]) * _UNIT)
        count = min(count, self.vocab_size)
        ids = found["top_ids"][:count].tolist()
        values = found["top_logits"][:count].tolist()
        return SampledToken(
            token_id=token_id,
            logprob=float(found["token_logits"]) - normaliser,
            top_logprobs=tuple((index, value - normaliser) for index, value in zip(ids, values, strict=True)),
        )


def _scratch_sizes(vocab_size: int, rows: int) -> dict[str, tuple[int, torch.dtype]]:
    chunks = -(-vocab_size // CHUNK)
    return {
        "chunk_max": (rows * chunks, torch.float32),
        "chunk_sum": (rows * chunks, torch.int64),
        "group_max": (rows * chunks * GROUPS, torch.float32),
        "group_sum": (rows * chunks * GROUPS, torch.int64),
        "floors": (rows, torch.int32),
        "counts": (rows, torch.int32),
        "highs": (rows, torch.float32),
        "masses": (rows, torch.float64),
        "values": (rows * CAPACITY, torch.float32),
        "ids": (rows * CAPACITY, torch.int32),
        "more_counts": (rows, torch.int32),
        "limits": (rows * ROUNDS * LIMITS, torch.int32),
        "sums": (rows * ROUNDS * LIMITS, torch.int64),
        "ends": (rows, torch.int32),
        "lasts": (rows, torch.int32),
    }


_RESULTS = (
    ("tokens", torch.int32, 1),
    ("statuses", torch.int32, 1),
    ("token_logits", torch.float32, 1),
    ("highs", torch.float32, 1),
    ("masses", torch.float64, 1),
    ("top_ids", torch.int32, MAX_LOGPROBS),
    ("top_logits", torch.float32, MAX_LOGPROBS),
)


def _result_bytes(rows: int) -> int:
    return sum(MAX_DRAWS * rows * dtype.itemsize * width for _, dtype, width in _RESULTS)


def _result_views(buffer: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """Arrays by slot and row, one after the other; the first two are all that most steps want."""
    views: dict[str, torch.Tensor] = {}
    start = 0
    for name, dtype, width in _RESULTS:
        end = start + MAX_DRAWS * rows * dtype.itemsize * width
        view = buffer[start:end].view(dtype)
        views[name] = view.view(MAX_DRAWS, rows, width) if width > 1 else view.view(MAX_DRAWS, rows)
        start = end
    return views
