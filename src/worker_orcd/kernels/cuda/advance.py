"""
Moves the rows of a step on by a token.

Device code (Triton). A row that has drawn a token computes it next, and draws the one behind it, if it shall
draw one; else it is idle: what it computes is what it had, and goes to the null block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def advance(drawn, ints, token_ids, positions, context_lens, slots, block_tables, rows, slots_stride,
            tables_stride, tables_row_stride,
            POSITION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
            BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Programs: blocks of rows. `drawn` (rows,): the tokens; `ints` (fields, ROWS), see `draw_slab.Int`."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    position = tl.load(ints + POSITION * ROWS + row, mask=mask, other=0)  # of the token that was drawn
    goes_on = mask & (position < tl.load(ints + LAST * ROWS + row, mask=mask, other=0))
    tl.store(token_ids + row, tl.load(drawn + row, mask=mask), mask=mask)
    tl.store(positions + row, position.to(tl.int32), mask=goes_on)
    tl.store(context_lens + row, (position + 1).to(tl.int32), mask=goes_on)
    for group in tl.static_range(GROUPS):
        entry = block_tables + group * tables_stride + row * tables_row_stride + position // BLOCK_SIZE
        block = tl.load(entry, mask=goes_on, other=0)
        slot = tl.where(goes_on, block * BLOCK_SIZE + (position % BLOCK_SIZE).to(tl.int32), 0)
        tl.store(slots + group * slots_stride + row, slot, mask=mask)
    tl.store(ints + POSITION * ROWS + row, position + 1, mask=goes_on)
