"""Files made to exhaust or mislead: refused at every boundary, in bounded time and memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_mutations import Mutator, add_tensor, replaced, write_tensors

from worker_orcd.errors import InvalidModelFile, LoadError
from worker_orcd.gguf import types
from worker_orcd.gguf.parse import parse
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import ValueType
from worker_orcd.gguf.writer import GGUFWriter

FUZZ = Path(__file__).parent.parent.parent / "benchmarks" / "fuzz_gguf.py"
SOURCE = FUZZ.parent.parent / "src"


def fuzz(*arguments: str) -> str:
    """Run the fuzzer, which limits its own address space."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, str(FUZZ), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_mutated_files_give_a_model_or_an_error() -> None:
    """The systematic cases and some random ones; benchmarks/fuzz_gguf.py itself runs more."""
    result = json.loads(fuzz("--count", "22000", "--seed", "11", "--json"))
    assert result["tried"] == 22000
    assert (result["crashes"], result["hangs"], result["unexpected"]) == (0, 0, 0)
    assert set(result["outcomes"]) <= {"valid", "InvalidModelFile", "UnsupportedFormat", "ModelNotFound"}
    assert min(result["outcomes"][kind] for kind in ("valid", "InvalidModelFile", "UnsupportedFormat")) > 500


@pytest.mark.slow
def test_the_fuzzer_notices_failures() -> None:
    assert "each noticed" in fuzz("--self-check")


def test_the_mutator_is_deterministic_and_starts_from_valid_files(tmp_path: Path) -> None:
    first, second = Mutator(3, tmp_path), Mutator(3, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for index in [0, 17, len(first.systematic) + 5, 10**9]:
        assert first.case(index) == second.case(index)
    assert first.case(10**9) != Mutator(4, tmp_path).case(10**9)
    for base in first.bases:
        for name, data in base.files.items():
            assert sum(field.size for field in first.fields[name]) == len(data)
            parse(data, len(data), name)


# ---- a few bytes of header in a large, sparse file --------------------------------------------------------


def header(num_tensors: int, num_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys)


def array(kind: ValueType, count: int) -> bytes:
    """The start of key "k", an array."""
    return struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", ValueType.ARRAY, kind, count)


BOMBS: dict[str, tuple[bytes, int]] = {
    # name: start of the file, size of the file (the rest is zero bytes and takes no disk)
    "strings, as many as allowed, empty": (
        header(0, 1) + array(ValueType.STRING, types.MAX_STRINGS),
        100 << 20,
    ),
    "strings, one more": (header(0, 1) + array(ValueType.STRING, types.MAX_STRINGS + 1), 100 << 20),
    "strings beyond the file": (header(0, 1) + array(ValueType.STRING, 2**60), 512 << 20),
    "one string of all there is": (
        header(0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2**28),
        512 << 20,
    ),
    "bytes, more than the header may take": (header(0, 1) + array(ValueType.UINT8, 1 << 28), 512 << 20),
    "floats, as many as fit": (header(0, 1) + array(ValueType.FLOAT64, 15 << 20), 200 << 20),
    "booleans, as many as fit": (header(0, 1) + array(ValueType.BOOL, 120 << 20), 200 << 20),
    "arrays of nothing": (header(0, 1) + array(ValueType.ARRAY, types.MAX_NESTED_ARRAYS), 100 << 20),
    "arrays of nothing, one more": (
        header(0, 1) + array(ValueType.ARRAY, types.MAX_NESTED_ARRAYS + 1),
        100 << 20,
    ),
    "keys": (header(0, types.MAX_KEYS), 100 << 20),
    "tensors": (header(types.MAX_TENSORS, 0), 100 << 20),
    "everything": (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 2**64 - 1), 1 << 40),
}


def sparse(path: Path, start: bytes, size: int) -> None:
    path.write_bytes(start)
    os.truncate(path, size)


LIMITED = """
import json, resource, sys, time
from pathlib import Path
from worker_orcd.errors import LoadError
from worker_orcd.gguf.reader import GGUFFile
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
results = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    started = time.process_time()
    try:
        GGUFFile(path)
        outcome = "valid"
    except LoadError as error:
        outcome = f"{type(error).__name__}: {error}"
    results[path.name] = (outcome, time.process_time() - started)
print(json.dumps(results))
"""


# Of processor time: up to a second where it was measured. A bomb that goes off costs minutes.
MOST_SECONDS = 20.0


def load_limited(directory: Path) -> dict[str, tuple[str, float]]:
    """Load every file of a directory in a process with 1 GiB of address space: {name: (outcome, seconds)}."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_bombs_cost_seconds_at_most_and_less_than_a_gigabyte(tmp_path: Path) -> None:
    for name, (start, size) in BOMBS.items():
        sparse(tmp_path / name, start, size)
    expected = dict.fromkeys(BOMBS, "InvalidModelFile")
    expected |= dict.fromkeys([name for name in BOMBS if "as allowed" in name or "as fit" in name], "valid")
    expected["arrays of nothing"] = "valid"
    for name in BOMBS:
        if BOMBS[name][1] >= 1 << 30:  # does not even fit into the address space
            expected[name] = "InsufficientMemory"
    results = load_limited(tmp_path)
    assert {name: outcome.split(":")[0] for name, (outcome, _) in results.items()} == expected
    slowest = max(results, key=lambda name: results[name][1])
    assert results[slowest][1] < MOST_SECONDS, slowest


@pytest.mark.slow
def test_the_largest_tables_cost_seconds_at_most(tmp_path: Path) -> None:
    """Valid files at the limits: most keys, most tensors, a large vocabulary, the longest strings."""
    with GGUFWriter(tmp_path / "keys") as writer:
        for i in range(types.MAX_KEYS):
            writer.add(f"some.metadata.key.{i}", i)
    with GGUFWriter(tmp_path / "tensors", alignment=8) as writer:
        for i in range(types.MAX_TENSORS):
            writer.add_tensor(f"blk.{i}.weight", (2,), 0, b"12345678")
    with GGUFWriter(tmp_path / "vocabulary") as writer:
        writer.add("tokens", [f"token {i}" for i in range(260_000)])
        writer.add("merges", [f"tok {i}" for i in range(280_000)])
    with GGUFWriter(tmp_path / "text") as writer:
        writer.add("wide", "\N{SMILE}" + "x" * (types.MAX_STRING_BYTES - 3))
    results = load_limited(tmp_path)
    assert {outcome for outcome, _ in results.values()} == {"valid"}, results
    slowest = max(results, key=lambda name: results[name][1])
    assert results[slowest][1] < MOST_SECONDS, slowest


# ---- one wrong field at a time ----------------------------------------------------------------------------


def one_tensor(dims: tuple[int, ...], number: int, offset: int = 0, *, size: int = 4096) -> bytes:
    entry = struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)
    return (header(1, 0) + entry).ljust(size, b"\0")


def message(data: bytes) -> str:
    with pytest.raises(InvalidModelFile) as caught:
        parse(data, len(data), "label")
    assert str(caught.value).startswith("label: ")
    return str(caught.value)


@pytest.mark.parametrize(
    "dims",
    [
        (2**42 + 1, 2**22),
        (2**32, 2**32),
        (2**63,),
        (2**64 - 1, 2**64 - 1),
        (2**21,) * 3,
        (2**16,) * 4,
        (0,),
        (4, 0),
        (0, 2**63),
    ],
)
def test_dimensions_whose_product_does_not_fit(dims: tuple[int, ...]) -> None:
    assert "dimensions" in message(one_tensor(dims, 0))


@pytest.mark.parametrize("dims", [(2**42 + 1,), (2**62,), (2**31, 2**31), (3, 7, 2**40), (2**63 - 1,)])
@pytest.mark.parametrize("number", [0, 1, 30])
def test_dimensions_that_the_file_cannot_hold(dims: tuple[int, ...], number: int) -> None:
    """Exact arithmetic: 2^62 float32s are 2^64 bytes, which is not 0."""
    nbytes = types.TENSOR_TYPES[number].type_size
    for dim in dims:
        nbytes *= dim
    text = message(one_tensor(dims, number))
    assert f"ends at byte {nbytes + 64 + 32 * (len(dims) > 1)}" in text or "needs a multiple" in text


@pytest.mark.parametrize("count", [0, 5, 6, 2**31, 2**32 - 1])
def test_numbers_of_dimensions(count: int) -> None:
    data = one_tensor((1,), 0)
    assert f"tensor 't' has {count} dimensions; allowed: 1 to 4" in message(
        replaced(data, 33, 4, struct.pack("<I", count))
    )


@pytest.mark.parametrize(("number", "columns"), [(2, 16), (8, 33), (12, 128), (14, 257), (39, 1)])
def test_rows_are_whole_blocks(number: int, columns: int) -> None:
    assert "needs a multiple of" in message(one_tensor((columns, 32), number))


@pytest.mark.parametrize("offset", [1, 16, 31, 33, 2**63 + 1, 2**64 - 1])
def test_offsets_are_aligned(offset: int) -> None:
    assert f"offset {offset}, which is not a multiple of the alignment 32" in message(
        one_tensor((1,), 0, offset)
    )


@pytest.mark.parametrize("offset", [4096 - 64, 4096, 2**40, 2**63, 2**64 - 32])
def test_offsets_are_within_the_file(offset: int) -> None:
    data = one_tensor((1,), 0, offset)
    assert f"ends at byte {offset + 64 + 4}, but the file has 4096" in message(data)


@pytest.mark.parametrize(
    ("alignment", "kind"),
    [
        (0, ValueType.UINT32),
        (1, ValueType.UINT32),
        (4, ValueType.UINT32),
        (12, ValueType.UINT32),
        (33, ValueType.UINT32),
        (1 << 17, ValueType.UINT32),
        (2**32 - 1, ValueType.UINT32),
        (-32, ValueType.INT32),
        (2**63, ValueType.UINT64),
        (32.0, ValueType.FLOAT32),
        (True, ValueType.BOOL),
    ],
)
def test_alignments(tmp_path: Path, alignment: int | float, kind: ValueType) -> None:
    with GGUFWriter(tmp_path / "x.gguf") as writer:
        writer.add("general.alignment", alignment, kind)
    assert "'general.alignment' is" in message((tmp_path / "x.gguf").read_bytes())


def two_tensors(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    with GGUFWriter(path) as writer:
        add_tensor(writer, "aaa", (16,), 0)
        add_tensor(writer, "bbb", (16,), 0)
    return change(path.read_bytes())


def test_tensors_do_not_overlap(tmp_path: Path) -> None:
    second = struct.pack("<IQIQ", 1, 16, 0, 64)
    for offset in (0, 32):
        overlapping = struct.pack("<IQIQ", 1, 16, 0, offset)
        data = two_tensors(tmp_path / "x.gguf", lambda data, new=overlapping: data.replace(second, new))
        assert "tensors 'aaa' and 'bbb' overlap at byte" in message(data)


def test_names_and_keys_occur_once(tmp_path: Path) -> None:
    data = two_tensors(tmp_path / "x.gguf", lambda data: data.replace(b"bbb", b"aaa"))
    assert "tensor 'aaa' occurs twice" in message(data)
    with GGUFWriter(tmp_path / "y.gguf") as writer:
        writer.add("aaa", 1)
        writer.add("bbb", 2)
    assert "metadata key 'aaa' occurs twice" in message(
        (tmp_path / "y.gguf").read_bytes().replace(b"bbb", b"aaa")
    )


def one_key(kind: ValueType, value: bytes, key: bytes = b"k") -> bytes:
    """A file with nothing else in it."""
    return header(0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def items(kind: ValueType, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def test_names_and_keys_are_not_empty() -> None:
    assert "metadata key 0 is empty" in message(one_key(ValueType.UINT8, b"\1" * 2, b""))
    data = one_tensor((1,), 0)
    assert "a tensor has an empty name" in message(replaced(data, 24, 9, bytes(8)))


@pytest.mark.parametrize("byte", [2, 255])
def test_booleans_are_zero_or_one(byte: int) -> None:
    stored = bytes([byte])
    assert f"'k' is a boolean stored as {byte}" in message(one_key(ValueType.BOOL, stored))
    array = items(ValueType.BOOL, 3, b"\0\1" + stored)
    assert f"'k' holds a boolean stored as {byte}" in message(one_key(ValueType.ARRAY, array))


def test_nesting() -> None:
    deep = items(ValueType.UINT8, 1, b"\7")
    for _ in range(types.MAX_NESTING - 1):
        deep = items(ValueType.ARRAY, 1, deep)
    data = one_key(ValueType.ARRAY, deep)
    assert parse(data, len(data), "label").metadata.raw("k") == [[[7]]]
    assert "'k' nests arrays more than 4 deep" in message(
        one_key(ValueType.ARRAY, items(ValueType.ARRAY, 1, deep))
    )


def test_counts_are_compared_with_the_bytes_that_are_left() -> None:
    data = one_key(ValueType.UINT8, b"\1")
    for count in (2, 2**63, 2**64 - 1):
        more = replaced(data, 16, 8, struct.pack("<Q", count))
        assert f"the header announces {count} metadata keys; at most 1 are possible" in message(more)
    data = one_tensor((1,), 0, size=24 + 33 + 32)
    for count in (2, 2**63, 2**64 - 1):
        more = replaced(data, 8, 8, struct.pack("<Q", count))
        assert f"the header announces {count} tensors; at most 1 are possible" in message(more)


@pytest.mark.parametrize(
    ("kind", "item"),
    [(ValueType.STRING, string(b"")), (ValueType.UINT64, bytes(8)), (ValueType.BOOL, b"\0")],
)
def test_an_array_ends_within_the_file(kind: ValueType, item: bytes) -> None:
    for count in (3, 2**20):
        text = message(one_key(ValueType.ARRAY, items(kind, count, item * 2)))
        assert (
            f"metadata key 'k' needs {count * len(item)} bytes at byte 49, but only {2 * len(item)} are"
            in text
        )


@pytest.mark.parametrize("last", [ValueType.STRING, ValueType.ARRAY])
def test_the_last_string_of_a_file_ends_within_it(last: ValueType) -> None:
    value = (
        string(b"abc")
        if last is ValueType.STRING
        else items(ValueType.STRING, 2, string(b"a") + string(b"bc"))
    )
    data = one_key(last, value)
    parse(data, len(data), "label")
    assert "metadata key 'k'" in message(data[:-1])


def test_strings_have_a_limit(tmp_path: Path) -> None:
    long_key = b"k" * (types.MAX_KEY_BYTES + 1)
    assert "metadata key 0 is 65536 bytes long; at most 65535" in message(
        one_key(ValueType.UINT8, b"\1", long_key)
    )
    data = one_key(ValueType.UINT8, b"\1", long_key[1:])
    parse(data, len(data), "label")
    too_long = struct.pack("<Q", types.MAX_STRING_BYTES + 1)
    path = tmp_path / "long"
    for value, text in (
        (one_key(ValueType.STRING, too_long), "'k' is 67108865 bytes long; at most 67108864 are allowed"),
        (one_key(ValueType.ARRAY, items(ValueType.STRING, 1, too_long)), "'k', string 0, has 67108865 bytes"),
    ):
        sparse(path, value, 70 << 20)
        with pytest.raises(InvalidModelFile, match=text):
            GGUFFile(path)


@pytest.mark.parametrize("raw", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_text_is_utf8(tmp_path: Path, raw: bytes) -> None:
    good = b"@" * len(raw)
    with GGUFWriter(tmp_path / "x.gguf") as writer:
        writer.add("tokenizer.ggml.tokens", ["a", good.decode()])
    data = (tmp_path / "x.gguf").read_bytes().replace(good, raw)
    assert "metadata key 'tokenizer.ggml.tokens', string 1, is not valid UTF-8 (byte 0)" in message(data)


def test_no_file_cut_anywhere_loads(tmp_path: Path) -> None:
    """Every length but the whole one, of a file with every tensor type."""
    path = tmp_path / "x.gguf"
    write_tensors(path)
    data = path.read_bytes()
    for size in range(len(data)):
        with pytest.raises(LoadError):
            parse(data[:size], size, "label")
    parse(data, len(data), "label")
    assert path.stat().st_size == len(data)
    with GGUFFile(path) as file:
        assert max(tensor.offset + tensor.nbytes for tensor in file.tensors.values()) == len(data)
