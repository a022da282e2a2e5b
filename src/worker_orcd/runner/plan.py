"""
What model, workspace and KV cache will take of a device's memory, decided before anything is loaded.

* The worker may use `memory_fraction` of what is available before loading. Weights and workspace come first.
* The KV cache is `kv_cache_size_mb` where that is set. Otherwise it is what can be used, not what there is:
  2048 tokens (or the context, if shorter) for each of `max_num_seqs` sequences, or one sequence of full
  length if that is more, as far as memory allows. A laptop's memory is not taken for a cache nobody fills.
  Layers with a sliding window get what their window can use: `cache_plan` says how much.
* One sequence of `max_model_len` tokens always fits, beside the null block. Where the length was not asked
  for it shrinks to what fits, and a note says so; where it was, too little memory is an error.
* On a GPU the plan is made again once the weights are loaded, from what they and a step's buffers do take and
  what the driver then has: see `measure`. Where that is too little, nothing more is taken.
* A file may claim any context: blocks are at most `MAX_BLOCKS`, whatever memory there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.errors import InsufficientMemory, InvalidConfiguration
from worker_orcd.gguf.metadata import quoted
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import Limits
from worker_orcd.kernels.memory import Widths, Workspaces
from worker_orcd.model.config import ModelConfig, MoeConfig
from worker_orcd.runner.cache_plan import MAX_BLOCKS, CacheSizing, GroupPlan

TOKENS_PER_SEQUENCE = 2048  # of KV cache, for each sequence that may run at a time
MIN_MODEL_LEN = 256  # a context that memory cuts shorter than this serves nobody

_MIB = 1 << 20


class BackendSizes(Protocol):
    """The part of a Backend that a plan asks."""

    name: str

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int: ...

    def workspaces(self, limits: Limits, widths: Widths) -> Workspaces: ...


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A line of a plan's table."""

    what: str
    num_bytes: int
    remark: str
    flag: str = ""  # what would change it, as it stands now


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    device: str  # a backend's name
    available_bytes: int  # before anything was loaded
    usable_bytes: int  # the part of it that the worker may take
    memory_fraction: float  # of what is available
    weights_bytes: int
    workspace_bytes: int
    sampler_bytes: int  # of a device that draws
    graphs_bytes: int  # and the code of kernels, at most
    block_size: int  # tokens in a block
    kv_groups: tuple[GroupPlan, ...]  # in the order of the model's `cache_groups`
    max_model_len: int  # tokens of the longest sequence
    max_num_seqs: int
    max_num_batched_tokens: int
    measured: bool = False  # weights, workspace and sampler are what they take, not what they may
    notes: tuple[str, ...] = ()

    @property
    def kv_cache_bytes(self) -> int:
        return sum(group.num_bytes for group in self.kv_groups)

    @property
    def kv_cache_tokens(self) -> int:
        """How many tokens the first group holds; the null block holds none."""
        return (self.kv_groups[0].num_blocks - 1) * self.block_size

    @property
    def fixed_bytes(self) -> int:
        """Of everything but the KV cache."""
        return self.weights_bytes + self.workspace_bytes + self.sampler_bytes + self.graphs_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.kv_cache_bytes

    def limits(self, engine: EngineConfig) -> Limits:
        return _limits(engine, self.max_model_len, len(self.kv_groups))

    def rows(self) -> list[PlanRow]:
        """A table; the last row is the available memory. What a device does not have is left out."""
        seqs = f"--max-num-seqs {self.max_num_seqs}"
        tokens = f"--max-num-batched-tokens {self.max_num_batched_tokens}"
        weights = "as packed" if self.measured else "as in the file"
        fixed = [
            PlanRow("weights", self.weights_bytes, weights, "--model"),
            PlanRow("workspace", self.workspace_bytes, "activations, logits, block tables", tokens),
            PlanRow("sampler", self.sampler_bytes, "draws, penalties and biases", seqs),
            PlanRow("graphs", self.graphs_bytes, "and the code of kernels, at most", seqs),
        ]
        cache_flag = f"--kv-cache-size-mb {-(-self.kv_cache_bytes // _MIB)}"
        cache = [
            PlanRow(_name(group), group.num_bytes, self._remark(group), cache_flag)
            for group in self.kv_groups
        ]
        reserve = self.available_bytes - self.usable_bytes
        fraction = f"--vram-fraction {self.memory_fraction:g}"
        return [
            *(row for row in fixed if row.num_bytes or row.what in ("weights", "workspace")),
            *cache,
            PlanRow("total", self.total_bytes, f"of {mib(self.usable_bytes)} that may be used"),
            PlanRow("reserve", reserve, "left to others", fraction),
            PlanRow("available", self.available_bytes, f"on {self.device}, before loading"),
        ]

    def _remark(self, group: GroupPlan) -> str:
        tokens = f"{(group.num_blocks - 1) * self.block_size} tokens in {group.num_blocks} blocks"
        if group.window is None:
            return f"{tokens}, at most {self.max_model_len} each"
        return f"{tokens}, of each sequence the last {group.window}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known once the weights are loaded."""

    weights_bytes: int  # as they lie on the device
    workspaces: Workspaces


def make_plan(
    config: ModelConfig,
    weights_bytes: int,
    sizes: BackendSizes,
    engine: EngineConfig,
    device: DeviceConfig,
    available_bytes: int,
    *,
    measured: Measured | None = None,
) -> MemoryPlan:
    """Pure: nothing is measured or allocated. Raises InsufficientMemory or InvalidConfiguration.

    `weights_bytes`: see `tensor_bytes`. `available_bytes`: of the device, before the weights are loaded; see
    `Backend.available_memory`. `measured` takes the place of what the file and the backend say.
    """
    wanted_len = _wanted_model_len(config, engine)
    shortest_len = min(wanted_len, MIN_MODEL_LEN) if engine.max_model_len is None else wanted_len
    cache = _cache_sizing(config, sizes, engine, wanted_len)
    known = measured or Measured(
        weights_bytes, _estimated(config, sizes, engine, wanted_len, len(cache.windows))
    )
    spaces = known.workspaces
    fixed_bytes = known.weights_bytes + spaces.total_bytes
    usable_bytes = int(available_bytes * device.memory_fraction)
    num_fitting = cache.fitting(usable_bytes - fixed_bytes)
    num_shortest = num_least = cache.least(shortest_len)
    num_blocks = min(_wanted_blocks(cache), num_fitting)
    if device.kv_cache_size_mb is not None:
        num_blocks = cache.fitting(device.kv_cache_size_mb * _MIB)
        if num_blocks < num_shortest:
            raise InsufficientMemory(
                f"kv_cache_size_mb is {device.kv_cache_size_mb}: a KV cache of that many MiB cannot hold a "
                f"sequence of {shortest_len} tokens of {quoted(config.name)} on {sizes.name}; it takes "
                f"{-(-cache.num_bytes(num_shortest) // _MIB)}"
            )
        num_least = num_blocks
    fits = num_fitting >= num_least
    num_blocks = num_blocks if fits else num_least
    max_model_len = cache.longest(num_blocks)
    plan = MemoryPlan(
        device=sizes.name,
        available_bytes=available_bytes,
        usable_bytes=usable_bytes,
        memory_fraction=device.memory_fraction,
        weights_bytes=known.weights_bytes,
        workspace_bytes=spaces.buffers_bytes,
        sampler_bytes=spaces.sampler_bytes,
        graphs_bytes=spaces.graphs_bytes,
        block_size=engine.block_size,
        kv_groups=cache.groups(num_blocks),
        max_model_len=max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        measured=measured is not None,
        notes=_notes(config, engine, max_model_len),
    )
    if not fits:
        raise InsufficientMemory(_refusal(plan, config, _advice(plan, cache, device, num_fitting)))
    return plan


def _estimated(
    config: ModelConfig, sizes: BackendSizes, engine: EngineConfig, model_len: int, num_groups: int
) -> Workspaces:
    """Upper bounds."""
    limits = _limits(engine, model_len, num_groups)
    ropes = {layer.rope for layer in config.layers if layer.rope is not None}
    widths = Widths(_widest(config), config.vocab_size, sum(rope.rotary_dim for rope in ropes))
    spaces = sizes.workspaces(limits, widths)
    return replace(spaces, buffers_bytes=spaces.buffers_bytes + _table_bytes(limits))


def tensor_bytes(file: GGUFFile) -> int:
    """What the file's tensors take as they are stored."""
    return sum(info.nbytes for info in file.tensors.values())


def mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"


def _advice(plan: MemoryPlan, cache: CacheSizing, device: DeviceConfig, num_fitting: int) -> str:
    """Which setting would make a plan fit that does not."""
    if device.kv_cache_size_mb is not None:
        fitting_mb = cache.num_bytes(num_fitting) // _MIB
        if cache.fitting(fitting_mb * _MIB) >= cache.least(MIN_MODEL_LEN):
            return f"--kv-cache-size-mb {fitting_mb} would fit"
    elif (longest := cache.longest(num_fitting)) >= MIN_MODEL_LEN:
        return f"--max-model-len {longest} would fit"
    if plan.total_bytes <= plan.available_bytes:
        percent = -(-100 * plan.total_bytes // plan.available_bytes)
        return f"--vram-fraction {percent / 100:g} would be enough"
    return "a smaller model, or the same with fewer bits a weight, might fit"


def _refusal(plan: MemoryPlan, config: ModelConfig, advice: str) -> str:
    """What a plan takes that does not fit, what there is, and what to do about it."""
    parts = {
        "weights": plan.weights_bytes,
        "workspace": plan.workspace_bytes,
        "sampler": plan.sampler_bytes,
        "graphs": plan.graphs_bytes,
        "KV cache": plan.kv_cache_bytes,
    }
    told = ", ".join(f"{mib(num_bytes)} of {what}" for what, num_bytes in parts.items() if num_bytes)
    return (
        f"{quoted(config.name)} requires {mib(plan.total_bytes)} ({told}), but of "
        f"{mib(plan.available_bytes)} available on {plan.device} it may use {mib(plan.usable_bytes)} "
        f"(memory fraction {plan.memory_fraction:g}); {advice}"
    )


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
