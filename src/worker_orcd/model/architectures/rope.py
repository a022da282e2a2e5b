"""
Rotary embeddings as GGUF files state them: frequencies in radians a position, every scaling folded in.

inv_freq[i] = base ** (-2i / rotary_dim), then what `rope.scaling.type` says: nothing; `linear`, positions
over a factor; `yarn` (Peng et al. 2023), low frequencies over the factor, high ones as they are; `longrope`
(Ding et al. 2024), each over a factor of its own, one set for contexts up to the original length and one for
longer ones. Llama 3's factors come in the tensor `rope_freqs.weight` and need no key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import InvalidModelFile, UnsupportedArchitecture
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import RopeParams
from worker_orcd.model.tensors import read_vector

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_MIN_FACTOR = 1e-3
_MAX_CONTEXT = 1 << 30


def read_rope(
    file: GGUFFile,
    head_dim: int,
    *,
    kinds: Sequence[str] = ("none", "linear", "yarn"),
    truncate: bool = True,
    factors: str | None = None,
) -> RopeParams:
    """Raises InvalidModelFile or UnsupportedArchitecture, naming the key.

    `kinds`: the values of `rope.scaling.type` that the architecture has. `truncate`: whether YaRN's range of
    dimensions is rounded to whole ones. `factors`: the tensor by which frequencies are divided.
    """
    metadata, prefix = file.metadata, _prefix(file)
    rotary_dim = metadata.integer(f"{prefix}.dimension_count", low=2, high=head_dim, default=head_dim)
    if rotary_dim % 2:
        raise InvalidModelFile(f"{prefix}.dimension_count is {rotary_dim}; it must be even")
    base = metadata.number(f"{prefix}.freq_base", low=1.0, high=1e12, default=10000.0)
    inv_freq = frequencies(base, rotary_dim)
    attention_factor = metadata.number(f"{prefix}.scaling.attn_factor", low=1e-3, high=1e3, default=1.0)
    kind = metadata.string(f"{prefix}.scaling.type", default="linear")
    if kind not in kinds:
        raise UnsupportedArchitecture(
            f"{prefix}.scaling.type is {quoted(kind)}; supported: {', '.join(kinds)}"
        )
    if kind == "linear":
        inv_freq = inv_freq / _factor(file, prefix)
    elif kind == "yarn":
        factor = _factor(file, prefix)
        inv_freq = _yarn(file, prefix, inv_freq, base, factor, truncate=truncate)
        attention_factor *= 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if factors is not None:
        inv_freq = inv_freq / _tensor_factors(file, factors, rotary_dim // 2)
    return rope_params(inv_freq, attention_factor)


def frequencies(base: float, rotary_dim: int) -> NDArray[np.float64]:
    """(rotary_dim // 2,) radians a position, unscaled."""
    return base ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def rope_params(inv_freq: NDArray[np.float64], attention_factor: float = 1.0) -> RopeParams:
    return RopeParams(
        rotary_dim=2 * len(inv_freq), inv_freq=tuple(inv_freq.tolist()), attention_factor=attention_factor
    )


def read_original_context(file: GGUFFile) -> int:
    """`rope.scaling.original_context_length`: for YaRN what it scales, for longrope where long begins."""
    return file.metadata.integer(f"{_prefix(file)}.scaling.original_context_length", low=1, high=_MAX_CONTEXT)


def _prefix(file: GGUFFile) -> str:
    return f"{file.metadata.string('general.architecture')}.rope"


def _factor(file: GGUFFile, prefix: str) -> float:
    """What positions are divided by; 1 where the file says nothing (or 0, as old converters wrote)."""
    metadata = file.metadata
    legacy = metadata.number(f"{prefix}.scale_linear", low=0.0, high=1e6, default=1.0)
    factor = metadata.number(f"{prefix}.scaling.factor", low=0.0, high=1e6, default=legacy) or 1.0
    if factor < _MIN_FACTOR:  # positions over it would leave the range of floats
        raise InvalidModelFile(
            f"{prefix}.scaling.factor is {factor:g}; allowed are 0 and {_MIN_FACTOR:g} to 1e6"
        )
    return factor


def _yarn(
    file: GGUFFile,
    prefix: str,
    inv_freq: NDArray[np.float64],
    base: float,
    factor: float,
    *,
    truncate: bool,
) -> NDArray[np.float64]:
    """Frequencies that turn fewer than `beta_slow` times in the original context are divided by the factor,
    those that turn more than `beta_fast` times are kept; between the two dimensions lies a linear ramp.
    """
    metadata, rotary_dim = file.metadata, 2 * len(inv_freq)
    fast = metadata.number(f"{prefix}.scaling.yarn_beta_fast", low=1e-3, high=1e6, default=32.0)
    slow = metadata.number(f"{prefix}.scaling.yarn_beta_slow", low=1e-3, high=1e6, default=1.0)
    if base == 1.0:
        raise InvalidModelFile(f"{prefix}.freq_base is 1, with which yarn has no dimensions to scale")
    original = read_original_context(file)
    low, high = (
        rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # no ramp, and no division by zero
    ramp = np.clip((np.arange(len(inv_freq)) - low) / (high - low), 0.0, 1.0)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp


def _tensor_factors(file: GGUFFile, name: str, count: int) -> NDArray[np.float64]:
    factors = read_vector(file, name, count).astype(np.float64)
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise InvalidModelFile(f"tensor '{name}' holds values that are not finite and positive")
    return factors
