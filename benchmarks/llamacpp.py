"""
llama.cpp as an independent peer, at the level of token ids, through the C API that `xllamacpp` exports.

The struct layouts belong to one release, so the release is pinned and the defaults that the library fills
in are checked against what that release is known to use: a mismatch raises instead of reading the wrong
bytes.
"""

from __future__ import annotations

import ctypes as c
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

PINNED = "2026.10.11549"
_NO_FLASH, _F32 = 0, 0  # llama_flash_attn_type, ggml_type


class ModelParams(c.Structure):
    _fields_ = (
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
    )


class ContextParams(c.Structure):
    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("moe_cache_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    )


class Batch(c.Structure):
    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_SILENT = _LOG(lambda _level, _text, _data: None)


def _library() -> c.CDLL:
    found = importlib.metadata.version("xllamacpp")
    if found != PINNED:
        raise RuntimeError(f"xllamacpp {found}: the C structs here are those of {PINNED}")
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is not importable")
    importlib.import_module("xllamacpp")  # its extension resolves Python's own symbols first
    lib = c.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    pointer = c.c_void_p
    for name, result, *arguments in (
        ("llama_model_default_params", ModelParams),
        ("llama_context_default_params", ContextParams),
        ("llama_model_load_from_file", pointer, c.c_char_p, ModelParams),
        ("llama_init_from_model", pointer, pointer, ContextParams),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", c.c_int32, pointer),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, c.c_bool),
        ("llama_batch_init", Batch, c.c_int32, c.c_int32, c.c_int32),
        ("llama_batch_free", None, Batch),
        ("llama_decode", c.c_int32, pointer, Batch),
        ("llama_get_logits_ith", c.POINTER(c.c_float), pointer, c.c_int32),
        ("llama_set_n_threads", None, pointer, c.c_int32, c.c_int32),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
        ("llama_log_set", None, _LOG, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, list(arguments)
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    p = lib.llama_context_default_params()
    facts = (p.n_ctx, p.n_batch, p.n_ubatch, p.rope_scaling_type, p.flash_attn_type, p.type_k, p.type_v)
    if facts != (512, 2048, 512, -1, -1, 1, 1) or not p.swa_full or p.embeddings:
        raise RuntimeError(f"unexpected defaults of llama_context_params: {facts}")
    return lib


class LlamaCpp:
    """One model in one context. Not thread-safe.

    `repack`: it may re-arrange weights, as is its default. `exact`: K and V in float32 and no flash
    attention, which cost 5e-4 of a float32 file's logits.
    """

    def __init__(
        self, path: Path, *, n_ctx: int = 1024, threads: int = 1, repack: bool = True, exact: bool = False
    ) -> None:
        self._lib = lib = _library()
        model_params = lib.llama_model_default_params()
        model_params.use_extra_bufts = repack
        model_params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self.vocab_size: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = min(n_ctx, 512)
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        if exact:
            params.flash_attn_type, params.type_k, params.type_v = _NO_FLASH, _F32, _F32
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {n_ctx} tokens")
        self._batch = lib.llama_batch_init(n_ctx, 0, 1)

    def set_threads(self, threads: int) -> None:
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode(self, ids: Sequence[int], position: int, *, all_logits: bool = False) -> NDArray[np.float32]:
        """Compute `ids` from `position` on. Returns (n, vocab_size), n = 1 unless `all_logits`."""
        batch, last = self._batch, len(ids) - 1
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = 1 if all_logits or i == last else 0
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        wanted = range(len(ids)) if all_logits else (last,)
        rows = [self._lib.llama_get_logits_ith(self._context, i) for i in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids), vocab_size): the whole sequence from an empty cache."""
        self.clear()
        return self.decode(ids, 0, all_logits=True)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
