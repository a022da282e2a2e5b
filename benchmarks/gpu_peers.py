"""What others make of the same models on a GPU: the figures that `gpu_engine.py` puts its own beside."""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Peers:
    """Tokens a second of others, summed over requests; where a peer's runs differed, its best."""

    llama_cpp: dict[int, int]  # decode, by requests
    vllm: dict[int, int]  # the same
    whole: dict[int, int]  # vLLM: all output tokens over the whole time
    prompt: int  # the best of both, one prompt of 512 tokens


SOURCE = (
    "measured 2026-11 on one NVIDIA H100 80GB HBM3, random weights of the true shapes: llama.cpp 0.5.0 CUDA,"
    " the same quantisation, its own benches, sampling not included; vLLM 0.26.0, bf16 (gpt-oss: MXFP4), 128"
    " tokens in and 128 out"
)
PEERS = {
    ("qwen2", 24, 896): Peers(
        llama_cpp={1: 874, 8: 3733, 32: 6735, 64: 9980, 128: 13023, 256: 19480},
        vllm={1: 550, 8: 4300, 32: 16500, 64: 26000, 128: 30000, 256: 48000},
        whole={64: 24000, 256: 37000},
        prompt=45200,
    ),
    ("phi3", 32, 3072): Peers(
        llama_cpp={1: 329, 8: 1487, 32: 3485, 64: 4158, 128: 4552, 256: 4722},
        vllm={1: 253, 8: 1845, 32: 5366, 64: 8091, 128: 10826, 256: 12230},
        whole={64: 7200, 256: 10600},
        prompt=21200,
    ),
    ("gpt-oss", 24, 2880): Peers(
        llama_cpp={1: 312, 8: 853, 32: 1499, 64: 2253, 128: 3021, 256: 4473},
        vllm={1: 313, 8: 1539, 32: 4657, 64: 8235, 128: 12822, 256: 18762},
        whole={64: 7000, 256: 14700},
        prompt=10500,
    ),
}  # architecture, layers, width: Qwen2.5-0.5B, Phi-3-mini, GPT-OSS-20B


def peers_of(config: ModelConfig) -> Peers | None:
    return PEERS.get((config.architecture, len(config.layers), config.dim))
