"""A traced, fused and placed program computes what the model is, with operations that need no GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import MODELS, Tiny, load_runner
from tiny_variants import VARIANTS, tiny_file
from torch_launcher import on_torch

from fp8_reference import RoundedReference
from gguf import GGMLQuantizationType as GGMLType
from worker_orcd.config import EngineConfig
from worker_orcd.errors import Internal
from worker_orcd.kernels.backend import AttentionParams, Counts, Glu, Limits, Matrix
from worker_orcd.kernels.cpu.reference import ReferenceBackend
from worker_orcd.kernels.cuda.executor import Arena, bucket_for, buckets
from worker_orcd.kernels.cuda.fuse import fuse
from worker_orcd.kernels.cuda.inputs import Bucket, Staging
from worker_orcd.kernels.cuda.program import (
    Add,
    Attend,
    Cast,
    Embed,
    Gated,
    Gelu,
    Linear,
    Norm,
    Operation,
    Rows,
    Take,
    fresh,
)
from worker_orcd.kernels.cuda.weights import PackedMatrix, Uploader
from worker_orcd.quant import BY_NAME
from worker_orcd.runner.scoring import score

CPU = torch.device("cpu")
ENGINE = EngineConfig(max_num_seqs=64, max_num_batched_tokens=64)
PROMPT = np.random.default_rng(7).integers(0, 320, 60).tolist()
ALL = MODELS | VARIANTS


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gemma3"])
def test_logits_are_those_of_the_reference_up_to_rounding(name: str, tmp_path: Path) -> None:
    path = tiny_file(ALL[name]).write(tmp_path / "tiny.gguf")
    backend, made = on_torch()
    found = score(load_runner(path, backend, ENGINE), PROMPT, 20)
    wanted = score(load_runner(path, ReferenceBackend(), ENGINE), PROMPT)
    error = np.abs(found - wanted).max(axis=1) / np.ptp(wanted, axis=1)
    assert 0 < error.max() < 1e-2  # of float16 and bfloat16 operands
    assert made


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_keys_and_values_can_be_fp8(name: str, tmp_path: Path) -> None:
    path = tiny_file(ALL[name]).write(tmp_path / "tiny.gguf")
    backend, _ = on_torch(fp8_cache=True)
    found = score(load_runner(path, backend, ENGINE), PROMPT, 20)
    exact = score(load_runner(path, ReferenceBackend(), ENGINE), PROMPT)
    rounded = score(load_runner(path, RoundedReference(), ENGINE), PROMPT)
    near, far = (np.abs(found - one).max() / np.ptp(exact) for one in (rounded, exact))
    assert far > 1e-2  # float16 would be nearer: see the test above
    assert near < far / 2 and near < 0.1  # a rounded key may become another one for a trifle


def test_an_fp8_cache_is_half_as_large() -> None:
    small, large = on_torch(fp8_cache=True)[0], on_torch()[0]
    assert 2 * small.cache_block_bytes(16, 8, 96) == large.cache_block_bytes(16, 8, 96)
    for backend in (small, large):
        stored = backend.allocate_cache(3, 16, 8, 96).tensor
        assert stored.nbytes == 3 * backend.cache_block_bytes(16, 8, 96)
    assert small.description.endswith("fp8 KV cache") and large.description.endswith("float16 KV cache")


def kinds(tiny: Tiny, tmp_path: Path) -> list[Operation]:
    backend, made = on_torch()
    load_runner(tiny_file(tiny).write(tmp_path / "tiny.gguf"), backend, ENGINE)
    return made[0].operations


def test_a_layer_is_few_operations(tmp_path: Path) -> None:
    """Sums, gated units, rotating and storing are epilogues of products."""
    counted = Counter(type(one) for one in kinds(ALL["phi3"], tmp_path))
    assert counted == {
        Embed: 1, Norm: 5, Linear: 9, Attend: 2, Take: 1,
    }  # fmt: skip


def test_operands_are_rounded_where_they_are_made(tmp_path: Path) -> None:
    operations = kinds(ALL["phi3"], tmp_path)
    assert not [one for one in operations if isinstance(one, Cast)]
    for one in operations:
        if isinstance(one, Linear) and isinstance(one.weight, PackedMatrix):
            assert one.x.buffer.dtype == torch.float16
        if isinstance(one, Linear):
            plain = one.glu is None and one.heads is None
            assert one.out.buffer.dtype == (torch.float32 if plain else torch.float16)


def test_operands_of_two_types_are_cast_once_each(tmp_path: Path) -> None:
    tiny = replace(MODELS["llama"], formats={"attn_q": GGMLType.Q8_0, "attn_k": GGMLType.BF16})
    operations = kinds(tiny, tmp_path)
    casts = [one for one in operations if isinstance(one, Cast)]
    of_first = [one.out.buffer.dtype for one in casts if one.x.buffer is casts[0].x.buffer]
    assert sorted(map(str, of_first)) == ["torch.bfloat16", "torch.float16"]
    readers = [one for one in operations if isinstance(one, Linear) and one.x.buffer is casts[0].out.buffer]
    assert readers


SAME = {"ffn_gate": GGMLType.Q8_0, "ffn_up": GGMLType.Q8_0, "ffn_down": GGMLType.Q4_0}


@pytest.mark.parametrize(
    ("tiny", "glu"),
    [(replace(MODELS["llama"], formats=SAME), Glu.SWIGLU), (replace(ALL["gemma3"], formats=SAME), Glu.GEGLU)],
    ids=["llama", "gemma3"],
)
def test_a_gated_unit_is_its_product_s(tiny: Tiny, glu: Glu, tmp_path: Path) -> None:
    """And what it makes is what the product that reads it takes."""
    path = tiny_file(tiny).write(tmp_path / "tiny.gguf")
    backend, made = on_torch()
    found = score(load_runner(path, backend, ENGINE), PROMPT[:16], 16)
    wanted = score(load_runner(path, ReferenceBackend(), ENGINE), PROMPT[:16])
    assert np.abs(found - wanted).max() < 1e-2 * np.ptp(wanted, axis=1).min()
    operations = made[0].operations
    gated = [one for one in operations if isinstance(one, Linear) and one.glu is not None]
    assert {one.glu for one in gated} == {glu}
    assert len(gated) == tiny.layers
    assert not [one for one in operations if isinstance(one, Gated)]
    assert {one.out.buffer.dtype for one in gated} == {torch.float16}


def test_a_gated_unit_of_two_formats_is_a_launch(tmp_path: Path) -> None:
    tiny = replace(MODELS["llama"], formats={"ffn_gate": GGMLType.Q8_0, "ffn_up": GGMLType.Q4_1})
    operations = kinds(tiny, tmp_path)
    assert len([one for one in operations if isinstance(one, Gated)]) == tiny.layers
    assert all(one.glu is None for one in operations if isinstance(one, Linear))


def test_only_what_is_a_product_s_two_halves_is_gated_in_it() -> None:
    fmt = BY_NAME["Q8_0"]
    rows = np.zeros((32, 34), np.uint8)
    for gated, halves, other, fused in (
        (True, (0, 16), False, True),
        (False, (0, 16), False, False),  # rows do not alternate
        (True, (16, 0), False, False),  # gates are the first half
        (True, (0, 16), True, False),  # someone else wants the product
    ):
        (part,) = Uploader(CPU).weight([Matrix("w", fmt, 32, 32, rows)], gated=gated).parts
        x, out, y = fresh(32, Rows.TOKENS), fresh(32, Rows.TOKENS), fresh(16, Rows.TOKENS)
        gate, up = (out.columns(column, 16) for column in halves)
        operations: list[Operation] = [
            Linear(x=x, weight=part.weight, out=out),
            Gated(kind=Glu.SWIGLU, gate=gate, up=up, out=y),
        ]
        if other:
            operations.append(Gelu(x=out, out=fresh(32, Rows.TOKENS)))
        last = fresh(16, Rows.TOKENS)
        operations.append(Add(x=fresh(16, Rows.TOKENS), y=y, out=last))
        found = fuse(operations, last)
        assert [one.glu for one in found if isinstance(one, Linear)] == [Glu.SWIGLU if fused else None]
        assert len([one for one in found if isinstance(one, Gated)]) == (0 if fused else 1)
        assert [type(one) for one in found].count(Add) == 1  # a gated product takes no residual


def test_embeddings_are_scaled_where_they_are_read(tmp_path: Path) -> None:
    first = kinds(ALL["gemma3"], tmp_path)[0]
    assert isinstance(first, Embed) and first.scale == pytest.approx(96**0.5, rel=1e-2)


def test_a_sum_of_norms_stays_a_sum(tmp_path: Path) -> None:
    counted = Counter(type(one) for one in kinds(ALL["gemma3"], tmp_path))
    assert counted[Add] == 2 * len([one for one in kinds(ALL["gemma3"], tmp_path) if isinstance(one, Attend)])


# -- memory ------------------------------------------------------------------------------------------------

LIMITS = Limits(max_tokens=100, max_rows=8, max_blocks_per_row=5, block_size=16, num_groups=2)


def test_values_alive_at_once_do_not_share_memory() -> None:
    a, b, c = fresh(10, Rows.TOKENS), fresh(30, Rows.TOKENS), fresh(10, Rows.TOKENS)
    d = fresh(10, Rows.LOGITS, torch.float16)
    operations = [
        Gated(kind=Glu.SWIGLU, gate=a, up=a, out=b),
        Add(x=b, y=b, out=c),
        Take(x=c, out=d),
    ]
    arena = Arena(operations, d, LIMITS, CPU)
    bucket = Bucket(100, 8)
    arena.view(a, bucket).fill_(1)
    arena.view(b, bucket).fill_(2)
    assert bool((arena.view(a, bucket) == 1).all())
    arena.view(c, bucket).fill_(3)
    assert bool((arena.view(b, bucket) == 2).all())
    arena.view(d, bucket).fill_(4)
    assert bool((arena.view(c, bucket) == 3).all())
    assert arena.view(d, bucket).shape == (8, 10) and arena.view(d, bucket).dtype == torch.float16
    assert arena.num_bytes < 4 * 100 * (12 + 32 + 12 + 12)  # a and c, or c and d, share
    with pytest.raises(Internal, match="no operation wrote"):
        Arena(operations, fresh(1, Rows.TOKENS), LIMITS, CPU)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (7, 7), (100, 8), (512, 64), (8192, 256), (64, 256)])
def test_every_step_has_a_bucket(tokens: int, rows: int) -> None:
    found = buckets(Limits(max_tokens=tokens, max_rows=rows, max_blocks_per_row=1, block_size=16))
    assert len(found) <= 48 and len(set(found)) == len(found)
    for wanted in {1, 2, tokens // 3 + 1, tokens}:
        for logits in {0, 1, min(rows, wanted)}:
            bucket = bucket_for(Counts(min(wanted, tokens), 1, logits), found)
            assert bucket.tokens <= max(2 * wanted, 64) or bucket.tokens == tokens
    with pytest.raises(Internal, match="fits no bucket"):
        bucket_for(Counts(tokens + 1, 1, 1), found)


def test_a_step_is_padded_to_its_bucket() -> None:
    staging = Staging(LIMITS, CPU)
    host = staging.host
    for one in (host.token_ids, host.positions, host.slots, host.query_start, host.context_lens):
        one.fill_(9)
    host.logit_tokens.fill_(9)
    host.block_tables.fill_(7)
    host.context_lens[1] = 2 * LIMITS.block_size + 1
    staging.copy(Counts(3, 2, 1), Bucket(8, 4))
    device = staging.device
    assert device.token_ids[:9].tolist() == [9] * 3 + [0] * 5 + [9]
    assert device.positions[:8].tolist() == [9] * 3 + [0] * 5
    assert device.slots[:, :8].tolist() == [[9] * 3 + [0] * 5] * 2
    assert device.query_start.tolist() == [9] * 3 + [3] * 6
    assert device.context_lens.tolist() == [9, 2 * LIMITS.block_size + 1] + [0] * 6
    assert device.logit_tokens.tolist() == [9] + [0] * 7
    assert device.block_tables[:, :2].tolist() == [[[7] * 3 + [0] * 2] * 2] * 2  # as far as a row sees
    assert device.block_tables[:, 2:].sum() == 0


def test_what_was_filled_may_be_filled_again_while_it_is_copied() -> None:
    """Copies take turns in pinned memory: that of the step before last is free again."""
    staging = Staging(LIMITS, CPU)
    used: list[int] = []
    for token in (3, 4, 5):
        staging.host.token_ids.fill_(token)
        staging.host.context_lens[0] = LIMITS.block_size
        staging.host.block_tables[:, 0, 0] = token
        staging.copy(Counts(2, 1, 1), Bucket(2, 1))
        used.append(staging._sides[-1].buffer.data_ptr())
        assert staging._sides[-1].buffer.view(torch.int32)[0] == token
        assert staging.device.token_ids[:2].tolist() == [token] * 2
        assert staging.device.block_tables[:, 0, 0].tolist() == [token] * 2
    assert used[0] == used[2] != used[1]
    assert staging.host.token_ids.data_ptr() not in used


# -- what does not fit together ----------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused() -> None:
    backend, _ = on_torch()
    cache = backend.allocate_cache(4, 16, 2, 16)
    inputs = backend.allocate_inputs(LIMITS)
    x = fresh(96, Rows.TOKENS)
    params = AttentionParams(num_heads=4, num_kv_heads=1, head_dim=16, scale=1.0)
    with pytest.raises(Internal, match="outside compile"):
        backend.gelu(x)
    with pytest.raises(Internal, match="not runs of 7"):
        backend.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(Internal, match="cache has 2 of 16"):
        backend.attention(x, cache, inputs, params)
    with pytest.raises(Internal, match="96 columns, not 12"):
        backend.split(x, (4, 8))
    with pytest.raises(Internal, match="add: 96 columns of TOKENS, 96 of LOGITS"):
        backend.add(x, fresh(96, Rows.LOGITS))
