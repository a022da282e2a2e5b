"""
Make a variant of a GGUF file with its matrices in another format: `python benchmarks/requantize.py IN OUT
Q4_0`.

Uses the `gguf` package's quantiser (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4, F16, F32). Only for benchmarks and
tests: quantising an already quantised file loses more than quantising the original.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import gguf


def requantize(
    source: Path, target: Path, name: str, *, keep: tuple[str, ...] = ("token_embd.weight",)
) -> None:
    """Matrices become `name`, except those in `keep`; vectors and metadata stay as they are."""
    kind = gguf.GGMLQuantizationType[name]
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub)
    writer.add_key_value(
        "general.file_type", int(gguf.LlamaFileType[f"MOSTLY_{name}"]), gguf.GGUFValueType.UINT32
    )
    for tensor in reader.tensors:
        if len(tensor.shape) < 2 or tensor.name in keep:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    requantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
