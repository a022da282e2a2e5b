"""
What time it is, for everything whose times are compared with each other: deadlines, waits, durations.

A worker has one clock, handed down from where it is built, so that a simulation can put its own in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]  # seconds since some moment; never goes back

MONOTONIC: Clock = time.monotonic
