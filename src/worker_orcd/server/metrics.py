"""What the worker did, for Prometheus, under names that are a contract.

`Metrics` is the engine's StepObserver. Engine and event loop each write their own accumulators (plain
integers and bucket counts, a few hundred nanoseconds an event) and only a scrape makes Prometheus objects of
them, so the hot paths take no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from worker_orcd.engine.messages import GroupBlocks, StepStats
from worker_orcd.server.gpu import gpu_metrics, residency_metrics
from worker_orcd.server.status import Status
from worker_orcd.version import REPRODUCIBILITY_CONTRACT, VERSION

Outcome = Literal["success", "error", "cancelled", "timeout", "rejected"]
OUTCOMES: tuple[Outcome, ...] = ("success", "error", "cancelled", "timeout", "rejected")

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MILLISECONDS = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Histogram:
    """Bucket counts with one writing thread; readers may see an observation's sum before its count."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)  # inclusive upper bounds, ascending
        self.counts = [0] * (len(self.bounds) + 1)  # the last: above every bound
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """As Prometheus wants it: cumulative counts."""
        buckets: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), tuple(self.counts), strict=True):
            seen += count
            buckets.append((bound, seen))
        family = HistogramMetricFamily(name, text)
        family.add_metric([], buckets, self.total)
        return family


class Metrics(Collector):
    """Counters of one worker, its registry, and its observer of engine steps."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._registry = CollectorRegistry(auto_describe=False)
        # Written by the engine thread.
        self._step_seconds = Histogram(_SECONDS)
        self._step_rows = Histogram(_ROWS)
        self._step_tokens = Histogram(_TOKENS)
        self._preempted = 0
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0
        # Written by the event loop.
        self._outcomes: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        self._tokens_in = 0
        self._tokens_generated = 0
        self._inference_ms = Histogram(_MILLISECONDS)
        self._queue_seconds = Histogram(_SECONDS)
        self._ttft_seconds = Histogram(_SECONDS)
        self._itl_seconds = Histogram(_SECONDS)
        self._registry.register(self)

    def on_step(self, stats: StepStats) -> None:
        """Take note of a step. Called on the engine thread."""
        self._step_seconds.observe(stats.seconds)
        self._step_rows.observe(stats.num_rows)
        self._step_tokens.observe(stats.num_tokens)
        self._preempted += stats.num_preempted
        self._prefix_query_tokens += stats.prefix_query_tokens
        self._prefix_hit_tokens += stats.prefix_hit_tokens

    def request_ended(self, outcome: Outcome) -> None:
        """Count a request once, however many sequences it had."""
        self._outcomes[outcome] += 1

    def prompt_accepted(self, num_tokens: int) -> None:
        self._tokens_in += num_tokens

    def first_tokens(self, num_tokens: int, *, queue_seconds: float, ttft_seconds: float) -> None:
        """The first output of a sequence has come."""
        self._tokens_generated += num_tokens
        self._queue_seconds.observe(queue_seconds)
        self._ttft_seconds.observe(ttft_seconds)

    def next_tokens(self, num_tokens: int, seconds: float) -> None:
        """A later output has come, so long after the one before."""
        self._tokens_generated += num_tokens
        self._itl_seconds.observe(seconds / num_tokens)

    def sequence_ended(self, milliseconds: float) -> None:
        """Milliseconds from submission to the last token."""
        self._inference_ms.observe(milliseconds)

    def exposition(self) -> bytes:
        """The body of GET /metrics, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Everything known now. Called by the registry."""
        yield from self._facts()
        requests = CounterMetricFamily("worker_requests", "Requests by how they ended", labels=["outcome"])
        for outcome, count in self._outcomes.items():
            requests.add_metric([outcome], count)
        yield requests
        yield _counter("worker_tokens_in", "Prompt tokens accepted", self._tokens_in)
        yield _counter("worker_tokens_generated", "Tokens generated and delivered", self._tokens_generated)
        yield _counter("worker_preemptions", "Sequences preempted for lack of KV blocks", self._preempted)
        yield self._inference_ms.family(
            "worker_inference_duration_ms", "Submission to last token, milliseconds"
        )
        yield self._queue_seconds.family("worker_queue_time_seconds", "Submission to the first step computed")
        yield self._ttft_seconds.family(
            "worker_time_to_first_token_seconds", "Request received to first token"
        )
        yield self._itl_seconds.family("worker_inter_token_latency_seconds", "Between a sequence's tokens")
        yield self._step_seconds.family("worker_step_duration_seconds", "One engine step")
        yield self._step_rows.family("worker_batch_size", "Sequences computed in one step")
        yield self._step_tokens.family("worker_step_tokens", "Tokens computed in one step")
        yield from self._gauges()
        yield GaugeMetricFamily(
            "worker_paused", "1 while the GPU is left to others", int(self._status.paused is not None)
        )
        yield _counter("worker_pauses", "Times that it was left to them", self._status.num_pauses)
        yield from residency_metrics(self._status.residency)
        yield from gpu_metrics(self._status.gpu)

    def _facts(self) -> Iterator[Metric]:
        status = self._status
        info = {"version": VERSION, "contract": str(REPRODUCIBILITY_CONTRACT), "worker_id": status.worker_id}
        memory = 0
        if (serving := status.serving) is not None:
            info |= {"model": serving.model_id, "quant_kind": serving.facts.quant_kind}
            memory = serving.facts.memory_bytes_used
        yield InfoMetricFamily("worker", "What runs here", value=info)
        yield GaugeMetricFamily("worker_uptime_seconds", "Since the process started", status.uptime_seconds)
        yield GaugeMetricFamily("worker_vram_bytes", "Device memory held (host memory on the CPU)", memory)

    def _gauges(self) -> Iterator[Metric]:
        running, waiting = self.running_and_waiting()
        yield GaugeMetricFamily("worker_requests_running", "Sequences being computed", running)
        yield GaugeMetricFamily("worker_requests_waiting", "Sequences waiting for their first step", waiting)
        yield from self._kv_gauges()
        asked, hit = self._prefix_query_tokens, self._prefix_hit_tokens
        yield _counter("worker_prefix_cache_query_tokens", "Prompt tokens looked up", asked)
        yield _counter("worker_prefix_cache_hit_tokens", "Prompt tokens found", hit)
        yield GaugeMetricFamily(
            "worker_prefix_cache_hit_ratio", "Found of looked up", hit / asked if asked else 0
        )

    def _kv_gauges(self) -> Iterator[Metric]:
        groups = self.kv_groups()
        total, free = sum(group.total for group in groups), sum(group.free for group in groups)
        yield GaugeMetricFamily("worker_kv_blocks_total", "Blocks of the KV cache", total)
        yield GaugeMetricFamily("worker_kv_blocks_free", "Blocks that no sequence holds", free)
        used = max(((group.total - group.free) / group.total for group in groups), default=0)
        yield GaugeMetricFamily(
            "worker_kv_usage_ratio", "Share of KV blocks held, in the group with the largest", used
        )
        totals = GaugeMetricFamily(
            "worker_kv_group_blocks_total", "Of the layers with one sliding window", labels=["window"]
        )
        frees = GaugeMetricFamily(
            "worker_kv_group_blocks_free", "Of those, that no sequence holds", labels=["window"]
        )
        for group in groups:
            window = "none" if group.window is None else str(group.window)
            totals.add_metric([window], group.total)
            frees.add_metric([window], group.free)
        yield totals
        yield frees

    def running_and_waiting(self) -> tuple[int, int]:
        """Admitted sequences, split as the engine's last step left them; (0, 0) when nothing is admitted."""
        serving = self._status.serving
        if serving is None:
            return 0, 0
        running = min(serving.client.num_admitted, serving.snapshot().num_running)
        return running, serving.client.num_admitted - running

    def kv_groups(self) -> tuple[GroupBlocks, ...]:
        """The blocks of the KV cache by cache group; none before the model is loaded."""
        return () if self._status.serving is None else self._status.serving.snapshot().kv_groups


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
