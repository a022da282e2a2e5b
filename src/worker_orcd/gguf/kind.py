"""Which quantisation a file holds: its usual name, and how its bytes divide among tensor types."""

from __future__ import annotations

import math
from dataclasses import dataclass

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import TENSOR_TYPES

# general.file_type -> the mixture's name and the tensor type that gives it.
FILE_TYPES: dict[int, tuple[str, str]] = {
    0: ("F32", "F32"),
    1: ("F16", "F16"),
    2: ("Q4_0", "Q4_0"),
    3: ("Q4_1", "Q4_1"),
    7: ("Q8_0", "Q8_0"),
    8: ("Q5_0", "Q5_0"),
    9: ("Q5_1", "Q5_1"),
    10: ("Q2_K", "Q2_K"),
    11: ("Q3_K_S", "Q3_K"),
    12: ("Q3_K_M", "Q3_K"),
    13: ("Q3_K_L", "Q3_K"),
    14: ("Q4_K_S", "Q4_K"),
    15: ("Q4_K_M", "Q4_K"),
    16: ("Q5_K_S", "Q5_K"),
    17: ("Q5_K_M", "Q5_K"),
    18: ("Q6_K", "Q6_K"),
    21: ("Q2_K_S", "Q2_K"),
    25: ("IQ4_NL", "IQ4_NL"),
    32: ("BF16", "BF16"),
    38: ("MXFP4", "MXFP4"),
}


@dataclass(frozen=True, slots=True)
class TypeShare:
    """How much of a file is of one tensor type."""

    name: str
    num_tensors: int
    num_weights: int
    num_bytes: int


def type_shares(file: GGUFFile) -> list[TypeShare]:
    """One entry a tensor type that occurs, most bytes first."""
    tensors: dict[int, list[int]] = {}
    for tensor in file.tensors.values():
        share = tensors.setdefault(tensor.ggml_type, [0, 0, 0])
        share[0] += 1
        share[1] += math.prod(tensor.shape)
        share[2] += tensor.nbytes
    shares = [TypeShare(TENSOR_TYPES[number].name, *share) for number, share in tensors.items()]
    return sorted(shares, key=lambda share: (-share.num_bytes, share.name))


def quant_kind(file: GGUFFile) -> str:
    """The usual name of the file's quantisation: "Q4_K_M", "MXFP4", …; "none" for a file without tensors.

    `general.file_type` is believed where the file holds a tensor of the type it implies; otherwise the type
    of most weights gives the name.
    """
    shares = type_shares(file)
    file_type = file.metadata.raw("general.file_type")
    if isinstance(file_type, int) and file_type in FILE_TYPES:
        kind, main = FILE_TYPES[file_type]
        if any(share.name == main for share in shares):
            return kind
    return max(shares, key=lambda share: share.num_weights).name if shares else "none"
