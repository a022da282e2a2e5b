"""Our runner, driven one step at a time for one sequence: the same work that a peer's `decode` call does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from worker_orcd.config import DeviceConfig, EngineConfig, WorkerConfig
from worker_orcd.runner.scoring import score
from worker_orcd.sequence import Row, SampledToken, SamplingParams, Sequence, Step
from worker_orcd.worker import load

Activations = Literal["int8", "int16", "float32"]


class Stepper:
    """A loaded model without scheduler and engine. One sequence at a time."""

    def __init__(self, path: Path, *, threads: int, activations: Activations, max_tokens: int = 512) -> None:
        config = WorkerConfig(
            model=str(path),
            device=DeviceConfig(device="cpu", cpu_threads=threads, cpu_activations=activations),
            engine=EngineConfig(max_num_seqs=64, max_num_batched_tokens=max_tokens, max_model_len=2048),
        )
        self.loaded = load(config, warn=lambda message: print(message, file=sys.stderr))

    def start(self, prompt_ids: list[int]) -> Sequence:
        """Compute the prompt and draw the first token, greedily."""
        size = self.loaded.engine_config.block_size
        sequence = Sequence(
            id=0,
            token_ids=list(prompt_ids),
            max_tokens=2048,
            stop_token_ids=frozenset(),
            sampling=SamplingParams(temperature=0.0),
        )
        sequence.block_tables = [list(range(1, 1 + 2048 // size)) for _ in self.loaded.plan.kv_groups]
        self.step(sequence)
        return sequence

    def step(self, sequence: Sequence) -> int:
        """Compute what is not computed yet and append the next token."""
        limit = self.loaded.engine_config.max_num_batched_tokens
        while True:
            row = Row.of(sequence, min(sequence.num_uncomputed_tokens, limit))
            (result,) = self.loaded.runner.launch(Step((row,))).wait()
            sequence.num_computed_tokens += row.num_tokens
            if isinstance(result, SampledToken):
                sequence.token_ids.append(result.token_id)
                return result.token_id
            if result is not None:
                raise RuntimeError(result.message)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """(len(ids), vocab_size): the logits at every position."""
        return score(self.loaded.runner, ids)

    def close(self) -> None:
        self.loaded.close()
