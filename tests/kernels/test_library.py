from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from worker_orcd.kernels.cpu.build import COMPILERS, SOURCES
from worker_orcd.kernels.cpu.library import ABI_VERSION, Batch, Kind, Op, Task

STRUCTURES = {"orcd_op": Op, "orcd_batch": Batch, "orcd_task": Task}


def test_structures_and_kinds_agree_with_the_header(tmp_path):
    compiler = next((command for command in COMPILERS if shutil.which(command)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    lines = ['#include "orcd.h"', "#include <stdio.h>", "int main(void) {"]
    for name, structure in STRUCTURES.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        lines += [f'printf("%zu\\n", offsetof({name}, {entry[0]}));' for entry in structure._fields_]
    lines += [f'printf("%d\\n", ORCD_{kind.name});' for kind in Kind]
    lines += ['printf("%d\\n", ORCD_ABI_VERSION); }']
    source = tmp_path / "layout.c"
    source.write_text("\n".join(lines))
    subprocess.run([compiler, f"-I{SOURCES}", str(source), "-o", str(tmp_path / "layout")], check=True)
    printed = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    want = []
    for structure in STRUCTURES.values():
        want.append(ctypes.sizeof(structure))
        want += [getattr(structure, entry[0]).offset for entry in structure._fields_]
    want += [*Kind, ABI_VERSION]
    assert [int(line) for line in printed.split()] == want


def test_an_instruction_set_it_lacks_is_refused(library):
    before = library.isa
    assert not library.force_isa("pdp11")
    assert library.isa == before


def test_the_pool_has_a_size_within_limits(library):
    before = library.num_threads
    assert not library.set_threads(0)
    assert library.num_threads == before
    assert library.set_threads(3)
    assert library.num_threads == 3
    library.set_threads(before)


def test_sizes_that_do_not_exist_are_none(library):
    assert library.packed_bytes(9999, 16, 32) is None
    assert library.packed_bytes(2, 16, 33) is None  # Q4_0 has blocks of 32
    assert library.cache_block_bytes(17, 1, 64, 0) is None
    assert library.cache_block_bytes(16, 1, 64, 0) == 2 * 16 * 64 * 4
