"""How fast the experts of some models are on a GPU: the parts `fast` and `tune` of gpu_experts.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_session import Session
from gpu_weights import packed_tiles
from worker_orcd.kernels.backend import Glu
from worker_orcd.kernels.cuda.expert_products import MAX_PAIR_TOKENS, ExpertProducts, Order, choose_width
from worker_orcd.kernels.cuda.expert_weights import PackedExperts, expert_shape
from worker_orcd.kernels.cuda.launch import Products
from worker_orcd.kernels.cuda.variants import Tile, shape_of
from worker_orcd.kernels.cuda.weights import upload

WIDTHS = (16, 32, 64, 128)
ROUTINGS = 8  # that a timed graph goes through
FEW, MANY = (1, 2, 4, 8, 12, 16, 24, 32), (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Model:
    """The experts of a layer."""

    name: str
    num_experts: int
    slots: int
    dim: int  # of one expert
    hidden: int
    gate_up: str  # format
    down: str
    glu: Glu
    bias: bool


MODELS = (
    Model("gpt-oss-20b", 32, 4, 2880, 2880, "MXFP4", "MXFP4", Glu.CLAMPED_SWIGLU, True),
    Model("Qwen3-30B-A3B", 128, 8, 768, 2048, "Q4_K", "Q6_K", Glu.SWIGLU, False),
)


def random_experts(
    tokens: int, slots: int, num_experts: int, seed: int, device: torch.device
) -> torch.Tensor:
    """(tokens, slots), the slots of a token different."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    chosen = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :slots]
    return chosen.int().contiguous().to(device)


def timed_weight(
    session: Session, name: str, num_experts: int, n: int, k: int, paired: bool, bias: bool
) -> PackedExperts:
    """All tiles alike: packing different ones takes long."""
    rows = num_experts * -(-n // 64) * 64
    packed = torch.from_numpy(packed_tiles(name, rows, k)).to(session.device)
    values = session.random(num_experts, n) if bias else None
    matrix = upload(expert_shape(name, n, k), rows, packed)
    return PackedExperts(matrix=matrix, num_experts=num_experts, n=n, paired=paired, bias=values)


def bytes_of(weight: PackedExperts) -> float:
    return weight.matrix.num_bytes / weight.num_experts


class Layer:
    """A model's experts, and steps of some number of tokens through routings that change."""

    def __init__(self, session: Session, model: Model) -> None:
        self.session, self.model = session, model
        m = model
        self.gate_up: PackedExperts = session.once(
            (m.name, "gate_up"),
            lambda: timed_weight(session, m.gate_up, m.num_experts, 2 * m.dim, m.hidden, True, m.bias),
        )
        self.down: PackedExperts = session.once(
            (m.name, "down"),
            lambda: timed_weight(session, m.down, m.num_experts, m.hidden, m.dim, False, m.bias),
        )
        self.sorters = [ExpertProducts(session.kernels) for _ in range(ROUTINGS)]  # an order each
        self.products = self.sorters[0]
        for one in self.sorters:
            one.reserve(self.down, max(MANY), m.slots)
        for weight in (self.gate_up, self.down):
            self.products.reserve(weight, 4 * MAX_PAIR_TOKENS, 4 * m.slots)

    def routings(self, tokens: int) -> list[torch.Tensor]:
        """A single token's do not meet before all experts were chosen."""
        m = self.model
        if tokens == 1:
            every = torch.randperm(m.num_experts, generator=torch.Generator().manual_seed(1)).int()
            parts = every[: m.num_experts // m.slots * m.slots].view(-1, 1, m.slots)[:ROUTINGS]
            return [part.contiguous().to(self.session.device) for part in parts]
        count = ROUTINGS if tokens <= 64 else 2
        return [
            random_experts(tokens, m.slots, m.num_experts, seed, self.session.device) for seed in range(count)
        ]

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m, session = self.model, self.session
        x = session.random(tokens, m.hidden).to(self.gate_up.operand)
        h = (0.2 * session.random(tokens, m.slots * m.dim)).to(self.down.operand)
        return x, h, torch.empty(tokens, m.slots * m.hidden, device=session.device)

    def times(
        self, tokens: int, width: int, gate_up: Tile | None = None, down: Tile | None = None
    ) -> dict[str, float]:
        """Microseconds of sorting, of each product, and of all three; `width` 0: a program a pair."""
        products, routings = self.products, self.routings(tokens)
        x, h, y = self.inputs(tokens)
        num_experts = self.model.num_experts

        def sort(experts: torch.Tensor) -> Order | None:
            return None if width == 0 else products.sort(experts, num_experts, width)

        def first(experts: torch.Tensor, order: Order | None) -> None:
            products.linear(x, self.gate_up, experts, h, order=order, glu=self.model.glu, tile=gate_up)

        def second(experts: torch.Tensor, order: Order | None) -> None:
            products.linear(h, self.down, experts, y, order=order, tile=down)

        def layer(experts: torch.Tensor) -> None:
            order = sort(experts)
            first(experts, order)
            second(experts, order)

        micro = self.session.microseconds
        repeated = routings if len(routings) > 2 else routings * 2
        found = {"layer": micro([partial(layer, experts) for experts in repeated])}
        sorters = [*self.sorters[: len(routings)]] * (len(repeated) // len(routings))
        orders = [
            (experts, sorter.sort(experts, num_experts, width) if width else None)
            for experts, sorter in zip(repeated, sorters, strict=True)
        ]
        found["gate_up"] = micro([partial(first, *one) for one in orders])
        found["down"] = micro([partial(second, *one) for one in orders])
        if width != 0:
            found["sort"] = micro([partial(sort, routings[0])] * 8)
        return found

    def bytes(self, tokens: int) -> dict[str, float]:
        """Of the experts that are chosen, on average over the routings."""
        chosen = [len(torch.unique(experts)) for experts in self.routings(tokens)]
        mean = sum(chosen) / len(chosen)
        each = {"gate_up": bytes_of(self.gate_up), "down": bytes_of(self.down)}
        return {what: mean * size for what, size in each.items()} | {"layer": mean * sum(each.values())}


def measure(session: Session) -> None:
    copy = session.copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        layer = Layer(session, model)
        session.say(f"{model.name}: µs (GB/s of chosen experts, share of copy) of gate_up, down; layer, sort")
        for tokens in FEW:
            sizes = layer.bytes(tokens)
            chosen = choose_width(tokens * model.slots, model.num_experts)
            for width in (0, chosen) if tokens <= 4 * MAX_PAIR_TOKENS else (chosen,):
                times = layer.times(tokens, width)
                row = {"model": model.name, "tokens": tokens, "width": width, "us": times, "bytes": sizes}
                rows.append(row)
                session.save("few", rows)
                rates = {what: sizes[what] / 1000 / times[what] for what in sizes}
                session.say(
                    f"  T={tokens:<3} {'pairs ' if width == 0 else f'by {width:3}'} "
                    + " ".join(f"{times[w]:7.1f} ({rates[w]:5.0f}, {rates[w] / copy:4.0%})" for w in sizes)
                    + f" {times.get('sort', 0.0):5.1f}"
                )
        measure_many(session, layer)
        del layer


def measure_many(session: Session, layer: Layer) -> None:
    model, dense_rates = layer.model, dense_products(session, layer)
    session.say(f"{model.name}: µs (TFLOP/s) by width; dense: " + ", ".join(dense_rates.values()))
    rows: list[dict[str, Any]] = []
    for tokens in MANY:
        pairs = tokens * model.slots
        for width in WIDTHS:
            if width * model.num_experts > 16 * pairs or width * model.num_experts * 8 < pairs:
                continue
            times = layer.times(tokens, width)
            flops = {
                what: 2 * pairs * weight.n * weight.shape.k / times[what] / 1e6
                for what, weight in (("gate_up", layer.gate_up), ("down", layer.down))
            }
            rows.append({"tokens": tokens, "width": width, "us": times, "tflop_per_s": flops})
            session.save(f"many {model.name}", rows)
            mark = "*" if width == choose_width(pairs, model.num_experts) else " "
            session.say(
                f"  T={tokens:<4} by {width:3}{mark}"
                + "".join(f" {what} {times[what]:7.1f} ({flops[what]:4.0f})" for what in flops)
                + f" layer {times['layer']:7.1f} sort {times['sort']:5.1f}"
            )


def dense_products(session: Session, layer: Layer) -> dict[str, str]:
    """The same numbers of outputs and tokens without experts, for as many tokens as there are pairs."""
    found: dict[str, str] = {}
    products = Products(session.kernels)
    tokens = max(MANY) * layer.model.slots
    for what, weight in (("gate_up", layer.gate_up), ("down", layer.down)):
        name, n, k = weight.shape.format, weight.n, weight.shape.k
        key = layer.model.name, what, "dense"
        packed = session.once(key, partial(packed_tiles, name, n, k))
        dense = upload(shape_of(name, n, k), n, torch.from_numpy(packed).to(session.device))
        x = session.random(tokens, k).to(dense.operand)
        out = torch.empty(tokens, n, device=session.device)
        micro = session.microseconds([partial(products.linear, x, dense, out)] * 4)
        rate = 2 * tokens * n * k / micro / 1e6
        session.save(f"dense {layer.model.name} {what}", {"tokens": tokens, "us": micro, "tflop_per_s": rate})
        found[what] = f"{what} of {tokens} tokens {micro:.0f} µs ({rate:.0f})"
    return found


# -- which tile is fastest ---------------------------------------------------------------------------------


def tune(session: Session) -> None:
    """Of each model, for one token and for many: the times of some tiles, fastest first."""
    few = ((64, 16, 4, 3), (64, 16, 4, 4), (64, 16, 4, 6), (64, 16, 4, 8), (128, 16, 4, 4), (128, 16, 8, 4))
    many = (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3),
        (64, 128, 4, 3),
    )  # fmt: skip
    found: dict[str, Any] = {}
    for model in MODELS:
        layer = Layer(session, model)
        for tokens, width, choices in ((1, 0, few), (2048, 128, many)):
            times: dict[str, list[tuple[float, str]]] = {"gate_up": [], "down": []}
            for rows, columns, warps, stages in choices:
                one = Tile(rows=rows, tokens=columns, warps=warps, stages=stages)
                gate_up, down = (
                    dataclasses.replace(one, split=width == 0 and weight.shape.chunks > 1)
                    for weight in (layer.gate_up, layer.down)
                )
                label = f"{rows}x{columns} w{warps} s{stages}"
                try:
                    taken = layer.times(tokens, width, gate_up, down)
                except Exception as error:  # too much shared memory: Triton's own error type
                    session.say(f"  {model.name} {label}: {type(error).__name__}")
                    continue
                for what in times:
                    times[what].append((taken[what], label))
            found[f"{model.name} {tokens}"] = times
            session.save("tune", found)
            for what, of in times.items():
                best = ", ".join(f"{micro:.1f} {label}" for micro, label in sorted(of))
                session.say(f"  {model.name} T={tokens} {what}: {best}")
