"""Logits of every architecture equal transformers', and no chunking changes a bit of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from tiny_models import MODELS, Tiny, TinyFile, load_runner, twin_logits
from tiny_variants import VARIANTS, tiny_file

from gguf import GGMLQuantizationType as GGMLType
from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.kernels.backend import Backend
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library
from worker_orcd.kernels.cpu.native import NativeBackend
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.runner.scoring import score
from worker_orcd.sequence import Row, SamplingParams, Sequence, Step

PROMPT = np.random.default_rng(7).integers(0, 320, 300).tolist()
ALL = MODELS | VARIANTS
INT8_ERROR = {
    "gpt-oss": 0.15
}  # clamped random experts of high gain, chosen by random routers: others pick others
ENGINE = EngineConfig(max_num_seqs=512, max_num_batched_tokens=512)


@pytest.fixture(params=["reference", "native float32", "native int8"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "reference":
        yield ReferenceBackend()
        return
    try:
        library = load_library()
    except LibraryUnavailable as error:
        pytest.skip(str(error))
    threads = library.num_threads
    yield NativeBackend(library, DeviceConfig(cpu_activations=request.param.split()[1], cpu_threads=2))
    library.set_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(name: str, backend: Backend, tmp_path: Path):
    file = tiny_file(ALL[name])
    runner = load_runner(file.write(tmp_path / "tiny.gguf"), backend, ENGINE)
    expected = twin_logits(file, PROMPT)
    found = score(runner, PROMPT)
    assert found.shape == expected.shape
    error = np.abs(found - expected).max(axis=1) / np.ptp(expected, axis=1)  # (300,)
    if "int8" in backend.description:  # what 8 bits cost; the bits themselves are tested below
        assert np.median(error) < INT8_ERROR.get(name, 0.05)
    else:
        assert error.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", *sorted(VARIANTS)])
def test_chunks_do_not_change_a_bit(name: str, backend: Backend, tmp_path: Path):
    path = tiny_file(ALL[name]).write(tmp_path / "tiny.gguf")
    runner = load_runner(path, backend, ENGINE)
    whole = score(runner, PROMPT)
    for chunk in (1, 7, 64):
        assert np.array_equal(score(runner, PROMPT, chunk), whole), chunk


def test_rows_of_a_batch_do_not_change_each_other(backend: Backend, tmp_path: Path):
    path = TinyFile(MODELS["llama"]).write(tmp_path / "tiny.gguf")
    runner = load_runner(path, backend, ENGINE)
    rows = [started(PROMPT[first : first + length], first) for first, length in ((0, 5), (40, 17), (90, 1))]
    together = runner.logits(Step(tuple(rows)))
    alone = [runner.logits(Step((row,))) for row in rows]
    assert np.array_equal(together, np.concatenate(alone))


def test_a_step_that_wants_no_logits_still_fills_the_cache(backend: Backend, tmp_path: Path):
    path = TinyFile(MODELS["qwen2"]).write(tmp_path / "tiny.gguf")
    runner = load_runner(path, backend, ENGINE)
    whole = runner.logits(Step((started(PROMPT[:30], 0),)))
    row = started(PROMPT[:30], 4)
    assert runner.launch(Step((Row.of(row.sequence, 21),))).wait() == [None]
    row.sequence.num_computed_tokens = 21
    assert np.array_equal(runner.logits(Step((Row.of(row.sequence, 9),))), whole[21:])


def started(token_ids: list[int], first_block: int) -> Row:
    sequence = Sequence(
        id=first_block,
        token_ids=token_ids,
        max_tokens=1,
        stop_token_ids=frozenset(),
        sampling=SamplingParams(),
    )
    sequence.block_tables = [[first_block + 1, first_block + 2]]
    return Row.of(sequence, len(token_ids))


def test_fused_weights_of_one_format_and_of_many_agree(tmp_path: Path):
    mixed = TinyFile(Tiny(architecture="llama"))
    plain = TinyFile(Tiny(architecture="llama", formats={}))
    for name, (values, kind) in mixed.tensors.items():
        decoded = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        plain.tensors[name] = (decoded.astype(np.float32).reshape(values.shape), GGMLType.F32)
    runners = [
        load_runner(file.write(tmp_path / f"{index}.gguf"), ReferenceBackend(), ENGINE)
        for index, file in enumerate((mixed, plain))
    ]
    a, b = (score(runner, PROMPT[:40]) for runner in runners)
    assert np.array_equal(a, b)
