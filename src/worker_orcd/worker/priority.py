"""
Which thread gets a core first: the event loop before those that compute. Only on Linux.

Threads of equal rank take turns of some milliseconds, so on a machine whose cores all compute, whoever waits
for `/health` waits for a turn to end. The loop asks for short turns, which let it in at once (since Linux
6.12), and those that compute are nicer than it. Neither needs a privilege; what the kernel refuses is done
without. Measured in docs/perf/crowd.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from typing import ClassVar

LOOP_SLICE_NANOSECONDS = 100_000  # the least that Linux grants
COMPUTE_NICENESS = 5  # above the loop's
_MAX_NICENESS = 19
_ORDINARY = 0  # SCHED_OTHER: a thread that was given any other policy keeps it as it is

_SETATTR, _GETATTR = 0, 1
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # of the two; glibc has them by name since 2.41


class _Attributes(ctypes.Structure):
    """`struct sched_attr` of sched_setattr(2), in its first version. `runtime` 0 is the kernel's choice."""

    _fields_: ClassVar = [
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),  # nanoseconds
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    ]


def answer_first(thread_id: int = 0) -> None:
    """Let a thread (native id, 0: the caller) in as soon as it wakes. Threads that it starts inherit it."""
    _change(thread_id, niceness=0, slice_nanoseconds=LOOP_SLICE_NANOSECONDS)


def give_way(thread_id: int) -> None:
    """Let others in before this thread. Threads that it starts inherit it."""
    if not _change(thread_id, niceness=COMPUTE_NICENESS, slice_nanoseconds=0) and sys.platform == "linux":
        with contextlib.suppress(OSError):
            niceness = os.getpriority(os.PRIO_PROCESS, thread_id) + COMPUTE_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread_id, min(niceness, _MAX_NICENESS))


def slice_of(thread_id: int) -> int | None:
    """A thread's turn in nanoseconds; None where that cannot be known."""
    attributes = _attributes(thread_id)
    return attributes.runtime or None if attributes is not None else None


def _change(thread_id: int, *, niceness: int, slice_nanoseconds: int) -> bool:
    """Add to the niceness and set the turn. False if that cannot be done here."""
    attributes = _attributes(thread_id)
    if attributes is None or attributes.policy != _ORDINARY:
        return attributes is not None
    attributes.nice = min(attributes.nice + niceness, _MAX_NICENESS)
    attributes.runtime = slice_nanoseconds
    return _call(_SETATTR, thread_id, attributes, 0)


def _attributes(thread_id: int) -> _Attributes | None:
    attributes = _Attributes()
    attributes.size = size = ctypes.sizeof(_Attributes)
    return attributes if _call(_GETATTR, thread_id, attributes, size, 0) else None


def _call(which: int, thread_id: int, attributes: _Attributes, *numbers: int) -> bool:
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    call, thread, *rest = (ctypes.c_long(n) for n in (_CALLS[platform.machine()][which], thread_id, *numbers))
    return ctypes.CDLL(None).syscall(call, thread, ctypes.byref(attributes), *rest) == 0
