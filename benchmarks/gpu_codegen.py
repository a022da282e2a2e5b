"""
What the compiler makes of the CUDA backend's kernels, for any GPU, on a machine that has none.

    python benchmarks/gpu_codegen.py                               # every kernel for sm_80, sm_89 and sm_90
    python benchmarks/gpu_codegen.py --capability 90 --formats Q4_K Q6_K

Needs Triton, which brings NVIDIA's assembler and disassembler. A line a kernel: registers, spills, shared
memory, instructions a lane issues in the main loop for each weight, which matrix instructions. Ends with 1
where a kernel spills, uses local memory, has its matrix instructions serialised without need, may write over
weights that are being multiplied, or where the kernels of a format do not all sum in the same order on one
GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_hazards import overwritten
from worker_orcd.kernels.cuda.variants import (
    CAPABILITIES,
    FORMATS,
    Variant,
    all_variants,
    compile_variant,
)

SHAPES = ((16384, 3072), (3072, 8192), (152, 576))
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@dataclass(frozen=True, kw_only=True)
class Codegen:
    """Of one kernel."""

    variant: Variant
    capability: int
    registers: int
    spilled: int  # bytes
    local: int  # instructions that touch local memory
    shared: int  # bytes
    loop: int  # instructions of the main loop
    matrix: str  # "wgmma" or "mma"
    widths: tuple[str, ...]  # kWidth: how the columns of a step are dealt to a matrix instruction
    from_registers: int  # wgmma with weights in registers
    warnings: tuple[str, ...]  # of the assembler: C75xx, serialised wgmma
    overwritten: tuple[str, ...]  # products whose weights may be written over: see `gpu_hazards`

    @property
    def per_weight(self) -> float:
        """Instructions a lane issues for each weight."""
        tile, shape = self.variant.tile, self.variant.shape
        steps = max(tile.unroll, tile.ahead)  # of a pass through the loop
        return self.loop * tile.warps * 32 / (tile.rows * shape.step * steps)

    @property
    def order(self) -> tuple[object, ...]:
        """What the order of a sum follows from: equal for all kernels of a format on a GPU."""
        return self.matrix, self.widths

    def faults(self) -> list[str]:
        found: list[str] = []
        if self.spilled or self.local:
            found.append(f"{self.spilled} bytes spilled, {self.local} accesses to local memory")
        if self.shared > SHARED_BYTES[self.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.warnings:
            found.append(f"ptxas warns {self.warnings}")
        if self.overwritten:
            found.append(f"written before it was multiplied: {self.overwritten[0]}")
        if self.variant.tile.ahead:  # written so that weights are where a tensor core wants them
            return found
        if self.capability == 90 and self.matrix != "wgmma":
            found.append(f"{self.matrix} instead of wgmma")
        plain = self.variant.shape.format in (
            "F16",
            "BF16",
        )  # whose weights are multiplied from shared memory
        if self.capability == 90 and not plain and not self.from_registers:
            found.append("weights take the way through shared memory")
        return found

    def __str__(self) -> str:
        shape, tile = self.variant.shape, self.variant.tile
        return (
            f"sm_{self.capability} {shape.format:6} K {shape.k:4} S {shape.chunks:2}"
            f" {tile.rows:3}x{tile.tokens:<3}"
            f" {tile.warps} warps {tile.stages} stages {'split' if tile.split else '     '}"
            f" {self.registers:3} registers {self.shared / 1024:5.1f} KiB {self.per_weight:5.2f} a weight"
            f" {self.matrix}/{','.join(self.widths)} {'; '.join(self.faults())}"
        )


def tools() -> Path:
    """Where the Triton wheel keeps ptxas and cuobjdump. Raises ImportError."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise ImportError("triton")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def inspect(variant: Variant, capability: int) -> Codegen:
    compiled = compile_variant(variant, capability)
    log, sass = assembled(compiled, capability)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    gpu_ir = compiled.asm["ttgir"]
    # Weights that are multiplied straight from shared memory have no kWidth: there is one order.
    return Codegen(
        variant=variant,
        capability=capability,
        registers=int(registers[1]) if registers else 0,
        spilled=int(spills[1]) + int(spills[2]) if spills else 0,
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=compiled.metadata.shared,
        loop=main_loop(sass),
        matrix="wgmma" if "warp_group_dot" in gpu_ir else "mma",
        widths=tuple(sorted(set(re.findall(r"opIdx = 0[^}]*kWidth = (\d+)", gpu_ir)))),
        from_registers=len(re.findall(r"HGMMA\S* R\d+, R\d+, gdesc", sass)),
        warnings=tuple(sorted(set(re.findall(r"C75\d\d", log)))),
        overwritten=tuple(overwritten(sass)),
    )


def assembled(compiled: Any, capability: int) -> tuple[str, str]:
    """What ptxas says of a compiled kernel, and its machine code."""
    with tempfile.TemporaryDirectory() as directory:
        ptx, cubin = Path(directory, "k.ptx"), Path(directory, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = f"--gpu-name=sm_{capability}{'a' if capability == 90 else ''}"
        log = run([tools() / "ptxas", "-v", target, ptx, "-o", Path(directory, "again.cubin")])
        return log, run([tools() / "cuobjdump", "-sass", cubin])


def run(command: list[Path | str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main_loop(sass: str) -> int:
    """Instructions of the longest loop that multiplies matrices; 0 where it was unrolled."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    longest = 0
    for at, text in lines:
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            body = [inside for where, inside in lines if int(target[1], 16) <= where <= at]
            if any("MMA" in inside for inside in body):
                longest = max(longest, len(body))
    return longest


def disorder(found: Iterable[Codegen]) -> list[str]:
    """Formats whose kernels for one GPU differ in the order of their sums.

    What goes to registers orders columns itself; that its bits are the same only a GPU shows.
    """
    orders: dict[tuple[str, int], set[tuple[object, ...]]] = {}
    for one in found:
        if one.variant.tile.ahead:
            continue
        orders.setdefault((one.variant.shape.format, one.capability), set()).add(one.order)
    return [
        f"{name} on sm_{capability}: {sorted(map(str, of))}"
        for (name, capability), of in orders.items()
        if len(of) > 1
    ]


def inspect_all(variants: list[tuple[Variant, int]], jobs: int) -> list[Codegen]:
    """In processes of their own: Triton is not imported here."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(inspect), *zip(*variants, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    wanted = [
        (variant, capability)
        for capability in args.capability
        for name in args.formats
        for variant in all_variants(
            [(name, n, k) for n, k in SHAPES if k % (256 if name.endswith("_K") else 32) == 0], capability
        )
    ]
    found = inspect_all(wanted, args.jobs)
    for one in found:
        print(one)
    faults = disorder(found) + [str(one) for one in found if one.faults()]
    print(f"{len(found)} kernels, {len(faults)} faults", *faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
