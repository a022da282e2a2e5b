"""
What model, workspace and KV cache will take of a device's memory, decided before anything is loaded.

* The worker may use `memory_fraction` of what is available before loading. Weights and workspace come first.
* The KV cache is `kv_cache_size_mb` where that is set. Otherwise it is what can be used, not what there is:
  2048 tokens (or the context, if shorter) for each of `max_num_seqs` sequences, or one sequence of full
  length if that is more, as far as memory allows. A laptop's memory is not taken for a cache nobody fills.
  Layers with a sliding window get what their window can use: `cache_plan` says how much.
* One sequence of `max_model_len` tokens always fits, beside the null block. Where the length was not asked
  for it shrinks to what fits, and a note says so; where it was, too little memory is an error.
* A file may claim any context: blocks are at most `MAX_BLOCKS`, whatever memory there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.errors import InsufficientMemory, InvalidConfiguration
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Limits
from worker_orcd.model.config import ModelConfig, MoeConfig
from worker_orcd.runner.cache_plan import MAX_BLOCKS, CacheSizing, GroupPlan

TOKENS_PER_SEQUENCE = 2048  # of KV cache, for each sequence that may run at a time
MIN_MODEL_LEN = 256  # a context that memory cuts shorter than this serves nobody

_MIB = 1 << 20


class BackendSizes(Protocol):
    """The part of a Backend that a plan asks."""

    name: str

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int: ...

    def workspace_bytes(self, limits: Limits, widest: int, vocab_size: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    device: str  # a backend's name
    available_bytes: int  # before anything was loaded
    usable_bytes: int  # the part of it that the worker may take
    weights_bytes: int
    workspace_bytes: int
    block_size: int  # tokens in a block
    kv_groups: tuple[GroupPlan, ...]  # in the order of the model's `cache_groups`
    max_model_len: int  # tokens of the longest sequence
    notes: tuple[str, ...] = ()

    @property
    def kv_cache_bytes(self) -> int:
        return sum(group.num_bytes for group in self.kv_groups)

    @property
    def kv_cache_tokens(self) -> int:
        """How many tokens the first group holds; the null block holds none."""
        return (self.kv_groups[0].num_blocks - 1) * self.block_size

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.workspace_bytes + self.kv_cache_bytes

    def limits(self, engine: EngineConfig) -> Limits:
        return _limits(engine, self.max_model_len, len(self.kv_groups))

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for a table; the last row is the available memory."""
        cache = [(_name(group), group.num_bytes, self._remark(group)) for group in self.kv_groups]
        return [
            ("weights", self.weights_bytes, "as in the file"),
            ("workspace", self.workspace_bytes, "activations, logits, block tables"),
            *cache,
            ("total", self.total_bytes, f"of {mib(self.usable_bytes)} that may be used"),
            ("available", self.available_bytes, f"on {self.device}, before loading"),
        ]

    def _remark(self, group: GroupPlan) -> str:
        tokens = f"{(group.num_blocks - 1) * self.block_size} tokens in {group.num_blocks} blocks"
        if group.window is None:
            return f"{tokens}, at most {self.max_model_len} each"
        return f"{tokens}, of each sequence the last {group.window}"


def make_plan(
    config: ModelConfig,
    weights_bytes: int,
    sizes: BackendSizes,
    engine: EngineConfig,
    device: DeviceConfig,
    available_bytes: int,
) -> MemoryPlan:
    """Pure: nothing is measured or allocated. Raises InsufficientMemory or InvalidConfiguration.

    `weights_bytes`: see `tensor_bytes`. `available_bytes`: of the device, before the weights are loaded; see
    `Backend.available_memory`.
    """
    wanted_len = _wanted_model_len(config, engine)
    shortest_len = min(wanted_len, MIN_MODEL_LEN) if engine.max_model_len is None else wanted_len
    cache = _cache_sizing(config, sizes, engine, wanted_len)
    limits = _limits(engine, wanted_len, len(cache.windows))
    workspace_bytes = sizes.workspace_bytes(limits, _widest(config), config.vocab_size) + _table_bytes(limits)
    usable_bytes = int(available_bytes * device.memory_fraction)
    num_fitting = cache.fitting(usable_bytes - weights_bytes - workspace_bytes)
    num_least = cache.least(shortest_len)
    if device.kv_cache_size_mb is None:
        num_blocks = min(_wanted_blocks(cache), num_fitting)
    else:
        num_blocks = cache.fitting(device.kv_cache_size_mb * _MIB)
        if num_blocks < num_least:
            raise InsufficientMemory(
                f"kv_cache_size_mb is {device.kv_cache_size_mb}: a KV cache of that many MiB cannot hold a "
                f"sequence of {shortest_len} tokens of {quoted(config.name)} on {sizes.name}; it takes "
                f"{-(-cache.num_bytes(num_least) // _MIB)}"
            )
        num_least = num_blocks
    if num_fitting < num_least:
        required = weights_bytes + workspace_bytes + cache.num_bytes(num_least)
        raise InsufficientMemory(
            f"{quoted(config.name)} requires {mib(required)} ({mib(weights_bytes)} of weights, "
            f"{mib(workspace_bytes)} of workspace, {mib(cache.num_bytes(num_least))} of KV cache), but of "
            f"{mib(available_bytes)} available on {sizes.name} it may use {mib(usable_bytes)} "
            f"(memory fraction {device.memory_fraction:g})"
        )
    max_model_len = cache.longest(num_blocks)
    return MemoryPlan(
        device=sizes.name,
        available_bytes=available_bytes,
        usable_bytes=usable_bytes,
        weights_bytes=weights_bytes,
        workspace_bytes=workspace_bytes,
        block_size=engine.block_size,
        kv_groups=cache.groups(num_blocks),
        max_model_len=max_model_len,
        notes=_notes(config, engine, max_model_len),
    )


def tensor_bytes(file: GGUFFile) -> int:
    """What the file's tensors take as they are stored."""
    return sum(info.nbytes for info in file.tensors.values())


def mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"


def _wanted_model_len(config: ModelConfig, engine: EngineConfig) -> int:
    longest = min(config.context_length, (MAX_BLOCKS - 1) * engine.block_size)
    if engine.max_model_len is None:
        return longest
    if not 1 <= engine.max_model_len <= longest:
        raise InvalidConfiguration(
            f"max_model_len is {engine.max_model_len}; {quoted(config.name)} allows 1 to {longest}"
        )
    return engine.max_model_len


def _cache_sizing(
    config: ModelConfig, sizes: BackendSizes, engine: EngineConfig, model_len: int
) -> CacheSizing:
    block_bytes = dict.fromkeys(config.cache_groups, 0)
    for layer in config.layers:
        attention = layer.attention
        block_bytes[attention.window] += sizes.cache_block_bytes(
            engine.block_size, attention.num_kv_heads, attention.head_dim
        )
    return CacheSizing(
        windows=tuple(block_bytes),
        block_bytes=tuple(block_bytes.values()),
        engine=engine,
        model_len=model_len,
    )


def _num_blocks(num_tokens: int, engine: EngineConfig) -> int:
    return -(-num_tokens // engine.block_size)


def _wanted_blocks(cache: CacheSizing) -> int:
    """Of the first group."""
    engine, model_len = cache.engine, cache.model_len
    each = _num_blocks(min(model_len, TOKENS_PER_SEQUENCE), engine)
    wanted = 1 + max(engine.max_num_seqs * each, _num_blocks(model_len, engine))
    return cache.useful(cache.windows[0], min(wanted, MAX_BLOCKS))


def _limits(engine: EngineConfig, model_len: int, num_groups: int) -> Limits:
    return Limits(
        max_tokens=engine.max_num_batched_tokens,
        max_rows=engine.max_num_seqs,
        max_blocks_per_row=_num_blocks(model_len, engine),
        block_size=engine.block_size,
        num_groups=num_groups,
    )


def _table_bytes(limits: Limits) -> int:
    """The block tables of a step's inputs: int32, as wide for every row as for the longest."""
    return 4 * limits.num_groups * limits.max_rows * limits.max_blocks_per_row


def _name(group: GroupPlan) -> str:
    return "KV cache" if group.window is None else f"KV cache, window {group.window}"


def _widest(config: ModelConfig) -> int:
    """The widest activation: q, k and v; gate and up; or what the chosen experts give."""
    widths = [config.dim]
    for layer in config.layers:
        attention = layer.attention
        widths.append((attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim)
        slots = layer.ffn.top_k if isinstance(layer.ffn, MoeConfig) else 1
        widths.append(slots * max(2 * layer.ffn.dim, config.dim))
    return max(widths)


def _notes(config: ModelConfig, engine: EngineConfig, max_model_len: int) -> tuple[str, ...]:
    if max_model_len == (engine.max_model_len or config.context_length):
        return ()
    trained = f"{quoted(config.name)} was trained for {config.context_length} tokens"
    return (f"{trained}; the KV cache holds {max_model_len}, so longer requests are refused",)
