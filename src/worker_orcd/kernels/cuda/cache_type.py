"""
What numbers the KV cache on a GPU is made of: float16, or fp8 (e4m3fn).

An fp8 number has three bits of mantissa from 2**-6 to 448, and saturates. Keys, which can be larger, are
multiplied by KEY_SCALE before they are rounded to one, and scores divided by it: a power of two, which costs
no bits. So what is stored for a token depends on nothing but its key and value. That a scale of each token's
own brings nothing was measured: docs/perf/quality.md.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
NATIVE_FP8 = 89  # compute capability from which on there are instructions for it
KEY_SCALE = 0.125
