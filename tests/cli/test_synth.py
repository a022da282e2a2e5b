"""`synth`: what it writes, what it refuses, and that nothing half-written is left."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.cli.output import check_output, described
from worker_orcd.errors import InvalidConfiguration
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.synth import ARCHITECTURES


def test_it_says_what_it_wrote(invoke: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    made = invoke("synth", "qwen2", str(path))
    assert made.status == 0
    assert made.out.startswith(f"{path}: Q4_K_M, ")
    assert "Q5_0 22" in made.out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_run(invoke: Any, tmp_path: Path, architecture: str) -> None:
    """Through the engine and the kernels of the device: an answer of eight tokens from a prompt."""
    path = tmp_path / "tiny.gguf"
    assert invoke("synth", architecture, str(path)).status == 0
    answer = invoke(
        "run", str(path), "hello there", "--max-tokens", "8", "--max-model-len", "256", "--seed", "1"
    )
    assert answer.status == 0, answer.err
    assert len(answer.out.strip()) >= 4


def test_the_seed_is_an_option(invoke: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.gguf" for seed in ("1", "1 again", "2")]
    for path in paths:
        seed = path.stem.split()[0]
        assert invoke("synth", "gpt-oss", str(path), "--mix", "mxfp4", "--seed", seed).status == 0
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_what_is_there_is_kept_unless_forced(invoke: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_text("precious")
    refused = invoke("synth", "llama", str(path))
    assert refused.status == 2
    assert "'tiny.gguf' exists" in refused.err
    assert "--force" in refused.err
    assert path.read_text() == "precious"
    assert invoke("synth", "llama", str(path), "--force").status == 0
    with GGUFFile(path) as file:
        assert file.metadata.string("general.name") == "tiny llama (random weights)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mamba",), "ARCH: found 'mamba'; expected one of llama, qwen2, "),
        (("qwen2", "--shape", "phi-3-mini"), "--shape: found 'phi-3-mini'; qwen2 has tiny, qwen2.5-0.5b"),
        (("qwen2", "--mix", "Q4_K_XL"), "--mix: found 'Q4_K_XL'; expected one of F32, F16, Q4_0, "),
    ],
)
def test_what_is_not_known_is_named(
    invoke: Any, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    refused = invoke("synth", *words, str(tmp_path / "t.gguf"))
    assert refused.status == 2
    assert message in refused.err
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(invoke: Any, tmp_path: Path) -> None:
    nowhere = invoke("synth", "qwen2", str(tmp_path / "nowhere" / "t.gguf"))
    assert nowhere.status == 2
    assert "there is no directory 'nowhere' to write 't.gguf' to" in nowhere.err
    directory = invoke("synth", "qwen2", str(tmp_path))
    assert "is a directory; name a file" in directory.err


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"will have 1152921504.61 GB; its disk has [0-9.]+ GB"):
        check_output(tmp_path / "huge.gguf", 1 << 60, force=False)
    check_output(tmp_path / "small.gguf", 1, force=False)


def test_a_disk_that_fills_up_meanwhile(invoke: Any, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        failed = invoke("synth", "qwen2", str(tmp_path / "t.gguf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.status == 2
    assert "OUT: 't.gguf' cannot be written: File too large" in failed.err
    assert list(tmp_path.iterdir()) == []


def test_the_summary() -> None:
    assert (
        described(12_100_000_000, 30.0, {"F32": 2, "MXFP4": 1})
        == "12.10 GB in 30.0 s (403 MB/s): F32 2, MXFP4 1"
    )
    assert described(1_500_000, 0.0, {"F32": 1}) == "1.5 MB in 0.0 s (1500 MB/s): F32 1"
