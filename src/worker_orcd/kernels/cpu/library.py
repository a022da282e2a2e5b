"""
The native library as Python sees it: the structures and functions of orcd.h.

`Op` and `Batch` mirror `orcd_op` and `orcd_batch` field by field; the names here and there must agree. ctypes
releases the interpreter lock during every call.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

ABI_VERSION = 4


class Kind(enum.IntEnum):
    """orcd_kind."""

    LINEAR = 1
    EMBED = 2
    RMS_NORM = 3
    ROPE = 4
    STORE_KV = 5
    ATTENTION = 6
    SWIGLU = 7
    ADD = 8
    SCALE = 9
    TAKE = 10
    ROPE_ANGLES = 11
    EMBED_POSITIONS = 12
    LAYER_NORM = 13
    GELU = 14
    GEGLU = 15
    CLAMPED_SWIGLU = 16
    ROUTE = 17
    EXPERT_LINEAR = 18
    COMBINE = 19


class Rows(enum.IntEnum):
    """Which count of a step an operation's rows are."""

    TOKENS = 0
    LOGITS = 1


class Batch(ctypes.Structure):
    """orcd_batch."""

    _fields_: ClassVar[Any] = [
        *(
            (name, c_void_p)
            for name in (
                "token_ids",
                "positions",
                "slots",
                "query_start",
                "context_lens",
                "block_tables",
                "logit_tokens",
            )
        ),
        *((name, c_int64) for name in ("slots_stride", "block_group_stride", "block_table_stride")),
        *((name, c_int64) for name in ("num_tokens", "num_rows", "num_logits")),
    ]


class Op(ctypes.Structure):
    """orcd_op."""

    _fields_: ClassVar[Any] = [
        ("kind", c_int32),
        ("rows", c_int32),
        ("x", c_void_p),
        ("y", c_void_p),
        ("out", c_void_p),
        ("ldx", c_int64),
        ("ldy", c_int64),
        ("ldout", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("weight", c_void_p),
        ("format", c_int32),
        ("activations", c_int32),
        ("vector", c_void_p),
        ("width", c_int64),
        ("f0", c_float),
        ("f1", c_float),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("cache", c_void_p),
        ("cache_dtype", c_int32),
        ("group", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
    ]


class Task(ctypes.Structure):
    """orcd_task; only its size matters here."""

    _fields_: ClassVar[Any] = [
        ("op", c_void_p),
        ("batch", c_void_p),
        ("run", c_void_p),
        *((name, c_int64) for name in ("num_chunks", "p0", "p1", "p2", "p3")),
        ("scratch", c_void_p),
    ]


PLANNERS = {
    Kind.LINEAR: "orcd_plan_linear",
    Kind.EMBED: "orcd_plan_embed",
    Kind.EMBED_POSITIONS: "orcd_plan_embed",
    Kind.STORE_KV: "orcd_plan_store_kv",
    Kind.ATTENTION: "orcd_plan_attention",
    Kind.ROUTE: "orcd_plan_route",
    Kind.EXPERT_LINEAR: "orcd_plan_expert_linear",
}


class Library:
    """Typed access to one loaded library. Its thread pool and instruction set are the process's own."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        """Raises AttributeError if a function is missing."""
        self._handle = handle

        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = handle[name]
            found.restype = result
            found.argtypes = list(arguments)
            return found

        self.run = function("orcd_run", c_int, POINTER(Op), c_int32, POINTER(Batch))
        self._abi_version = function("orcd_abi_version", c_int)
        self._isa = function("orcd_isa", c_char_p)
        self._force_isa = function("orcd_force_isa", c_int, c_char_p)
        self._set_threads = function("orcd_set_threads", c_int, c_int, c_int)
        self._num_threads = function("orcd_num_threads", c_int)
        self._packed_bytes = function("orcd_packed_bytes", c_int64, c_int32, c_int64, c_int64)
        self._pack = function(
            "orcd_pack", c_int, c_int32, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p
        )
        self._cache_block_bytes = function(
            "orcd_cache_block_bytes", c_int64, c_int32, c_int32, c_int32, c_int32
        )
        self._watch_pages = function("orcd_watch_pages", c_int, c_void_p, c_int64)
        self._pages_lost = function("orcd_pages_lost", c_int, c_int)
        self._forget_pages = function("orcd_forget_pages", None, c_int)
        names = {*PLANNERS.values(), "orcd_plan_elementwise"}
        self._planners = {
            name: function(name, c_int, POINTER(Op), POINTER(Batch), POINTER(Task)) for name in names
        }

    @property
    def abi_version(self) -> int:
        return self._abi_version()

    @property
    def isa(self) -> str:
        """The instruction set of the kernels in use: "avx512vnni", "avx2", "neon" or "scalar"."""
        return self._isa().decode()

    def force_isa(self, name: str) -> bool:
        """Use another instruction set; False if this machine lacks it. For tests and benchmarks."""
        return self._force_isa(name.encode()) == 0

    @property
    def num_threads(self) -> int:
        return self._num_threads()

    def set_threads(self, num_threads: int, *, pin: bool = False) -> bool:
        """The size of the thread pool, the calling thread included; False if it cannot be that."""
        return self._set_threads(num_threads, int(pin)) == 0

    def packed_bytes(self, ggml_type: int, n: int, k: int) -> int | None:
        """Bytes of an (n, k) matrix once packed; None for a format or shape that has no kernel."""
        size = self._packed_bytes(ggml_type, n, k)
        return None if size < 0 else size

    def pack(
        self, ggml_type: int, shape: tuple[int, int], rows: tuple[int, int], source: int, target: int
    ) -> bool:
        """Re-arrange rows [rows[0], rows[0] + rows[1]) of an (n, k) matrix; addresses of bytes."""
        return self._pack(ggml_type, *shape, *rows, source, target) == 0

    def cache_block_bytes(
        self, block_size: int, num_kv_heads: int, head_dim: int, cache_dtype: int
    ) -> int | None:
        """Bytes of a KV block of one layer; None if there is no such layout (block_size: 16, 32, …)."""
        size = self._cache_block_bytes(block_size, num_kv_heads, head_dim, cache_dtype)
        return None if size < 0 else size

    def watch_pages(self, address: int, num_bytes: int) -> int | None:
        """Pages there that cannot be read become zeros; the number of the range. None where there are too
        many ranges.
        """
        number = self._watch_pages(address, num_bytes)
        return None if number < 0 else number

    def pages_lost(self, number: int) -> bool:
        """Whether that has happened in this range."""
        return self._pages_lost(number) != 0

    def forget_pages(self, number: int) -> None:
        """Before the range is unmapped."""
        self._forget_pages(number)

    def plan(self, op: Op, batch: Batch) -> int:
        """What the planner of one operation says: the number of its tasks, or a negative error."""
        planner = self._planners[PLANNERS.get(Kind(op.kind), "orcd_plan_elementwise")]
        return planner(op, batch, (Task * 2)())
