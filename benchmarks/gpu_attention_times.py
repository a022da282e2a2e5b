"""How fast attention is on a GPU: the parts `fast`, `tune` and `tiles` of gpu_attention.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from gpu_attention_steps import head_params, to_fp8
from gpu_session import Session
from gpu_timing import LARGER_THAN_L2
from worker_orcd.kernels.backend import AttentionParams, BatchInputs, LayerCache, Limits
from worker_orcd.kernels.cuda.attend import Attention, Tile
from worker_orcd.kernels.cuda.cache_type import FP8

BLOCK_SIZE = 16
MOST_LAYERS = 24  # caches that a graph goes through
DECODED = ((1, 512), (64, 512), (64, 1024), (16, 4096), (1, 65536))  # rows, tokens in the cache of each
TILED = ((64, 512), (16, 4096))
TILES = ((4, 2, 2), (4, 2, 3), (4, 3, 2), (4, 3, 3), (4, 4, 2), (8, 2, 1), (8, 2, 2), (8, 3, 1), (8, 3, 2))
PROMPTS = (512, 4096)
KV = {"float16": torch.float16, "fp8": FP8}  # types of keys and values
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


def kv_bytes(params: AttentionParams, rows: int, context: int, kv: str) -> int:
    """What the single query of each row sees."""
    seen = min(context, params.window or context)
    return 2 * rows * seen * params.num_kv_heads * params.head_dim * KV[kv].itemsize


def kv_pool(session: Session, params: AttentionParams, blocks: int, layers: int, kv: str) -> list[LayerCache]:
    """Caches of layers, of random numbers: a GPU's clock depends on what it computes with."""
    shape = 2, blocks, params.num_kv_heads, BLOCK_SIZE, params.head_dim
    caches: list[LayerCache] = []
    for _ in range(layers):
        random = torch.empty(shape, dtype=torch.float16, device=session.device).normal_()
        caches.append(LayerCache(to_fp8(random) if KV[kv] == FP8 else random))
    return caches


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
    session: Session, model: Model, step: tuple[int, int, int], kv: str, make: Make | None = None
) -> tuple[float, float]:
    """Microseconds of a layer, and of planning. `step`: rows, queries and context of each."""
    params, (rows, queries, context) = model.params, step
    inputs, limits = inputs_of(session, rows, queries, context)
    attention = make(limits) if make else Attention(session.kernels, limits, cache=KV[kv])
    attention.reserve(params)
    touched = kv_bytes(params, rows, context, kv)
    layers = 2 if queries > 1 else min(MOST_LAYERS, -(-LARGER_THAN_L2 // touched))
    blocks = 1 + inputs.block_tables.numel()
    pool = kv_pool(session, params, blocks, layers, kv)
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
    for kv, model in product(session.args.kv, MODELS):
        session.say(
            f"{model.name}, {kv}: µs of a layer (GB/s of keys and values, share of copy), of planning"
        )
        for rows, context in DECODED:
            layer, planning = times(session, model, (rows, 1, context), kv)
            rate = kv_bytes(model.params, rows, context, kv) / 1000 / layer
            found.append(
                {"model": model.name, "kv": kv, "rows": rows, "context": context, "us": layer,
                 "plan_us": planning, "gb_per_s": rate, "share_of_copy": rate / copy}
            )  # fmt: skip
            session.save("decode", found)
            what = f"{layer:7.1f} ({rate:5.0f}, {rate / copy:4.0%}) {planning:5.1f}"
            session.say(f"  {rows:3} rows at {context:<5} {what}")
        measure_prompts(session, model, kv)


def measure_prompts(session: Session, model: Model, kv: str) -> None:
    params = model.params
    found: dict[int, dict[str, float]] = {}
    for tokens in PROMPTS:
        layer, planning = times(session, model, (1, tokens, tokens), kv)
        window = min(tokens, params.window or tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window  # of a query and a key that it sees
        rate = 4 * params.num_heads * params.head_dim * pairs / layer / 1e6
        found[tokens] = {"us": layer, "plan_us": planning, "tflop_per_s": rate}
        session.save(f"prompts {model.name} {kv}", found)
        session.say(f"  prompt of {tokens:<6} {layer:7.1f} ({rate:5.0f} TFLOP/s) {planning:12.1f}")


def tune(session: Session) -> None:
    """Times by what planning takes a unit, and a row in parts, to cost."""
    costs = ((4.0, 4.0), (2.0, 2.0), (8.0, 4.0), (4.0, 8.0), (1.0, 8.0), (4.0, 1e9))
    ways = {
        f"start {start:g} splitting {split:g}": {"start": start, "splitting": split} for start, split in costs
    }
    compare(session, "tune", ways, MODELS, steps=DECODED)


def tune_tiles(session: Session) -> None:
    """Times of single queries by tile: warps, stages, programs on a multiprocessor."""
    ways: dict[str, dict[str, Any]] = {"as shipped": {}}
    for warps, stages, programs in TILES:
        tile = Tile(rows=64, warps=warps, stages=stages, programs=programs)
        ways[f"{warps}w {stages}s {programs}p"] = {"choose": lambda *_, tile=tile: tile}
    models = [model for model in MODELS if model.params.window is None]
    compare(session, "tiles", ways, models, steps=TILED)


def compare(
    session: Session,
    part: str,
    ways: Mapping[str, Mapping[str, Any]],
    models: Sequence[Model],
    *,
    steps: Sequence[tuple[int, int]],
) -> None:
    """Times of steps of single queries, by how attention is made."""
    found: dict[str, dict[str, float]] = {}
    for kv, model, (rows, context) in product(session.args.kv, models, steps):
        by: dict[str, float] = {}
        for way, options in ways.items():
            make = partial(_attention, session, KV[kv], options)
            by[way] = times(session, model, (rows, 1, context), kv, make)[0]
        found[f"{model.name} {kv} {rows} {context}"] = by
        session.save(part, found)
        best = ", ".join(f"{micro:.1f} {way}" for way, micro in sorted(by.items(), key=lambda one: one[1]))
        session.say(f"  {model.name} {kv} {rows} rows at {context}: {best}")


def _attention(session: Session, cache: torch.dtype, options: Mapping[str, Any], limits: Limits) -> Attention:
    return Attention(session.kernels, limits, cache=cache, **options)
