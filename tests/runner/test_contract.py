"""The bits of the CPU backend's answers, pinned: changing them is a new version of the contract.

The same on every instruction set, so the digests hold on any machine with the native kernels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from worker_orcd.config import CPUActivations, DeviceConfig, EngineConfig, WorkerConfig
from worker_orcd.kernels.cpu.build import LibraryUnavailable, load_library
from worker_orcd.runner.scoring import score
from worker_orcd.version import REPRODUCIBILITY_CONTRACT
from worker_orcd.worker import load

TOKEN_IDS = [1, *((i * 7919 + 13) % 49152 for i in range(39))]

PINNED: dict[int, dict[CPUActivations, str]] = {
    1: {
        "int8": "e7c91d49b44b95d4a712b85d8cee4f40bb8ae21ed66bdcec843d2e336bdba336",
        "int16": "29a6c8bd70d1e913d2f37ddf21ffd5921df9da6943df46e3d190d5fe9fd206a2",
        "float32": "9b20ef06e31b986a507b02b7df0bca3fae9da01812e558759c4c1d8671137355",
    }
}


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    try:
        load_library()
    except LibraryUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("activations", PINNED[1])
def test_the_bits_are_those_of_the_contract(activations: CPUActivations, demo_model: Path):
    config = WorkerConfig(
        model=str(demo_model),
        device=DeviceConfig(cpu_activations=activations, cpu_threads=2),
        engine=EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64),
    )
    loaded = load(config, warn=pytest.fail)
    logits = score(loaded.runner, TOKEN_IDS).astype("<f4")  # (40, 49152)
    loaded.close()
    assert hashlib.sha256(logits.tobytes()).hexdigest() == PINNED[REPRODUCIBILITY_CONTRACT][activations], (
        "the bits of answers have changed: raise version.REPRODUCIBILITY_CONTRACT and pin the new ones"
    )
