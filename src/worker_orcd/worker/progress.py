"""How far loading has come: for `/health`, for the log, for a bar on a terminal; and the way to stop it."""

from __future__ import annotations

from collections.abc import Callable

from worker_orcd.hub import Progress
from worker_orcd.narration import Narration

LOADING = "loading weights"  # the last stage; those before it fetch and check the file
_FETCH_SHARE = 50.0  # percent of the whole that is over when the weights begin


class LoadStopped(Exception):
    """Loading was given up because the worker is to stop."""


class LoadProgress:
    """A `hub.Progress`. Called on the thread that loads; `stop` on any.

    Tells every quarter of a stage, unless `draw` shows it to a person. `on_percent` gets the whole, 0 to 100,
    when it has grown by one.
    """

    def __init__(
        self, narration: Narration, on_percent: Callable[[float], None], draw: Progress | None = None
    ) -> None:
        self._narration = narration
        self._on_percent = on_percent
        self._draw = draw
        self._quarters: dict[str, int] = {}  # told, by stage
        self._percent = 0.0
        self._stopped = False

    def stop(self) -> None:
        """Make loading raise LoadStopped the next time it reports."""
        self._stopped = True

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._stopped:
            raise LoadStopped
        fraction = min(done / total, 1.0) if total else 0.0
        share = _FETCH_SHARE * fraction
        percent = share if stage != LOADING else _FETCH_SHARE + share
        if percent >= self._percent + 1.0 or (percent > self._percent and fraction == 1.0):
            self._percent = percent
            self._on_percent(percent)
        if self._draw is not None:
            self._draw(stage, done, total)
        else:
            self._tell(stage, fraction)

    def _tell(self, stage: str, fraction: float) -> None:
        reached = int(4 * fraction)
        for quarter in range(self._quarters.get(stage, -1) + 1, reached + 1):
            self._quarters[stage] = quarter
            self._narration.tell(
                "model_load_progress",
                f"{stage[:1].upper()}{stage[1:]}: {25 * quarter} %.",
                stage=stage,
                percent=25 * quarter,
            )
