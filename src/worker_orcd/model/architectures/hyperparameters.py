"""
The hyper-parameters that every decoder-only GGUF states in the same keys, read once and checked.

An adapter adds what is particular to its architecture. Keys that would change the arithmetic in a way nothing
computes (experts where an architecture has none, a window where no layer is known to slide) are refused by
name: a file is executed right or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.errors import InvalidModelFile, UnsupportedArchitecture
from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.kernels.backend import AttentionParams, Glu
from worker_orcd.model.config import FfnConfig, LayerConfig, ModelConfig, MoeConfig
from worker_orcd.model.tensors import EMBEDDING, OUTPUT

_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_HEAD_DIM = 1024
_MAX_CONTEXT = 1 << 30  # positions are int32
_MAX_EXPERTS = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    architecture: str
    name: str
    vocab_size: int
    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    window: int | None  # of the layers that slide, None where it would never bite
    tied_embeddings: bool

    def attention(self, *, slides: bool = True) -> AttentionParams:
        return AttentionParams(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=self.window if slides else None,
        )

    def ffn(self) -> FfnConfig:
        return FfnConfig(dim=self.ffn_dim)

    def model(
        self, layers: tuple[LayerConfig, ...], unused_tensors: frozenset[str] = frozenset()
    ) -> ModelConfig:
        """`unused_tensors`: what the adapter has read itself."""
        return ModelConfig(
            architecture=self.architecture,
            name=self.name,
            vocab_size=self.vocab_size,
            dim=self.dim,
            context_length=self.context_length,
            norm_eps=self.norm_eps,
            tied_embeddings=self.tied_embeddings,
            layers=layers,
            unused_tensors=unused_tensors,
        )


def read_hyperparameters(
    file: GGUFFile, *, may_slide: bool = False, experts: bool = False, norm: str = "layer_norm_rms_epsilon"
) -> Hyperparameters:
    """Raises InvalidModelFile or UnsupportedArchitecture, naming the key and what was found.

    `may_slide`: the adapter knows which layers have a sliding window. `experts`: it reads them. Otherwise
    either is refused. `norm`: the key of the norms' epsilon.
    """
    metadata = file.metadata
    architecture = metadata.string("general.architecture")
    _refuse_what_is_not_computed(file, architecture, experts=experts)
    dim = metadata.integer(f"{architecture}.embedding_length", low=1, high=_MAX_WIDTH)
    num_heads, num_kv_heads, head_dim = _heads(file, architecture, dim)
    context_length = metadata.integer(f"{architecture}.context_length", low=1, high=_MAX_CONTEXT)
    window = metadata.integer(f"{architecture}.attention.sliding_window", default=0)
    if not 0 < window < context_length:
        window = None
    elif not may_slide:
        raise UnsupportedArchitecture(
            f"{architecture}.attention.sliding_window is {window}, shorter than the context of "
            f"{context_length}: not supported for {architecture}"
        )
    return Hyperparameters(
        architecture=architecture,
        name=metadata.string("general.name", default=architecture),
        vocab_size=_vocab_size(file),
        num_layers=metadata.integer(f"{architecture}.block_count", low=1, high=_MAX_LAYERS),
        dim=dim,
        ffn_dim=metadata.integer(f"{architecture}.feed_forward_length", low=1, high=_MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        norm_eps=metadata.number(f"{architecture}.attention.{norm}", low=0.0, high=1.0),
        window=window,
        tied_embeddings=OUTPUT not in file.tensors,
    )


def read_experts(file: GGUFFile, *, glu: Glu = Glu.SWIGLU, bias: bool = False) -> MoeConfig:
    """The mixture of experts that every layer has. Raises InvalidModelFile or UnsupportedArchitecture."""
    metadata = file.metadata
    architecture = metadata.string("general.architecture")
    num_experts = metadata.integer(f"{architecture}.expert_count", low=1, high=_MAX_EXPERTS)
    for key, computed in (
        ("expert_shared_count", 0),
        ("expert_group_count", 1),
        ("leading_dense_block_count", 0),
    ):
        if (found := metadata.integer(f"{architecture}.{key}", default=computed)) > computed:
            raise UnsupportedArchitecture(f"{architecture}.{key} is {found}; supported: {computed}")
    return MoeConfig(
        dim=metadata.integer(f"{architecture}.expert_feed_forward_length", low=1, high=_MAX_WIDTH),
        num_experts=num_experts,
        top_k=metadata.integer(f"{architecture}.expert_used_count", low=1, high=num_experts),
        glu=glu,
        bias=bias,
    )


def _refuse_what_is_not_computed(file: GGUFFile, architecture: str, *, experts: bool) -> None:
    if not file.metadata.boolean(f"{architecture}.attention.causal", default=True):
        raise UnsupportedArchitecture(
            f"{architecture}.attention.causal is false: a model that embeds texts cannot continue them"
        )
    key = f"{architecture}.expert_count"
    if not experts and (num_experts := file.metadata.optional_integer(key)):
        raise UnsupportedArchitecture(
            f"{key} is {num_experts}: mixtures of experts are not supported for {architecture}"
        )


def _heads(file: GGUFFile, architecture: str, dim: int) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim)."""
    metadata, prefix = file.metadata, f"{architecture}.attention"
    num_heads = metadata.integer(f"{prefix}.head_count", low=1, high=_MAX_WIDTH)
    num_kv_heads = metadata.integer(f"{prefix}.head_count_kv", low=1, high=num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise InvalidModelFile(
            f"{prefix}.head_count is {num_heads}, which is not a multiple of {prefix}.head_count_kv, "
            f"{num_kv_heads}"
        )
    head_dim = metadata.optional_integer(f"{prefix}.key_length", low=1, high=_MAX_HEAD_DIM)
    if head_dim is None:
        if dim % num_heads:
            raise InvalidModelFile(
                f"{architecture}.embedding_length is {dim}, which is not a multiple of {prefix}.head_count, "
                f"{num_heads}, and {prefix}.key_length is absent"
            )
        head_dim = dim // num_heads
    if head_dim > _MAX_HEAD_DIM:
        raise InvalidModelFile(f"heads have {head_dim} dimensions; at most {_MAX_HEAD_DIM} are allowed")
    value_length = metadata.integer(f"{prefix}.value_length", low=1, high=_MAX_HEAD_DIM, default=head_dim)
    if value_length != head_dim:
        raise UnsupportedArchitecture(
            f"{prefix}.value_length is {value_length}, but keys have {head_dim} dimensions; expected as many"
        )
    return num_heads, num_kv_heads, head_dim


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding, which must be as many as the file has tokens (where it has a vocabulary)."""
    table = file.tensors.get(EMBEDDING)
    if table is None or len(table.shape) != 2:
        raise InvalidModelFile(
            f"tensor '{EMBEDDING}' is {'missing' if table is None else f'of shape {table.shape}'}; "
            "expected (vocabulary, embedding_length)"
        )
    vocab_size = table.shape[0]
    if "tokenizer.ggml.tokens" in file.metadata:
        num_tokens = len(file.metadata.strings("tokenizer.ggml.tokens"))
        if num_tokens != vocab_size:
            raise InvalidModelFile(
                f"tensor '{EMBEDDING}' has {vocab_size} rows; expected {num_tokens}, "
                "as many as tokenizer.ggml.tokens has entries"
            )
    return vocab_size
