"""
What a soak found against what is promised: every function says what is broken, nothing where nothing is.

Plain data in, sentences out, so that each can be shown what must fail.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crowd import percentile
from soak_clients import ABSENT, Ledger
from soak_probe import Look, Sample

MIB = 1 << 20
FEWEST_SAMPLES = 5  # one of each fifth
MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Limits:
    """What is promised."""

    health_p99_ms: float = 10.0
    rss_percent: float = 5.0
    grace_seconds: float = 30.0


@dataclass
class Log:
    """What the worker's own log says of jobs and faults."""

    outcomes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by correlation id
    faults: list[str] = field(default_factory=list[str])
    last: str = ""


def read_log(text: str) -> Log:
    """Lines of JSON, as `--narration json` writes them; anything else is a fault, and so is a warning once
    the worker is ready.
    """
    log = Log()
    for line in text.splitlines():
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            log.faults.append(line[:300])
            continue
        log.last = event["event"]
        if "outcome" in event:
            log.outcomes[event["correlation_id"]].append(event["outcome"])
        if log.last == "ready":
            log.faults.clear()
        if event["level"] not in ("info", "debug"):
            log.faults.append(f"{event['level']}: {event['sentence'][:300]}")
    return log


# -- jobs --------------------------------------------------------------------------------------------------


def wrong_ends(ledger: Ledger, log: Log, counted: Mapping[str, int]) -> list[str]:
    """Each job has one end: the one that its client saw, that the log tells and that /metrics counts."""
    several = [name for name, outcomes in log.outcomes.items() if len(outcomes) != 1]
    strange = [name for name in log.outcomes if name not in ledger.may_be]
    lost, other = [], []
    for name, may_be in ledger.may_be.items():
        told = log.outcomes.get(name, [ABSENT])[0]
        if told not in may_be:
            (other if told else lost).append(name)
    found = [
        f"{len(names)} jobs {what}: {', '.join(names[:MOST_EXAMPLES])}"
        for names, what in (
            (several, "ended more than once"),
            (strange, "ended that nobody asked for"),
            (lost, "that clients saw end are not in the log"),
            (other, "ended in another way than their clients were told"),
        )
        if names
    ]
    told = Counter(outcome for outcomes in log.outcomes.values() for outcome in outcomes)
    for outcome in ("success", "error", "cancelled", "timeout"):
        if counted[outcome] != told[outcome]:
            found.append(f"/metrics counts {counted[outcome]} of {outcome}, the log tells {told[outcome]}")
    if counted["rejected"] < told["rejected"]:
        found.append(f"/metrics counts {counted['rejected']} rejected, the log tells {told['rejected']}")
    return found


def wrong_answers(ledger: Ledger) -> list[str]:
    found = [f"{ledger.num_wrong} times a client was told what is wrong"] if ledger.num_wrong else []
    found += ledger.wrong[:MOST_EXAMPLES]
    if not ledger.counts["compared, greedy"]:
        found.append("no greedy answer was compared with the one alone")
    return found


def too_calm(samples: Sequence[Sample], max_queue: int, num_refused: int) -> list[str]:
    """A soak without overload shows nothing."""
    if num_refused and any(one.running + one.waiting >= max_queue * 0.9 for one in samples):
        return []
    return ["the queue was never full: more clients are needed"]


# -- what is left ------------------------------------------------------------------------------------------


def leaks(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Bodies of /health of an idle worker: every block and every seat has come back."""
    found = [f"{after[name]} are still {name}" for name in ("running", "waiting") if after[name]]
    for group in after["kv_groups"]:
        if group["free"] != group["total"]:
            which = "" if group["window"] is None else f" of window {group['window']}"
            found.append(f"{group['total'] - group['free']} of {group['total']} blocks{which} are leaked")
    if after["kv_blocks_free"] != before["kv_blocks_free"]:
        found.append(
            f"{after['kv_blocks_free']} blocks are free, {before['kv_blocks_free']} were at the start"
        )
    if (after["status"], after["state"]) != ("healthy", "ready"):
        found.append(f"the worker is {after['status']} and {after['state']}: {after.get('degraded')}")
    return found


def left_open(before: Look, after: Look) -> list[str]:
    """Connections, threads and files of the idle process."""
    found = [f"{after.connections} connections are still open"] if after.connections else []
    for name in ("threads", "files"):
        was, now = getattr(before, name), getattr(after, name)
        if now != was:
            found.append(f"{now} {name}, {was} at the start")
    return found


def fifths(samples: Sequence[Sample], of: Callable[[Sample], float]) -> list[float]:
    """The median of each fifth of the time."""
    values = [of(sample) for sample in samples]
    cuts = [len(values) * k // 5 for k in range(6)]
    return [statistics.median(values[a:b]) for a, b in itertools.pairwise(cuts)]


def growth(samples: Sequence[Sample], limit_percent: float) -> list[str]:
    """Of the resident memory, from the second fifth (the first warms up) to the last."""
    if len(samples) < FEWEST_SAMPLES:
        return [f"there are only {len(samples)} samples of the memory"]
    medians = fifths(samples, lambda one: one.rss)
    percent = 100 * (medians[4] / medians[1] - 1)
    if abs(percent) <= limit_percent:
        return []
    told = " ".join(f"{value / MIB:.1f}" for value in medians)
    return [f"resident memory changed by {percent:+.1f} %, at most {limit_percent:g} are allowed: {told} MiB"]


def device_changes(bodies: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> list[str]:
    """Device memory stays as it is, to the byte, from the bodies of /health before and after to the samples
    between them. The driver counts what everybody takes: nobody else may use the GPU.
    """
    found: list[str] = []
    told = [(body["vram_bytes_used"], body["gpu"].get("memory_used_bytes")) for body in bodies]
    told += [(sample.device_bytes, sample.gpu_bytes) for sample in samples]
    for values, who in zip(map(set, zip(*told, strict=True)), ("the worker", "the driver"), strict=True):
        if None in values:
            found.append(f"{who} does not tell how much device memory is taken")
        elif len(values) > 1:
            sizes = f"{min(values)} to {max(values)} bytes"
            found.append(f"{who} told of {len(values)} sizes of device memory: {sizes}")
    return found


# -- time --------------------------------------------------------------------------------------------------


def spread_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum, milliseconds."""
    values = list(seconds)
    if not values:
        return {}
    found = {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)}
    return {name: round(1000 * value, 2) for name, value in found.items()}


def health_of(samples: Sequence[Sample]) -> dict[str, float]:
    return spread_ms(one for sample in samples for one in sample.health)


def echo_of(samples: Sequence[Sample]) -> dict[str, float]:
    return spread_ms(one for sample in samples for one in sample.echo)


def slow_health(samples: Sequence[Sample], limit_ms: float) -> list[str]:
    told, echo = health_of(samples), echo_of(samples)
    if not told:
        return ["/health was never asked"]
    if told["p99"] < limit_ms:
        return []
    beside = f"of an echo server beside it {echo.get('p99', 0.0):.1f}"
    return [f"/health p99 is {told['p99']:.1f} ms, not below {limit_ms:g}; {beside}"]


def bad_end(code: int | None, seconds: float, limits: Limits, log: Log) -> list[str]:
    """SIGTERM to an idle worker, and what it wrote until then."""
    found: list[str] = []
    if code != 0:
        found.append(f"the exit status after SIGTERM is {code}")
    if seconds > limits.grace_seconds:
        found.append(f"SIGTERM to exit took {seconds:.1f} s, {limits.grace_seconds:g} are granted")
    if log.last != "shutdown":
        found.append(f"the last event of the log is {log.last!r}")
    if log.faults:
        found.append(f"{len(log.faults)} faults are in the log")
        found += log.faults[:MOST_EXAMPLES]
    return found
