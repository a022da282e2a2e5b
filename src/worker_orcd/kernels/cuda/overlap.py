"""
How a kernel starts before the one before it has ended: programmatic dependent launch, on capability 9.0.

Device code (Triton). A kernel asks for what no kernel of the step writes (weights, the step's inputs), calls
`wait`, and only then reads activations or writes anything. All before it has then been done. So a kernel
before whose start two others were launched sees the first one's results at once; it must read them past L1,
which is emptied when a kernel starts. OVERLAP: 0 not at all; 1 the next kernel may start when all programs of
this one have begun; 2 it may when this one's programs end, or call `release`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Waits until all kernels before have ended."""
    if OVERLAP > 0:
        gdc_wait()
    if OVERLAP == 1:
        gdc_launch_dependents()


@triton.jit
def release(OVERLAP: tl.constexpr):
    """What is left of this program takes little: the next kernel may start."""
    if OVERLAP == 2:
        gdc_launch_dependents()
