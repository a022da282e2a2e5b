"""How fast attention is on a GPU: the parts `fast` and `tune` of gpu_attention.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_attention_steps import head_params
from gpu_session import Session
from gpu_timing import LARGER_THAN_L2
from worker_orcd.kernels.backend import AttentionParams, BatchInputs, LayerCache, Limits
from worker_orcd.kernels.cuda.attend import Attention

BLOCK_SIZE = 16
MOST_LAYERS = 24  # caches that a graph goes through
DECODED = ((1, 512), (64, 512), (64, 1024), (16, 4096), (1, 65536))  # rows, tokens in the cache of each
PROMPTS = (512, 4096)
Make = Callable[[Limits], Attention]


@dataclass(frozen=True)
class Model:
    """A kind of layer."""

    name: str
    params: AttentionParams
    sinks: bool = False


MODELS = (
    Model("Qwen2.5-0.5B", head_params(14, 2, 64)),
    Model("Phi-3-mini", head_params(32, 32, 96)),
    Model("Llama-3-8B", head_params(32, 8, 128)),
    Model("gpt-oss-20b", head_params(64, 8, 64), sinks=True),
    Model("gpt-oss-20b window", head_params(64, 8, 64, 128), sinks=True),
)


def kv_bytes(params: AttentionParams, rows: int, context: int) -> int:
    """What the single query of each row sees, in float16."""
    seen = min(context, params.window or context)
    return 2 * rows * seen * params.num_kv_heads * params.head_dim * 2


def kv_pool(session: Session, params: AttentionParams, blocks: int, layers: int) -> list[LayerCache]:
    """Caches of layers, of random numbers: a GPU's clock depends on what it computes with."""
    shape = 2, blocks, params.num_kv_heads, BLOCK_SIZE, params.head_dim
    return [
        LayerCache(torch.empty(shape, dtype=torch.float16, device=session.device).normal_())
        for _ in range(layers)
    ]


def inputs_of(session: Session, rows: int, queries: int, context: int) -> tuple[BatchInputs, Limits]:
    """Rows alike, their blocks at random places."""
    per_row = -(-context // BLOCK_SIZE)
    order = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(rows)) + 1

    def of(values: torch.Tensor) -> torch.Tensor:
        return values.int().to(session.device)

    nothing = torch.zeros(0, dtype=torch.int32)
    inputs = BatchInputs(
        token_ids=nothing, positions=nothing, slots=nothing, logit_tokens=nothing,
        query_start=of(torch.arange(rows + 1) * queries), context_lens=of(torch.full((rows,), context)),
        block_tables=of(order.view(1, rows, per_row)),
    )  # fmt: skip
    limits = Limits(
        max_tokens=rows * queries, max_rows=rows, max_blocks_per_row=per_row, block_size=BLOCK_SIZE
    )
    return inputs, limits


def times(
    session: Session, model: Model, rows: int, queries: int, context: int, make: Make | None = None
) -> tuple[float, float]:
    """Microseconds of a layer, and of planning a step of such layers."""
    params = model.params
    inputs, limits = inputs_of(session, rows, queries, context)
    attention = make(limits) if make else Attention(session.kernels, limits)
    attention.reserve(params)
    touched = kv_bytes(params, rows, context)
    layers = 2 if queries > 1 else min(MOST_LAYERS, -(-LARGER_THAN_L2 // touched))
    blocks = 1 + inputs.block_tables.numel()
    pool = kv_pool(session, params, blocks, layers)
    q = session.random(rows * queries, params.num_heads * params.head_dim).half()
    out = torch.empty_like(q)
    sinks = session.random(params.num_heads) if model.sinks else None
    plans = attention.plans(inputs, rows * queries)
    planning = session.microseconds(plans * 8)
    for plan in plans:
        plan()
    layer = session.microseconds(
        [partial(attention.run, q, cache, inputs, out, params, sinks) for cache in pool * 2]
    )
    return layer, planning


def measure(session: Session) -> None:
    copy = session.copy_bandwidth()
    found: list[dict[str, Any]] = []
    for model in MODELS:
        session.say(f"{model.name}: µs of a layer (GB/s of keys and values, share of copy), of planning")
        for rows, context in DECODED:
            layer, planning = times(session, model, rows, 1, context)
            rate = kv_bytes(model.params, rows, context) / 1000 / layer
            found.append(
                {"model": model.name, "rows": rows, "context": context, "us": layer, "plan_us": planning,
                 "gb_per_s": rate, "share_of_copy": rate / copy}
            )  # fmt: skip
            session.save("decode", found)
            what = f"{layer:7.1f} ({rate:5.0f}, {rate / copy:4.0%}) {planning:5.1f}"
            session.say(f"  {rows:3} rows at {context:<5} {what}")
        measure_prompts(session, model)


def measure_prompts(session: Session, model: Model) -> None:
    params = model.params
    found: dict[int, dict[str, float]] = {}
    for tokens in PROMPTS:
        layer, planning = times(session, model, 1, tokens, tokens)
        window = min(tokens, params.window or tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window  # of a query and a key that it sees
        rate = 4 * params.num_heads * params.head_dim * pairs / layer / 1e6
        found[tokens] = {"us": layer, "plan_us": planning, "tflop_per_s": rate}
        session.save(f"prompts {model.name}", found)
        session.say(f"  prompt of {tokens:<6} {layer:7.1f} ({rate:5.0f} TFLOP/s) {planning:12.1f}")


def tune(session: Session) -> None:
    """Times by what planning takes a unit, and a row in parts, to cost."""
    found: dict[str, dict[str, float]] = {}
    for model in MODELS:
        for rows, context in DECODED:
            by: dict[str, float] = {}
            for start, splitting in ((4.0, 4.0), (2.0, 2.0), (8.0, 4.0), (4.0, 8.0), (1.0, 8.0), (4.0, 1e9)):
                make = partial(_attention, session, start, splitting)
                by[f"start {start:g} splitting {splitting:g}"] = times(
                    session, model, rows, 1, context, make
                )[0]
            found[f"{model.name} {rows} {context}"] = by
            session.save("tune", found)
            best = ", ".join(
                f"{micro:.1f} {what}" for what, micro in sorted(by.items(), key=lambda one: one[1])
            )
            session.say(f"  {model.name} {rows} rows at {context}: {best}")


def _attention(session: Session, start: float, splitting: float, limits: Limits) -> Attention:
    return Attention(session.kernels, limits, start=start, splitting=splitting)
