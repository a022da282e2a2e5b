"""The numbers of the GGUF format: value types, tensor types, and the bounds we hold a file to.

After the GGUF specification (ggml, docs/gguf.md). The bounds are far above every published model and low
enough that a hostile file costs less than a second and a gigabyte.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_HEADER_BYTES = 128 << 20  # header, metadata and tensor table of one file
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16  # of all parts
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 64 << 20
MAX_STRINGS = 3 << 19  # in the arrays of one file
MAX_NESTED_ARRAYS = 1 << 16  # arrays within arrays, in one file
MAX_NESTING = 4
MAX_DIMS = 4
MAX_PARTS = 1024
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 16


class ValueType(enum.IntEnum):
    """How a metadata value is stored."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# How the scalars are stored, as numpy has it and as struct has it. A bool is a byte that must be 0 or 1.
DTYPES: dict[ValueType, np.dtype[np.generic]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
LAYOUTS = {kind: struct.Struct(f"<{code}") for kind, code in zip(DTYPES, "BbHhIif?Qqd", strict=True)}


@dataclass(frozen=True, slots=True)
class TensorType:
    """The layout of one of ggml's tensor types: rows are whole blocks."""

    name: str
    block_size: int  # weights
    type_size: int  # bytes


# By ggml type id: what a file may hold. `quant.ALL` has how to read each.
TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    20: TensorType("IQ4_NL", 32, 18),
    30: TensorType("BF16", 1, 2),
    39: TensorType("MXFP4", 32, 17),
}

# Types that other programs know and we do not: named in the error.
UNSUPPORTED_TENSOR_TYPES: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}
