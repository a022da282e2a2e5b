"""Made-up files: true sizes, one file for one seed, and models that compute sane logits."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from worker_orcd import synth
from worker_orcd.gguf.kind import quant_kind
from worker_orcd.gguf.mixture import counts
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import TENSOR_TYPES
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.model.architectures import SUPPORTED, configure
from worker_orcd.quant import BY_NAME
from worker_orcd.runner.scoring import score
from worker_orcd.synth import ARCHITECTURES, SHAPES, Shape, plan, shape_named, tensor_bytes, write_model
from worker_orcd.synth.tensors import llama3_factors
from worker_orcd.text.tokenizer import load_tokenizer

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tiny(architecture: str) -> Shape:
    shape = shape_named(architecture, "tiny")
    assert shape is not None
    return shape


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_bytes(name: str, mixture: str) -> int:
    """What computing a token reads: not the embedding of an untied model, and of experts those used."""
    shape = SHAPES[name]
    read = 0.0
    for tensor in plan(shape, mixture):
        if tensor.spec.name == "token_embd.weight" and not shape.tied:
            continue
        share = shape.num_experts_used / shape.num_experts if "_exps" in tensor.spec.name else 1.0
        read += share * tensor.nbytes
    return round(read)


def test_every_supported_architecture_can_be_made() -> None:
    assert set(ARCHITECTURES) == set(SUPPORTED)
    assert {shape.architecture for shape in SHAPES.values()} == set(SUPPORTED)


@pytest.mark.parametrize(
    ("name", "mixture", "megabytes"),
    [
        ("qwen2.5-0.5b", "Q4_K_M", 392),  # as measured on published files
        ("phi-3-mini", "Q4_K_M", 2337),
        ("gpt-oss-20b", "MXFP4", 2575),
    ],
)
def test_bytes_read_for_a_token(name: str, mixture: str, megabytes: int) -> None:
    assert read_bytes(name, mixture) / 1e6 == pytest.approx(megabytes, abs=0.5)


@pytest.mark.parametrize(
    ("name", "mixture", "types"),
    [
        ("gemma3-270m", "Q4_K_M", {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}),
        ("smollm2-135m", "Q4_1", {"Q4_1": 210, "F32": 61, "Q8_0": 1}),
        ("gpt-oss-20b", "MXFP4", {"F32": 289, "Q8_0": 98, "MXFP4": 72}),
        ("qwen2.5-0.5b", "Q4_K_M", {"Q5_0": 132, "F32": 121, "Q8_0": 13, "Q4_K": 12, "Q6_K": 12}),
    ],
)
def test_tensors_of_published_files(name: str, mixture: str, types: dict[str, int]) -> None:
    assert counts(tensor.type_name for tensor in plan(SHAPES[name], mixture)) == types


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-0.5b", 0.494),
        ("qwen3-0.6b", 0.596),
        ("qwen3-30b-a3b", 30.53),
        ("llama-3.2-1b", 1.236),
        ("smollm2-135m", 0.1345),
        ("gpt2", 0.1244),
        ("phi-3-mini", 3.821),
        ("gemma3-270m", 0.268),
        ("gpt-oss-20b", 20.91),
        ("gpt-oss-120b", 116.8),
    ],
)
def test_parameters_of_published_models(name: str, billions: float) -> None:
    weights = sum(math.prod(tensor.spec.shape) for tensor in plan(SHAPES[name], "F16"))
    assert weights / 1e9 == pytest.approx(billions, rel=0.001)


@each_architecture
@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q4_0", "F16", "MXFP4", "Q8_0"])
def test_a_tiny_file_is_a_model(architecture: str, mixture: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    planned = write_model(path, tiny(architecture), "tiny", mixture, seed=3)
    with GGUFFile(path) as file:
        config = configure(file)
        assert config.architecture == architecture
        assert quant_kind(file) == mixture
        assert load_tokenizer(file.metadata).vocab_size == config.vocab_size
        found = {name: TENSOR_TYPES[tensor.ggml_type].name for name, tensor in file.tensors.items()}
        assert found == {tensor.spec.name: tensor.type_name for tensor in planned}
        assert sum(tensor.nbytes for tensor in file.tensors.values()) == tensor_bytes(planned)


@each_architecture
def test_logits_are_sane(architecture: str, tmp_path: Path) -> None:
    """Finite, of a standard deviation around two at every position, and not simply the last token again."""
    from tiny_models import load_runner

    path = tmp_path / "tiny.gguf"
    write_model(path, tiny(architecture), "tiny", "Q8_0")
    runner = load_runner(path, ReferenceBackend("float32", 1))
    ids = np.random.default_rng(1).integers(0, 600, 96).tolist()
    logits = score(runner, ids)
    assert np.isfinite(logits).all()
    spread = logits.std(axis=1)
    assert spread.min() > 1
    assert spread.max() < 4
    assert np.mean(logits.argmax(axis=1) == np.array(ids)) < 0.1
    assert len(set(logits.argmax(axis=1).tolist())) > 10


def test_values_have_the_planned_sizes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    planned = write_model(path, tiny("gpt-oss"), "tiny", "MXFP4")
    with GGUFFile(path) as file:
        for tensor in planned:
            spec = tensor.spec
            values = BY_NAME[tensor.type_name].dequantize_rows(file.rows(spec.name)).astype(np.float64)
            error = 6 * spec.std / math.sqrt(values.size)
            assert abs(values.mean() - spec.mean) < error + 0.02 * spec.std, spec.name
            if values.size > 5000:
                assert values.std() == pytest.approx(spec.std, rel=0.05), spec.name


def test_the_seed_decides_and_the_threads_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth.write, "PIECE_BYTES", 10_000)  # so that tensors have several pieces
    shape, paths = tiny("qwen2"), [tmp_path / f"{n}.gguf" for n in range(3)]
    for path, seed, threads in zip(paths, (7, 7, 8), (1, 5, 5), strict=True):
        write_model(path, shape, "tiny", "Q4_K_M", seed=seed, threads=threads)
    digests = [digest(path) for path in paths]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert len({path.stat().st_size for path in paths}) == 1


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    planned = write_model(
        tmp_path / "t.gguf", tiny("llama"), "t", "Q4_0", on_progress=lambda *what: told.append(what)
    )
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1] == ("writing random weights", tensor_bytes(planned), tensor_bytes(planned))


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    path.write_bytes(b"before")

    def stop(_stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(path, tiny("llama"), "t", "Q4_0", on_progress=stop)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_llama3_factors_are_those_of_the_converter() -> None:
    factors = llama3_factors(SHAPES["llama-3.2-1b"])
    wanted: list[float] = []
    for index in range(0, 64, 2):  # Llama 3's published rule: factor 32, 1 to 4, 8192
        wavelength = 2 * math.pi * 500000.0 ** (index / 64)
        if wavelength < 8192 / 4:
            wanted.append(1.0)
        elif wavelength > 8192:
            wanted.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            wanted.append(1 / ((1 - smooth) / 32 + smooth))
    assert factors == pytest.approx(wanted, rel=1e-5)
    assert 1 < len({value for value in wanted if 1 < value < 32}) < 16
