"""A model file is written by a stranger: what others' readers fell for, as ranges around every bound."""

from __future__ import annotations

import ast
import json
import os
import re
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf_mutations import write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from template_attacks import ESCAPES, EXHAUSTION
from text_vocabularies import tiny_bpe, tiny_spm
from tiny_models import MODELS
from tiny_variants import tiny_file

from worker_orcd.errors import InvalidModelFile, InvalidParameter, LoadError, UnsupportedFormat
from worker_orcd.gguf import types
from worker_orcd.gguf.metadata import Metadata
from worker_orcd.gguf.parse import parse
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.gguf.types import ValueType
from worker_orcd.model.architectures import configure
from worker_orcd.text.chat import ChatTemplate
from worker_orcd.text.template_process import RenderLimits
from worker_orcd.text.tokenizer import load_tokenizer
from worker_orcd.text.vocabulary import MAX_TOKEN_BYTES

SOURCE = Path(__file__).parents[2] / "src"
EDGES = sorted(
    {0} | {max(0, 2**k + d) for k in (4, 8, 16, 20, 26, 31, 32, 42, 53, 62, 63, 64) for d in (-1, 0, 1)}
)
U64 = [n for n in EDGES if n < 2**64]


def header(tensors, keys):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def key(name, kind, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def one_tensor(dims, number, offset, size):
    entry = struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)
    return (header(1, 0) + entry).ljust(size, b"\0")[:size]


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
        outcome = type(error).__name__
    results[path.name] = (outcome, time.process_time() - started)
print(json.dumps(results))
"""


def test_counts_and_lengths(tmp_path):
    """Every count of a file, from nothing to 2^64 - 1, in a process with 1 GiB of address space."""
    scalar = {kind: dtype.itemsize for kind, dtype in types.DTYPES.items()}
    for n in U64:
        cases = {
            "tensors": header(n, 0),
            "keys": header(0, n),
            "key": header(0, 1) + struct.pack("<Q", n),
            "text": header(0, 1) + key("k", ValueType.STRING, struct.pack("<Q", n)),
            "strings": header(0, 1) + key("k", ValueType.ARRAY, struct.pack("<IQ", ValueType.STRING, n)),
            "arrays": header(0, 1) + key("k", ValueType.ARRAY, struct.pack("<IQ", ValueType.ARRAY, n)),
            "string in a list": header(0, 1)
            + key("k", ValueType.ARRAY, struct.pack("<IQQ", ValueType.STRING, 1, n)),
            "name": header(1, 0) + struct.pack("<Q", n),
        }
        for kind in scalar:
            cases[f"array of {kind.name}"] = header(0, 1) + key("k", 9, struct.pack("<IQ", kind, n))
        for name, data in cases.items():
            (tmp_path / f"{name} {n}").write_bytes(data + b"\0" * 200)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    results = json.loads(done.stdout)
    assert len(results) > 500
    assert max(seconds for _, seconds in results.values()) < 1.0
    for name, (outcome, _) in results.items():
        fits = int(name.rpartition(" ")[2]) <= 200
        assert outcome == "InvalidModelFile" or fits, name
    assert "valid" in {outcome for outcome, _ in results.values()}


DIMS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 32, 256, *U64]), st.integers(1, 600))


@given(
    dims=st.lists(DIMS, min_size=1, max_size=4),
    number=st.sampled_from([*types.TENSOR_TYPES, 4, 28, 2**31, 2**32 - 1]),
    offset=st.one_of(
        st.sampled_from([0, 1, 31, 32, 33, 2**32, 2**63, 2**64 - 32]), st.integers(0, 2**64 - 1)
    ),
    size=st.integers(80, 5000),
)
@settings(max_examples=1500, deadline=None)
def test_integer_wrap(dims, number, offset, size):
    """A tensor is where whole numbers say that it is, or the file is refused."""
    data = one_tensor(dims, number, offset, size)
    try:
        (tensor,) = parse(data, len(data), "x").tensors
    except (InvalidModelFile, UnsupportedFormat):
        tensor = None
    kind = types.TENSOR_TYPES.get(number)
    product = int(np.prod(np.array(dims, dtype=object)))
    start = -(-(24 + 9 + 4 + 8 * len(dims) + 12) // 32) * 32
    nbytes = 0 if kind is None else product * kind.type_size // kind.block_size
    possible = (
        kind is not None
        and 0 < product < 2**63
        and dims[0] % kind.block_size == 0
        and offset % 32 == 0
        and start + offset + nbytes <= size
        and 24 + 9 + 4 + 8 * len(dims) + 12 <= size
    )
    assert (tensor is not None) == possible
    if tensor is not None:
        assert (tensor.nbytes, tensor.offset, tensor.shape) == (nbytes, start + offset, tuple(dims[::-1]))


def test_offsets_beyond_the_file(tmp_path):
    """Cut at each end of a tensor and beside it: refused, unless nothing of a tensor is missing."""
    path = tmp_path / "x.gguf"
    write_tensors(path)
    data = path.read_bytes()
    with GGUFFile(path) as file:
        ends = sorted(t.offset + t.nbytes for t in file.tensors.values())
        starts = [t.offset for t in file.tensors.values()]
        for tensor in file.tensors.values():
            assert len(file.data(tensor.name)) == tensor.nbytes
    assert ends[-1] == len(data)
    for cut in {max(0, min(len(data), place + d)) for place in (*starts, *ends) for d in (-1, 0, 1)}:
        path.write_bytes(data[:cut])
        if cut == len(data):
            GGUFFile(path).close()
            continue
        with pytest.raises(LoadError):
            GGUFFile(path)
    for more in (1, 31, 32, 4096):  # what is behind the tensors is nobody's
        path.write_bytes(data + b"\xff" * more)
        with GGUFFile(path) as file:
            assert max(t.offset + t.nbytes for t in file.tensors.values()) == ends[-1]


VALUES = [
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    -(2**63),
    0.0,
    -1.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "1",
]
VALUES += [True, False, np.array([0], np.int32), np.array([], np.int32), np.array([-1] * 100), ["a"], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_wrong_types(name, tmp_path):
    """Each number of a network, replaced by values of each kind: a network or a named error."""
    file = tiny_file(MODELS[name])
    names = [key for key in file.metadata() if key.startswith(f"{file.tiny.architecture}.")]
    assert len(names) >= 6
    for key_name in [*names, "general.architecture", "general.alignment", "tokenizer.ggml.tokens"]:
        for value in VALUES:
            changed = tiny_file(replace(MODELS[name], metadata={**MODELS[name].metadata, key_name: value}))
            try:
                path = changed.write(tmp_path / "x.gguf")
            except (ValueError, struct.error, OverflowError, TypeError, KeyError):
                continue  # nothing that a file could say
            try:
                with GGUFFile(path) as opened:
                    configured = configure(opened)
            except LoadError as error:
                assert len(str(error)) < 500
                continue
            assert all(
                0 < layer.attention.num_kv_heads <= layer.attention.num_heads for layer in configured.layers
            )


BAD_BYTES = [
    "<0x-1>",
    "<0x100>",
    "<0x1>",
    "<0x 1>",
    "<0xGG>",
    "<0x٣٤>",
    "<0x0A",
    "0x0A>",
    "<0x0A>\n",
    "<0X0A>",
]


@pytest.mark.parametrize("make", [tiny_bpe, tiny_spm])
def test_vocabulary(make):
    base = {key: make().raw(key) for key in make()}
    tokens = list(base["tokenizer.ggml.tokens"])

    def load(changed):
        return load_tokenizer(Metadata({**base, "tokenizer.ggml.tokens": changed}))

    for text in BAD_BYTES if make is tiny_spm else []:
        with pytest.raises(InvalidModelFile):
            load([*tokens[:4], text, *tokens[5:]])
    for text in (
        "",
        tokens[7],
        "x" * (MAX_TOKEN_BYTES + 1),
        "世" * (MAX_TOKEN_BYTES // 3 + 1),
        "x" * (1 << 20),
    ):
        with pytest.raises(InvalidModelFile):
            load([*tokens[:-1], text])
    with pytest.raises(InvalidModelFile):
        load([])
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        for value in (-1, len(tokens), len(tokens) + 1, 2**31, 2**32 - 1, 2**63 - 1, "1", True, 1.0):
            with pytest.raises(InvalidModelFile, match=f"{name}_token_id"):
                load_tokenizer(Metadata({**base, f"tokenizer.ggml.{name}_token_id": value}))


@pytest.mark.parametrize(
    "source", [*ESCAPES[::9], *EXHAUSTION[::4], "{% for i in range(10**9) %}x{% endfor %}"]
)
def test_chat_template_in_the_file(source, tmp_path):
    """The whole corpora are in tests/text; here one of each family, and a limit from both sides."""
    canary = tmp_path / "canary"
    before, begun = psutil.Process().memory_info().rss, time.monotonic()
    limits = RenderLimits(seconds=0.5, max_chars=1 << 16, memory_bytes=64 << 20)
    with pytest.raises((InvalidModelFile, InvalidParameter)) as caught:
        template = ChatTemplate(source.replace("{canary}", str(canary)), limits=limits)
        try:
            template.render([{"role": "user", "content": "x"}])
        finally:
            template.close()
    assert not canary.exists() and time.monotonic() - begun < 60
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert not re.search(r"0x[0-9a-f]{6}|Traceback|/home|site-packages", str(caught.value))
    for length, fits in ((1, True), ((1 << 16) - 1, True), (1 << 16, True), ((1 << 16) + 1, False)):
        template = ChatTemplate("{{ messages[0].content }}", limits=limits)
        try:
            rendered = template.render([{"role": "user", "content": "x" * length}])
        except InvalidParameter:
            rendered = None
        finally:
            template.close()
        assert (rendered is not None) == fits


def test_other_code_loading():
    """Nothing unpickles, evaluates or trusts code."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" | "__import__")):
                    found.append((path.name, node.lineno))
                case ast.Attribute(value=ast.Name(id=owner), attr="loads" | "load") if owner in (
                    "pickle",
                    "marshal",
                    "torch",
                    "yaml",
                    "dill",
                    "joblib",
                ):
                    found.append((path.name, node.lineno))
                case ast.Import(names=names) if any(
                    n.name.partition(".")[0] in ("pickle", "marshal", "shelve", "yaml", "dill") for n in names
                ):
                    found.append((path.name, node.lineno))
                case ast.keyword(
                    arg="trust_remote_code" | "allow_pickle" | "shell", value=ast.Constant(value=True)
                ):
                    found.append((path.name, node.value.lineno))
                case _:
                    pass
    assert found == []
