"""Small valid GGUF files, where their fields lie, and ways to break them.

Shared by the tests and benchmarks/fuzz_gguf.py. A case is determined by seed and index, on every machine. The
first cases are systematic: every field with every suspicious value, every truncation around every field; the
rest are random, with up to three changes on top of each other.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worker_orcd.gguf.types import LAYOUTS, TENSOR_TYPES, ValueType
from worker_orcd.gguf.writer import GGUFWriter

# What counts, lengths, dimensions and offsets are replaced with, besides their neighbours.
SUSPICIOUS = [0, 1, 7, 33, 255, 2**16, 2**20 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**42 + 1, 2**48]
SUSPICIOUS += [2**61, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
RAW = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"GGUF",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80",
    b"\0" * 40,
    b"\x80" * 33,
]


@dataclass(frozen=True)
class Field:
    start: int
    size: int
    kind: str  # "magic", "version", "count", "length", "text", "type", "scalar", "number", "data", "padding"


@dataclass(frozen=True)
class Base:
    """A valid model: one file, or the parts of a split one; the first is opened."""

    files: dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """What to write and what to open; `files` are all parts, one of them mutated."""

    description: str
    files: dict[str, bytes]

    @property
    def opened(self) -> str:
        return next(iter(self.files))


def random_bytes(seed: int, num_bytes: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8).tobytes()


def add_tensor(writer: GGUFWriter, name: str, shape: tuple[int, ...], number: int) -> None:
    kind = TENSOR_TYPES[number]
    num_weights = int(np.prod(shape))
    writer.add_tensor(
        name, shape, number, random_bytes(number, num_weights // kind.block_size * kind.type_size)
    )


def write_model(path: Path) -> None:
    """What a small llama looks like."""
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "llama")
        writer.add("general.file_type", 2)
        writer.add("llama.block_count", 1)
        writer.add("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "a", "é", "\N{SMILE}", ""])
        writer.add("tokenizer.ggml.scores", np.zeros(7, np.float32))
        writer.add("tokenizer.ggml.token_type", np.ones(7, np.int32))
        writer.add("tokenizer.ggml.merges", ["a é", "é a"])
        writer.add("tokenizer.ggml.add_bos_token", True)
        writer.add("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
        add_tensor(writer, "token_embd.weight", (7, 32), 8)
        add_tensor(writer, "blk.0.attn_q.weight", (4, 64), 2)
        add_tensor(writer, "blk.0.attn_norm.weight", (5,), 0)
        add_tensor(writer, "blk.0.ffn_up.weight", (2, 256), 12)


def write_values(path: Path) -> None:
    """Every type of value, and no tensor."""
    with GGUFWriter(path) as writer:
        for kind in LAYOUTS:
            value = kind is ValueType.BOOL or 1
            writer.add(kind.name, value, kind)
            writer.add(f"{kind.name}s", [value] * 3, kind)
        writer.add("nested", [[[["a", "b"], []], [["c"]]], [[["d"]]]])
        writer.add("empty", [])


def write_tensors(path: Path) -> None:
    """A block of every tensor type, widely aligned."""
    with GGUFWriter(path, alignment=256) as writer:
        for number, kind in TENSOR_TYPES.items():
            add_tensor(writer, f"{kind.name}.weight", (kind.block_size,), number)


def write_dims(path: Path) -> None:
    """Tensors of one to four dimensions, in version 2, narrowly aligned."""
    with GGUFWriter(path, alignment=8, version=2) as writer:
        add_tensor(writer, "a", (3,), 0)
        add_tensor(writer, "b", (3, 3), 1)
        add_tensor(writer, "c", (1, 3, 1), 30)
        add_tensor(writer, "d", (2, 1, 2, 32), 39)


def write_empty(path: Path) -> None:
    GGUFWriter(path).write()


def write_split(path: Path) -> None:
    """The first of two parts, and beside it the second."""
    for number in range(2):
        part = path.with_name(path.name.replace("-00001-", f"-0000{number + 1}-"))
        with GGUFWriter(part) as writer:
            writer.add("split.no", number, ValueType.UINT16)
            writer.add("split.count", 2, ValueType.UINT16)
            writer.add("split.tensors.count", 3, ValueType.INT32)
            for i in range(number + 1):
                add_tensor(writer, f"part{number}.{i}", (2, 32), 3)


def bases(directory: Path) -> list[Base]:
    """The valid models that mutations start from. `directory` is used and left empty."""
    writers: dict[str, Callable[[Path], None]] = {
        "model.gguf": write_model,
        "values.gguf": write_values,
        "tensors.gguf": write_tensors,
        "dims.gguf": write_dims,
        "empty.gguf": write_empty,
        "split-00001-of-00002.gguf": write_split,
    }
    found: list[Base] = []
    for name, write in writers.items():
        write(directory / name)
        parts = sorted(directory.iterdir())
        found.append(Base({part.name: part.read_bytes() for part in parts}))
        for part in parts:
            part.unlink()
    return found


def fields(data: bytes) -> list[Field]:
    """Every field of a valid file, in order and without gaps. Independent of the reader under test."""
    found: list[Field] = []
    alignment = 32

    def take(size: int, kind: str) -> int:
        start = found[-1].start + found[-1].size if found else 0
        found.append(Field(start, size, kind))
        return int.from_bytes(data[start : start + size], "little")

    def text() -> bytes:
        length = take(8, "length")
        take(length, "text")
        return data[found[-1].start : found[-1].start + length]

    def value(kind: ValueType) -> int:
        if kind is ValueType.STRING:
            text()
        elif kind is ValueType.ARRAY:
            item = ValueType(take(4, "type"))
            for _ in range(take(8, "count")):
                value(item)
        else:
            return take(LAYOUTS[kind].size, "scalar")
        return 0

    take(4, "magic")
    take(4, "version")
    num_tensors, num_keys = take(8, "count"), take(8, "count")
    for _ in range(num_keys):
        key = text()
        number = value(ValueType(take(4, "type")))
        alignment = number if key == b"general.alignment" else alignment
    nbytes: list[int] = []
    for _ in range(num_tensors):
        text()
        dims = [take(8, "number") for _ in range(take(4, "count"))]
        kind = TENSOR_TYPES[take(4, "type")]
        take(8, "number")
        nbytes.append(int(np.prod(dims)) // kind.block_size * kind.type_size)
    for size in nbytes:
        end = found[-1].start + found[-1].size
        take(-end % alignment, "padding")
        take(size, "data")
    return [field for field in found if field.size]


def suspicious(field: Field, data: bytes) -> list[bytes]:
    """What a field is systematically replaced with."""
    if field.kind in ("data", "padding"):
        return [b"", bytes(field.size + 1)]
    if field.kind in ("text", "magic"):
        return [*RAW, bytes(field.size), b"\xff" * field.size]
    old = int.from_bytes(data[field.start : field.start + field.size], "little")
    left = len(data) - field.start - field.size
    numbers = {
        *SUSPICIOUS,
        old - 1,
        old + 1,
        old * 2,
        old + 32,
        left - 1,
        left,
        left + 1,
        left // 8,
        len(data),
    }
    if field.kind == "type":
        numbers |= set(range(45))
    top = 256**field.size
    return sorted({(number % top).to_bytes(field.size, "little") for number in numbers if number != old})


def replaced(data: bytes, start: int, size: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + size :]


class Mutator:
    """Makes case number `index` of a seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.bases = bases(directory)
        self.fields = {name: fields(data) for base in self.bases for name, data in base.files.items()}
        self.systematic = list(self._systematic())

    def case(self, index: int) -> Case:
        if index < len(self.systematic):
            base, name, start, size, new = self.systematic[index]
            data = replaced(base.files[name], start, size, new)
            return Case(f"{name}: bytes {start}+{size} become {new[:40]!r}", {**base.files, name: data})
        rng = random.Random(f"{self.seed}:{index}")
        base = rng.choice(self.bases)
        name = rng.choice(list(base.files))
        data, steps = base.files[name], []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            mutate = rng.choice(MUTATIONS)
            data = mutate(self, rng, name, data)
            steps.append(mutate.__name__)
        return Case(f"{name}: {', '.join(steps)}", {**base.files, name: data})

    def _systematic(self) -> Iterator[tuple[Base, str, int, int, bytes]]:
        for base in self.bases:
            for name, data in base.files.items():
                yield base, name, 0, 0, b""  # unchanged: valid
                for field in self.fields[name]:
                    for new in suspicious(field, data):
                        yield base, name, field.start, field.size, new
                    for start in (field.start - 1, field.start, field.start + 1):
                        if 0 <= start <= len(data):
                            yield base, name, start, len(data) - start, b""
                            yield base, name, start, 0, b"\xff"
                            yield base, name, start, 1, b""
                yield base, name, len(data) - 1, 1, b""
                yield base, name, len(data), 0, b"\0"

    def field(self, rng: random.Random, name: str, data: bytes) -> Field:
        """One of the base's fields that still lies within the data."""
        kept = [field for field in self.fields[name] if field.start + field.size <= len(data)]
        return rng.choice(kept) if kept else Field(0, len(data), "text")


def set_field(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    field = mutator.field(rng, name, data)
    return replaced(data, field.start, field.size, rng.choice(suspicious(field, data) or [b""]))


def truncate(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    field = mutator.field(rng, name, data)
    end = rng.choice((field.start + rng.randint(-1, 1), rng.randrange(len(data) + 1)))
    return data[: max(0, end)]


def flip_bits(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16)) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def random_field(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    field = mutator.field(rng, name, data)
    return replaced(data, field.start, field.size, rng.randbytes(field.size))


def insert(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    start = mutator.field(rng, name, data).start + rng.randint(-1, 1)
    return replaced(data, max(0, start), 0, rng.choice((*RAW, rng.randbytes(rng.randrange(64)))))


def delete(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    start = mutator.field(rng, name, data).start + rng.randint(-1, 1)
    return replaced(data, max(0, start), rng.randrange(1, 64), b"")


def splice(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    """Fields of another valid file in place of some of this one's."""
    donor_name = rng.choice(list(mutator.fields))
    donor = next(base.files[donor_name] for base in mutator.bases if donor_name in base.files)
    first, last = sorted(rng.choices(mutator.fields[donor_name], k=2), key=lambda field: field.start)
    target = mutator.field(rng, name, data)
    size = rng.choice((0, target.size, last.start - first.start))
    return replaced(data, target.start, size, donor[first.start : last.start + last.size])


def repeat(mutator: Mutator, rng: random.Random, name: str, data: bytes) -> bytes:
    """A run of fields twice, with one more in a count: duplicate keys, tensors, array items."""
    own = mutator.fields[name]
    first = rng.randrange(len(own))
    last = own[min(len(own) - 1, first + rng.randrange(8))]
    run = data[own[first].start : last.start + last.size]
    data = replaced(data, last.start + last.size, 0, run)
    counts = [field for field in own[: first + 1] if field.kind == "count" and field.start + 8 <= len(data)]
    if not counts:
        return data
    count = rng.choice(counts)
    old = int.from_bytes(data[count.start : count.start + count.size], "little")
    return replaced(data, count.start, count.size, struct.pack("<Q", (old + 1) % 2**64)[: count.size])


MUTATIONS = [set_field, set_field, truncate, flip_bits, random_field, insert, delete, splice, repeat, repeat]
