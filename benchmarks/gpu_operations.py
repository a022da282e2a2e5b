"""
The CUDA backend's operations between matrix products and attention: right, the same bits whatever the batch,
and how fast.

    python benchmarks/gpu_operations.py                      # everything, about a minute
    python benchmarks/gpu_operations.py --only correct same
    python benchmarks/gpu_operations.py --only fast

Needs a GPU, torch, triton and numpy, and no network. Each part is run twice: first without launching, to
know its kernels, which are then compiled by many processes. Checks are against float64, or exact where an
operation is; then tokens alone against the same tokens in batches, at random places, bit for bit. Then
microseconds for one token, and GB/s for 4096 beside a device copy in the same run. All of it goes to a JSON
file as it comes; a table is printed last. Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpu_operation_cases import Case, nowhere, rowwise, stored_at, timed_cases
from gpu_timing import LARGER_THAN_L2, copy_bandwidth, graph_microseconds, stamp
from gpu_weights import random_rows
from worker_orcd.kernels.backend import AttentionParams, Glu, Matrix, RopeParams
from worker_orcd.kernels.cuda.cache_type import FP8, KEY_SCALE
from worker_orcd.kernels.cuda.compiler import Grid, Kernel, Kernels, compile_kernel
from worker_orcd.kernels.cuda.operations import Operations, rope_table
from worker_orcd.kernels.cuda.weights import pack, upload
from worker_orcd.quant import BY_NAME

ALLOWED = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of the largest value
OUT = tuple(ALLOWED)
ALLOWED |= {FP8: 0.04}  # half of what is between its largest numbers
WIDTHS = (1, 50, 64, 80, 96, 128, 256, 576, 896, 2048, 2880, 3072, 4096, 5120, 8192, 11008, 16384)
BATCHES = (2, 7, 64, 333, 1024)
TOKENS = (1, 16, 256, 4096)


class Recorder(Kernels):
    """Notes what would be launched."""

    def __init__(self, device: torch.device, capability: int) -> None:
        super().__init__(device, capability)
        self.seen: set[Kernel] = set()

    def launch(self, kernel: Kernel, grid: Grid, *arguments: torch.Tensor | int | float) -> None:
        self.seen.add(kernel)


class Session:
    """Results on their way to the file; `operations` of the pass that is running."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: dict[str, Any] = {"stamp": stamp(args.commit)}
        self.device = torch.device("cuda")
        self.capability: int = self.results["stamp"]["capability"]
        self._kernels = Kernels(self.device, self.capability)
        self._recorder = Recorder(self.device, self.capability)
        self.operations = Operations(self._kernels)
        self.recording = False
        self.lines: list[str] = []
        self.failures = 0
        self.checks = 0
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {line}", flush=True)
        self.lines.append(line)

    def save(self, part: str, value: object) -> None:
        if not self.recording:
            self.results[part] = value
            self.args.out.write_text(json.dumps(self.results, indent=1, default=str))

    def random(self, *shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(device=self.device).manual_seed(seed + sum(shape))
        return scale * torch.randn(*shape, generator=generator, device=self.device)

    def blank(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows that are parts of wider ones, full of NaN."""
        fill = torch.nan if dtype.is_floating_point else -1
        wide = torch.full((shape[0], shape[1] + 16), fill, dtype=dtype, device=self.device)
        return wide[:, : shape[1]]

    def check(self, what: str, found: torch.Tensor, wanted: torch.Tensor) -> float:
        """That `found` is near float64's `wanted`, or equal to it where `wanted` is of the same type."""
        if self.recording:
            return 0.0
        self.checks += 1
        if wanted.dtype == found.dtype:
            error = float((bits(found) != bits(wanted)).sum())
            good = error == 0
        else:
            error = float((found.double() - wanted).abs().max() / wanted.abs().max())
            good = error <= ALLOWED[found.dtype]
        if not good:
            self.failures += 1
            self.say(f"WRONG {what}: {error:.2e}{' elements' if wanted.dtype == found.dtype else ''}")
        return error

    def run(self, part: Callable[[Session], None]) -> None:
        """The part, its kernels compiled first. What goes wrong is said and does not hide the rest."""
        try:
            self.recording, self.operations = True, Operations(self._recorder)
            part(self)
            self._compile(self._recorder.seen)
            self._recorder.seen.clear()
        except Exception:
            self.failures += 1
            self.say(traceback.format_exc())
        self.recording, self.operations = False, Operations(self._kernels)
        try:
            part(self)
            torch.cuda.synchronize()
        except Exception:
            self.failures += 1
            self.say(traceback.format_exc())

    def _compile(self, kernels: Iterable[Kernel]) -> None:
        start, wanted = time.monotonic(), list(kernels)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.args.jobs, mp_context=context) as pool:
            list(pool.map(_compile, wanted, [self.capability] * len(wanted), chunksize=4))
        self.say(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s")


def _compile(kernel: Kernel, capability: int) -> None:
    compile_kernel(kernel, capability)


def bits(x: torch.Tensor) -> torch.Tensor:
    integer = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]
    return x.contiguous().view(integer)


# -- right -------------------------------------------------------------------------------------------------


def check_embed(session: Session) -> None:
    """Equal to what `quant` reads, in every format."""
    for name, fmt in BY_NAME.items():
        for n, k, step, scale in ((200, 768, 0, 1.0), (64, 2048, 0, 1.7), (130, 512, 128, 1.0)):
            step = 0 if fmt.block_size == 1 else step
            rows = random_rows(fmt, n, k, n)
            if name == "MXFP4":
                rows[:, 0] = [row % 129 for row in range(n)]  # subnormal numbers too
            shape, packed = pack(Matrix(name, fmt, n, k, rows), step)
            weight = upload(shape, n, torch.from_numpy(packed).to(session.device))
            indices = torch.randint(0, n, (77,), generator=torch.Generator().manual_seed(k))
            wanted = torch.from_numpy(fmt.dequantize_rows(rows[indices.numpy()])) * scale
            out = session.blank(77, k)
            session.operations.embed(indices.int().to(session.device), weight, out, scale)
            session.check(f"embed {name} {n}x{k} step {shape.step}", out, wanted.to(session.device))


def check_norms(session: Session) -> None:
    ops, worst = session.operations, 0.0
    for width in WIDTHS:
        runs = 5 if width <= 256 else 1
        shape = 9, width * runs
        x, y = session.random(*shape, scale=3), session.random(*shape, seed=1)
        gain, bias = session.random(width, seed=2), session.random(width, seed=3)
        wide = x.double().view(9, runs, width)
        root = (wide.square().mean(2, keepdim=True) + 1e-5).sqrt()
        by_rms = (wide / root * gain.double()).view(shape)
        by_layer = torch.nn.functional.layer_norm(wide, (width,), gain.double(), bias.double(), 1e-5)
        full = ops.rms_norm(x, gain, 1e-5, session.blank(*shape))
        for dtype in OUT:
            what = f"{width}x{runs} {dtype}"
            out, other = session.blank(*shape, dtype=dtype), session.blank(*shape, dtype=dtype)
            ops.rms_norm(x, gain, 1e-5, out)
            worst = max(worst, session.check(f"rms_norm {what}", out, by_rms))
            session.check(f"rms_norm {what} against float32's", out, ops.cast(full, other))
            total = session.blank(*shape)
            ops.add_rms_norm(x, y, gain, 1e-5, total, out)
            session.check(f"add_rms_norm's sum {what}", total, x + y)
            session.check(f"add_rms_norm {what}", out, ops.rms_norm(total, gain, 1e-5, other))
            if width > 1:
                ops.layer_norm(x, gain, bias, 1e-5, out)
                session.check(f"layer_norm {what}", out, by_layer.view(shape))
    session.save("norm_error", worst)


ROPE_CASES: tuple[tuple[int, int, int, int, tuple[bool, bool], torch.dtype, int], ...] = (
    (32, 32, 96, 96, (False, False), torch.float16, 16),
    (14, 2, 64, 64, (False, False), torch.float16, 32),
    (32, 4, 128, 128, (True, True), torch.float16, 64),
    (64, 8, 64, 64, (False, False), torch.bfloat16, 16),
    (4, 1, 256, 256, (True, True), torch.float16, 16),
    (24, 8, 128, 96, (False, True), torch.float16, 16),
    (32, 32, 80, 32, (False, False), torch.bfloat16, 16),
    (12, 12, 64, 0, (True, False), torch.float32, 16),
    (3, 1, 10, 4, (True, True), torch.float16, 16),
    (32, 32, 96, 96, (False, False), FP8, 16),
    (24, 8, 128, 96, (False, True), FP8, 32),
)


def check_rope(session: Session) -> None:
    for heads, kv_heads, dim, rotary, normed, dtype, block_size in ROPE_CASES:
        params = AttentionParams(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=1.0)
        tokens, most = 37, 1 << 17
        qkv = session.random(tokens, (heads + 2 * kv_heads) * dim, scale=2)
        gains = [session.random(dim, seed=7) if wanted else None for wanted in normed]
        rng = torch.Generator().manual_seed(dim)
        positions = torch.randint(0, most, (tokens,), generator=rng, dtype=torch.int32).to(session.device)
        slots = torch.randperm(8 * block_size, generator=rng)[:tokens].int().to(session.device)
        cache = nowhere((2, 9, kv_heads, block_size, dim), dtype, session.device)
        q_out, table = session.blank(tokens, heads * dim, dtype=torch.float16), None
        inv_freq = tuple(10000.0 ** -(2 * i / max(1, rotary)) for i in range(rotary // 2))
        if rotary:
            table = rope_table(RopeParams(rotary_dim=rotary, inv_freq=inv_freq), most, session.device)
        session.operations.rope_store(
            qkv, positions, slots, params, cache, q_out, gains=(gains[0], gains[1], 1e-6), rope=table
        )
        what = f"rope_store {heads}/{kv_heads} heads of {dim}, {rotary} rotated, {dtype}"
        q, k, v = (
            part.double().view(tokens, -1, dim)
            for part in torch.split(qkv, [heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        q, k = (turned(x, gain, positions, inv_freq) for x, gain in ((q, gains[0]), (k, gains[1])))
        session.check(f"{what}: queries", q_out, q.flatten(1))
        stored = stored_at(cache, slots)  # (2, tokens, columns)
        k = k * KEY_SCALE if dtype == FP8 else k
        session.check(f"{what}: keys", stored[0], k.flatten(1))
        session.check(f"{what}: values", stored[1], v.flatten(1))
        untouched = (bits(cache) == bits(nowhere((1,), dtype, session.device))).sum()
        if not session.recording and int(untouched) != cache.numel() - stored.numel():
            session.failures += 1
            session.say(f"WRONG {what}: wrote elsewhere in the cache")


def turned(
    x: torch.Tensor, gain: torch.Tensor | None, positions: torch.Tensor, inv_freq: Sequence[float]
) -> torch.Tensor:
    """Heads (tokens, heads, dim) normalised and rotated, in float64."""
    if gain is not None:
        x = x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt() * gain.double()
    half = len(inv_freq)
    frequencies = torch.tensor(inv_freq, dtype=torch.float64, device=x.device)
    angles = (positions.double()[:, None] * frequencies)[:, None]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=2)


def check_elements(session: Session) -> None:
    ops = session.operations
    functions = torch.nn.functional
    for tokens, n in ((3, 50), (5, 4864), (2, 70), (33, 2880)):
        both = session.random(tokens, 2 * n, scale=5)
        gate, up = both[:, :n], both[:, n:]
        g, u = gate.double(), up.double()
        clamped = g.clamp(max=7)
        wanted = {
            Glu.SWIGLU: functions.silu(g) * u,
            Glu.GEGLU: functions.gelu(g, approximate="tanh") * u,
            Glu.CLAMPED_SWIGLU: clamped * torch.sigmoid(1.702 * clamped) * (u.clamp(-7, 7) + 1),
        }
        indices = torch.randint(0, tokens, (9,), device=session.device, dtype=torch.int32)
        for dtype in OUT:
            out = session.blank(tokens, n, dtype=dtype)
            for kind in Glu:
                session.check(f"{kind.value} {n} {dtype}", ops.glu(kind, gate, up, out), wanted[kind])
            gelu = functions.gelu(u, approximate="tanh")
            session.check(f"gelu {n} {dtype}", ops.gelu(up, out), gelu)
            session.check(f"add {n} {dtype}", ops.add(gate, up, out), (gate + up).to(dtype))
            session.check(f"scale {n} {dtype}", ops.scale(up, 0.3, out), (up * 0.3).to(dtype))
            session.check(f"cast {n} {dtype}", ops.cast(up, out), up.to(dtype))
            taken = ops.take(up, indices, session.blank(9, n, dtype=dtype))
            session.check(f"take {n} {dtype}", taken, up[indices.long()].to(dtype))
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[1e9, -1e9, 65519.0, inf, -inf, 2.0, -7e4, 65504.0]], device=session.device)
    half = torch.tensor(
        [[65504, -65504, 65504, 65504, -65504, 2, -65504, 65504]], device=session.device
    ).half()
    for dtype, wanted_bits in ((torch.float16, half), (torch.bfloat16, x.bfloat16())):
        session.check(f"saturated {dtype}", ops.cast(x, session.blank(1, 8, dtype=dtype)), wanted_bits)
    kept = ops.cast(torch.full((1, 8), nan, device=session.device), torch.zeros_like(half))
    session.check("NaN stays", kept.isnan().half(), torch.ones_like(half))


def check_experts(session: Session) -> None:
    ops = session.operations
    for tokens, n, k in (
        (1, 32, 2880),
        (5, 128, 2048),
        (700, 32, 2880),
        (3, 256, 512),
        (2, 5, 90),
        (4, 8, 4096),
    ):
        x, w, bias = session.random(tokens, k), session.random(n, k, seed=1), session.random(n, seed=2)
        wanted = x.double() @ w.double().T
        what = f"linear_f32 {tokens} {n}x{k}"
        session.check(what, ops.linear_f32(x, w, None, session.blank(tokens, n)), wanted)
        session.check(what, ops.linear_f32(x, w, bias, session.blank(tokens, n)), wanted + bias.double())
    for tokens, n, top_k in ((500, 32, 4), (300, 128, 8), (100, 256, 16), (9, 6, 3), (5, 4, 1)):
        logits = session.random(tokens, n, scale=3).mul(4).round().div(4)  # many are equal
        logits[1] = torch.tensor([0.0, -0.0], device=session.device).repeat(n // 2)
        experts = session.blank(tokens, top_k, dtype=torch.int32)
        weights = session.blank(tokens, top_k)
        ops.route(logits, experts, weights)
        order = torch.sort(logits.cpu(), dim=1, descending=True, stable=True).indices[:, :top_k]
        order = order.to(session.device)
        session.check(f"route {n} {top_k}: experts", experts, order.int())
        wanted = torch.softmax(torch.gather(logits, 1, order).double(), 1)
        session.check(f"route {n} {top_k}: weights", weights, wanted)
    for tokens, n, slots in ((33, 2880, 4), (7, 50, 8), (2, 2048, 1)):
        x, weights = session.random(tokens, n * slots), session.random(tokens, slots, seed=1)
        residual = session.random(tokens, n, seed=2)
        wanted = x[:, :n] * weights[:, :1]
        for slot in range(1, slots):
            wanted = wanted + x[:, slot * n : (slot + 1) * n] * weights[:, slot : slot + 1]
        session.check(f"combine {n} {slots}", ops.combine(x, weights, session.blank(tokens, n)), wanted)
        out = ops.combine(x, weights, session.blank(tokens, n), residual)
        session.check(f"combine {n} {slots} and residual", out, wanted + residual)


def check_correct(session: Session) -> None:
    for check in (check_embed, check_norms, check_rope, check_elements, check_experts):
        try:
            check(session)
        except Exception:
            session.failures += 1
            session.say(traceback.format_exc())
    if not session.recording:
        session.save("correct", {"checks": session.checks, "failures": session.failures})
        session.say(f"{session.checks} checks, {session.failures} failed")


# -- the same bits -----------------------------------------------------------------------------------------


def check_same(session: Session) -> None:
    """A token's outputs alone and in batches, at random places."""
    counts: dict[str, dict[str, int]] = {}
    for case in rowwise(session.device):
        compared = differing = 0
        alone = [
            case.run(session.operations, torch.tensor([row], device=session.device)) for row in range(24)
        ]
        for batch in BATCHES:
            order, places = mixed(batch)
            outputs = case.run(session.operations, order.to(session.device))
            for row, place in enumerate(places):
                for found, wanted in zip(outputs, alone[row], strict=True):
                    compared += wanted.numel()
                    differing += int((bits(found[place]) != bits(wanted[0])).sum())
        counts[case.name] = {"compared": compared, "differing": differing}
        if differing and not session.recording:
            session.failures += 1
            session.say(f"DIFFERS {case.name}: {differing} of {compared}")
    session.save("same", counts)
    if not session.recording:
        total = sum(count["compared"] for count in counts.values())
        bad = sum(count["differing"] for count in counts.values())
        session.say(f"{total:.1e} outputs of {len(counts)} operations compared, {bad} differ")


def mixed(batch: int) -> tuple[torch.Tensor, list[int]]:
    """Rows of a pool of 1024 in random order, the first ones among them, and where those are."""
    generator = torch.Generator().manual_seed(batch)
    order = torch.randperm(1024, generator=generator)[:batch]
    known = min(batch, 24)
    places = torch.randperm(batch, generator=generator)[:known]
    order[places] = torch.arange(known)
    return order, places.tolist()


# -- fast --------------------------------------------------------------------------------------------------


def measure(session: Session) -> None:
    rows: list[dict[str, Any]] = []
    copy = 0.0
    if not session.recording:
        copy = copy_bandwidth()
        session.save("copy_gb_per_s", copy)
        session.say(f"device copy {copy:.0f} GB/s; microseconds at {TOKENS} tokens, GB/s at the last")
    for build in timed_cases(session.device):
        times: dict[int, float] = {}
        for tokens in TOKENS:
            case = build(tokens)
            if session.recording:
                case.run(session.operations, case.buffers())
            else:
                times[tokens] = microseconds(session, case, tokens)
        if not session.recording:
            rate = case.num_bytes / 1000 / times[tokens]
            rows.append({"name": case.name, "bytes": case.num_bytes, "microseconds": times, "rate": rate})
            session.save("fast", rows)
            session.say(
                f"  {case.name:34}"
                + " ".join(f"{times[tokens]:7.2f}" for tokens in TOKENS)
                + f" {rate:6.0f} GB/s {rate / copy:5.0%} of copy"
            )


def microseconds(session: Session, case: Case, tokens: int) -> float:
    """Of one launch; many tokens' operands rotate through more than the L2 cache holds."""
    copies = 1 if tokens == 1 else max(1, min(8, -(-LARGER_THAN_L2 // case.num_bytes)))
    sets = [case.buffers() for _ in range(copies)]
    runs = [lambda given=given: case.run(session.operations, given) for given in sets]
    return graph_microseconds(runs * max(1, 16 // copies), 3.0)


PARTS: dict[str, Callable[[Session], None]] = {"correct": check_correct, "same": check_same, "fast": measure}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu_operations.json"))
    parser.add_argument("--commit", help="default: ask git")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    return parser.parse_args()


def main() -> None:
    session = Session(arguments())
    session.say(str(session.results["stamp"]))
    for part in session.args.only:
        session.run(PARTS[part])
    print("\n" + "\n".join(session.lines))
    print(f"{session.failures} failures; {session.args.out}")
    sys.exit(1 if session.failures else 0)


if __name__ == "__main__":
    main()
