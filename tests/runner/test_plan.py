"""The memory plan: what it promises, how settings steer it, and how it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.config import DeviceConfig, EngineConfig
from worker_orcd.errors import InsufficientMemory, InvalidConfiguration
from worker_orcd.kernels.backend import AttentionParams, Limits, RopeParams
from worker_orcd.kernels.memory import Widths, Workspaces
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig
from worker_orcd.runner.cache_plan import MAX_BLOCKS
from worker_orcd.runner.plan import Measured, MemoryPlan, make_plan

MIB = 1 << 20


class Sizes:
    """A backend with a float16 cache and a round workspace."""

    name = "cpu"

    def __init__(self, workspace: int = MIB, sampler: int = 0, graphs: int = 0) -> None:
        self.workspace, self.sampler, self.graphs = workspace, sampler, graphs
        self.asked: list[tuple[Limits, Widths]] = []

    def cache_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * 2 * block_size * num_kv_heads * head_dim

    def workspaces(self, limits: Limits, widths: Widths) -> Workspaces:
        self.asked.append((limits, widths))
        return Workspaces(buffers_bytes=self.workspace, sampler_bytes=self.sampler, graphs_bytes=self.graphs)


def model(context_length: int = 8192, windows: Sequence[int | None] = (None,)) -> ModelConfig:
    """SmolLM2-135M's shape: 768 bytes of cache a token in each of 30 layers, whose windows take turns."""
    layers = [
        LayerConfig(
            attention=AttentionParams(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125, window=window),
            rope=RopeParams(rotary_dim=64, inv_freq=(1.0,) * 32),
            ffn=FfnConfig(dim=1536),
        )
        for window in windows
    ]
    return ModelConfig(
        architecture="llama",
        name="smol",
        vocab_size=49152,
        dim=576,
        context_length=context_length,
        norm_eps=1e-5,
        tied_embeddings=True,
        layers=tuple(layers) * (30 // len(layers)),
    )


def plan(
    available: int,
    *,
    weights: int = 96 * MIB,
    context: int = 8192,
    windows: Sequence[int | None] = (None,),
    **kwargs: Any,
) -> MemoryPlan:
    engine = {name: value for name, value in kwargs.items() if name in EngineConfig.__slots__}
    device = {name: value for name, value in kwargs.items() if name in DeviceConfig.__slots__}
    assert len(engine) + len(device) == len(kwargs)
    return make_plan(
        model(context, windows), weights, Sizes(), EngineConfig(**engine), DeviceConfig(**device), available
    )


def blocks(found: MemoryPlan) -> list[int]:
    return [group.num_blocks for group in found.kv_groups]


def test_a_large_machine_gets_what_can_be_used_and_no_more():
    found = plan(1 << 40)
    assert blocks(found) == [1 + 64 * 2048 // 16]
    assert found.max_model_len == 8192
    assert found.kv_cache_tokens == 64 * 2048
    assert found.kv_groups[0].block_bytes == 16 * 23040
    assert found.notes == ()
    assert blocks(plan(1 << 40, max_num_seqs=2)) == [1 + 8192 // 16]  # one full context is more
    assert blocks(plan(1 << 40, max_model_len=100)) == [1 + 64 * 7]  # 100 tokens are 7 blocks


def test_memory_limits_the_cache_before_the_length():
    found = plan(int(600 * MIB / 0.8))
    assert found.max_model_len == 8192
    assert blocks(found) == [(600 - 97) * MIB // (16 * 23040)]
    assert found.total_bytes <= found.usable_bytes == 600 * MIB


def test_a_length_that_was_not_asked_for_shrinks_and_says_so():
    found = plan(int(150 * MIB / 0.8))
    assert found.max_model_len == (blocks(found)[0] - 1) * 16 == 2384
    assert found.notes == (
        "'smol' was trained for 8192 tokens; the KV cache holds 2384, so longer requests are refused",
    )


def test_too_little_memory_names_both_numbers():
    with pytest.raises(InsufficientMemory) as info:
        plan(int(100 * MIB / 0.8))
    message = str(info.value)
    assert (
        "'smol' requires 103.1 MiB (96.0 MiB of weights, 1.1 MiB of workspace, 6.0 MiB of KV cache)"
        in message
    )
    assert "125.0 MiB available on cpu" in message
    assert "may use 100.0 MiB (memory fraction 0.8)" in message
    with pytest.raises(InsufficientMemory, match=r"requires 277\.5 MiB"):
        plan(int(150 * MIB / 0.8), max_model_len=8192)
    with pytest.raises(InsufficientMemory, match=r"may use 0\.0 MiB"):
        plan(0)


def test_settings_steer_it():
    assert plan(1 << 40, kv_cache_size_mb=200).kv_cache_bytes <= 200 * MIB
    assert blocks(plan(1 << 40, kv_cache_size_mb=200)) == [200 * MIB // (16 * 23040)]
    assert plan(1 << 40, kv_cache_size_mb=100).max_model_len == 283 * 16
    assert plan(1000 * MIB, memory_fraction=0.5).usable_bytes == 500 * MIB
    assert blocks(plan(1 << 40, block_size=32)) == [1 + 64 * 64]
    with pytest.raises(InsufficientMemory, match=r"kv_cache_size_mb is 20: .* a sequence of 2000 tokens"):
        plan(1 << 40, kv_cache_size_mb=20, max_model_len=2000)
    with pytest.raises(InsufficientMemory, match=r"199.\d MiB of KV cache"):
        plan(200 * MIB, kv_cache_size_mb=200)
    for length in (0, -1, 8193):
        with pytest.raises(InvalidConfiguration, match=f"max_model_len is {length}; 'smol' allows 1 to 8192"):
            plan(1 << 40, max_model_len=length)


def test_a_context_that_a_file_only_claims_costs_nothing():
    found = plan(1 << 50, context=1 << 30)
    assert blocks(found) == [MAX_BLOCKS] and found.max_model_len == (MAX_BLOCKS - 1) * 16
    assert found.notes[0].startswith("'smol' was trained for 1073741824 tokens; the KV cache holds 16777200")
    assert blocks(plan(1 << 50, kv_cache_size_mb=1 << 24)) == [MAX_BLOCKS]
    assert blocks(plan(1 << 50, max_num_seqs=4096, block_size=1)) == [MAX_BLOCKS]
    with pytest.raises(InvalidConfiguration, match="allows 1 to 16777200"):
        plan(1 << 50, context=1 << 30, max_model_len=1 << 30)
    assert MAX_BLOCKS * 256 < 1 << 31  # the largest block there is a setting for: slots are int32


def test_the_workspace_is_asked_for_what_will_run():
    sizes = Sizes()
    engine = EngineConfig(max_num_seqs=3, max_num_batched_tokens=77, block_size=8, max_model_len=20)
    found = make_plan(model(), 0, sizes, engine, DeviceConfig(), 1 << 40)
    limits = Limits(max_tokens=77, max_rows=3, max_blocks_per_row=3, block_size=8)
    assert sizes.asked == [(limits, Widths(3072, 49152, 64))]
    assert found.limits(engine) == limits
    assert found.workspace_bytes == MIB + 3 * 3 * 4  # and a block table


def test_the_table():
    rows = plan(1 << 40).rows()
    assert [row.what for row in rows] == ["weights", "workspace", "KV cache", "total", "reserve", "available"]
    sizes = {row.what: row.num_bytes for row in rows}
    assert sizes["weights"] + sizes["workspace"] + sizes["KV cache"] == sizes["total"]
    assert sizes["reserve"] == (1 << 40) - int(0.8 * (1 << 40))
    assert rows[2].remark == "131072 tokens in 8193 blocks, at most 8192 each"
    both = plan(1 << 40, windows=(None, 128)).rows()
    assert [row.what for row in both][2:4] == ["KV cache", "KV cache, window 128"]
    assert sum(row.num_bytes for row in both[:4]) == both[4].num_bytes
    assert both[3].remark == "27136 tokens in 1697 blocks, of each sequence the last 128"


def test_a_device_that_draws_has_two_rows_more():
    sizes = Sizes(sampler=5 * MIB, graphs=7 * MIB)
    found = make_plan(model(), 96 * MIB, sizes, EngineConfig(), DeviceConfig(), 1 << 40)
    rows = {row.what: row.num_bytes for row in found.rows()}
    assert (rows["sampler"], rows["graphs"]) == (5 * MIB, 7 * MIB)
    parts = ("weights", "workspace", "sampler", "graphs", "KV cache")
    assert sum(rows[what] for what in parts) == rows["total"] == found.total_bytes
    with pytest.raises(InsufficientMemory, match=r"5\.0 MiB of sampler, 7\.0 MiB of graphs"):
        make_plan(model(), 96 * MIB, sizes, EngineConfig(), DeviceConfig(), 130 * MIB)


def test_every_row_names_the_flag_that_would_change_it():
    found = plan(1 << 40, max_num_seqs=3, max_num_batched_tokens=77, memory_fraction=0.5)
    flags = {row.what: row.flag for row in found.rows()}
    assert flags["weights"] == "--model" and flags["workspace"] == "--max-num-batched-tokens 77"
    assert flags["reserve"] == "--vram-fraction 0.5" and flags["total"] == flags["available"] == ""
    name, _, value = flags["KV cache"].partition(" ")
    assert name == "--kv-cache-size-mb"
    again = plan(1 << 40, max_num_seqs=3, max_num_batched_tokens=77, kv_cache_size_mb=int(value))
    assert 0 <= again.kv_cache_bytes - found.kv_cache_bytes <= MIB  # the plan as it is, asked for
    drawing = make_plan(model(), 0, Sizes(sampler=1, graphs=1), EngineConfig(), DeviceConfig(), 1 << 40)
    assert {row.flag for row in drawing.rows() if row.what in ("sampler", "graphs")} == {"--max-num-seqs 64"}


def test_a_refusal_says_what_would_help():
    def advice(available: int, **settings: Any) -> str:
        with pytest.raises(InsufficientMemory) as info:
            plan(available, **settings)
        return str(info.value).rpartition("; ")[2]

    assert advice(125 * MIB) == "--vram-fraction 0.83 would be enough"
    assert plan(125 * MIB, memory_fraction=0.83)
    assert advice(100 * MIB) == "a smaller model, or the same with fewer bits a weight, might fit"
    shorter = advice(200 * MIB, max_model_len=8192)
    assert shorter == "--max-model-len 2832 would fit"
    assert plan(200 * MIB, max_model_len=2832)
    smaller = advice(200 * MIB, kv_cache_size_mb=200)
    assert smaller == "--kv-cache-size-mb 62 would fit"
    assert plan(200 * MIB, kv_cache_size_mb=62)


def test_what_was_measured_takes_the_place_of_what_was_expected():
    """Weights that turned out larger and a neighbour that has taken memory meanwhile."""
    expected = plan(int(600 * MIB / 0.8))
    sizes = Sizes(workspace=1 << 40)
    found = make_plan(
        model(),
        0,
        sizes,
        EngineConfig(),
        DeviceConfig(),
        int(500 * MIB / 0.8),
        measured=Measured(100 * MIB, Workspaces(buffers_bytes=3 * MIB, sampler_bytes=2 * MIB)),
    )
    assert sizes.asked == [] and found.measured and not expected.measured
    assert (found.weights_bytes, found.workspace_bytes, found.sampler_bytes) == (100 * MIB, 3 * MIB, 2 * MIB)
    assert blocks(found) == [(500 - 105) * MIB // (16 * 23040)]
    assert blocks(found)[0] < blocks(expected)[0]
    assert found.rows()[0].remark == "as packed"
    with pytest.raises(InsufficientMemory, match=r"requires .* \(400\.0 MiB of weights"):
        spaces = Workspaces(buffers_bytes=MIB)
        make_plan(
            model(), 0, sizes, EngineConfig(), DeviceConfig(), 500 * MIB, measured=Measured(400 * MIB, spaces)
        )


# -- sliding windows ---------------------------------------------------------------------------------------


def test_windowed_layers_get_what_their_window_can_use():
    """The shape of GPT-OSS: every other layer sees 128 tokens, nine blocks at most."""
    found = plan(1 << 40, windows=(128, None), context=131072)
    assert [group.window for group in found.kv_groups] == [None, 128]
    assert [group.block_bytes for group in found.kv_groups] == [15 * 16 * 768] * 2
    # 64 sequences with nine blocks and one to spare, 512 tokens of a step, an eighth for the prefix cache.
    assert blocks(found) == [8193, 1 + 64 * 10 + 32 + 8193 // 8]
    full = plan(1 << 40, context=131072)
    assert 0.5 < found.kv_cache_bytes / full.kv_cache_bytes < 0.62
    assert found.limits(EngineConfig()).num_groups == 2
    assert found.workspace_bytes == MIB + 2 * 64 * 8192 * 4


def test_the_same_memory_holds_more_of_a_model_with_windows():
    memory = {"kv_cache_size_mb": 1000, "context": 131072}
    full, half = plan(1 << 40, **memory), plan(1 << 40, windows=(128, None), **memory)
    assert half.kv_cache_bytes <= 1000 * MIB < half.kv_cache_bytes + 2 * 15 * 16 * 768
    assert half.kv_cache_tokens > 1.5 * full.kv_cache_tokens
    assert half.max_model_len > 1.5 * full.max_model_len


def test_a_small_cache_is_the_same_for_all_layers():
    found = plan(1 << 40, windows=(None, 128), max_num_seqs=1, max_model_len=300)
    assert blocks(found) == [20, 20]
    found = plan(1 << 40, windows=(None, 128), max_num_seqs=64, max_model_len=64)
    assert blocks(found) == [1 + 64 * 4] * 2  # the window is longer than any sequence


def test_two_windows_beside_all():
    found = plan(1 << 40, windows=(64, None, 512), max_num_seqs=8, context=131072)
    assert [group.window for group in found.kv_groups] == [None, 512, 64]
    assert blocks(found) == [8193, 1 + 8 * 34 + 32 + 1024, 1 + 8 * 6 + 32 + 1024]


def test_a_model_of_windows_only_serves_lengths_it_has_no_blocks_for():
    found = plan(1 << 40, windows=(128,), max_num_seqs=1, context=1 << 20)
    assert found.max_model_len == 1 << 20
    # As many blocks as a full cache might want are not needed: 10, a step's 32, and an eighth of that wish.
    assert blocks(found) == [1 + 10 + 32 + (1 + (1 << 16)) // 8]
    found = plan(1 << 40, windows=(128,), max_num_seqs=1, context=1 << 20, kv_cache_size_mb=4)
    assert blocks(found) == [4 * MIB // (16 * 23040)]  # eleven: one sequence and a block
    assert found.max_model_len == 1 << 20
    with pytest.raises(InsufficientMemory, match=r"it takes 4$"):
        plan(1 << 40, windows=(128,), context=1 << 20, kv_cache_size_mb=3, max_model_len=1 << 20)
    found = plan(1 << 40, windows=(512,), context=1 << 20, kv_cache_size_mb=8)
    assert found.max_model_len == (blocks(found)[0] - 1) * 16 == 21 * 16  # less than a window
    assert found.notes


@given(
    available=st.integers(0, 1 << 34),
    context=st.integers(1, 200_000),
    block_size=st.integers(1, 64),
    max_num_seqs=st.integers(1, 256),
    max_model_len=st.none() | st.integers(1, 200_000),
    kv_cache_size_mb=st.none() | st.integers(1, 10_000),
    max_num_batched_tokens=st.integers(1, 1024),
    windows=st.just([None]) | st.lists(st.none() | st.integers(1, 5000), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_the_longest_sequence_always_fits(
    available: int,
    context: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_cache_size_mb: int | None,
    max_num_batched_tokens: int,
    windows: list[int | None],
):
    try:
        found = plan(
            available,
            context=context,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_size_mb=kv_cache_size_mb,
            max_num_batched_tokens=max_num_batched_tokens,
            windows=windows,
        )
    except (InsufficientMemory, InvalidConfiguration):
        return
    assert found.total_bytes <= found.usable_bytes
    assert 1 <= found.max_model_len <= context
    for group in found.kv_groups:
        usable = group.num_blocks - 1  # the null block is nobody's
        if group.window is None:
            assert found.max_model_len <= usable * block_size
        else:  # any token with what it sees, wherever blocks begin
            touched = -(-(group.window - 1) // block_size) + 1
            assert min(touched, -(-found.max_model_len // block_size)) <= usable
    if kv_cache_size_mb is not None:
        assert found.kv_cache_bytes <= kv_cache_size_mb * MIB
    assert all(group.num_blocks <= found.kv_groups[0].num_blocks for group in found.kv_groups)
    if max_model_len is not None:
        assert found.max_model_len == max_model_len
    elif found.max_model_len < context:
        assert found.notes
        assert found.max_model_len >= 256
