"""Why attention over a cache stays as it is: the kinds of reasons, what each means, and what a user can do about it.

A line of the report names the kind and says what was met in that graph. ``docs/declined.md`` is generated from this file
(``make docs``).
"""

from __future__ import annotations

import enum

PAGE = "docs/declined.md"
"""Where a user finds what a reason means."""


class Reason(enum.Enum):
    """Kinds of reasons; the value is the anchor of its section in :data:`PAGE`."""

    GRADIENTS = "gradients"
    UNKNOWN_ATTENTION = "unknown-attention"
    WEIGHTS_READ = "weights-read"
    SECOND_READER = "second-reader"
    SECOND_WRITER = "second-writer"
    WRITE_ORDER = "write-order"
    REARRANGED = "rearranged"
    MIXED_CACHES = "mixed-caches"
    MEMORY = "memory"
    TENSOR_TYPE = "tensor-type"
    DTYPE = "dtype"
    SHAPE = "shape"
    LENGTH = "length"
    MASK = "mask"
    ARGUMENTS = "arguments"
    DEVICE = "device"
    GUARANTEE = "guarantee"
    INTERNAL_ERROR = "internal-error"

    @property
    def meaning(self) -> str:
        """What was met, for a user."""
        return _EXPLANATIONS[self][0]

    @property
    def remedy(self) -> str:
        """What a user can do."""
        return _EXPLANATIONS[self][1]

    @property
    def link(self) -> str:
        """The section about it."""
        return f"{PAGE}#{self.value}"


_EXPLANATIONS = {
    Reason.GRADIENTS: (
        "Gradients are on and an input of the graph requires them. Quantizing has no useful gradient.",
        "Decode under `torch.no_grad()`, as `generate` does, or call `model.requires_grad_(False)`.",
    ),
    Reason.UNKNOWN_ATTENTION: (
        "The graph writes a cache, and what reads it is no form of attention that the passes know, or no attention at all:"
        " the graph was broken between the write and the attention, or the model computes something else from its cache.",
        'Load the model with `attn_implementation="sdpa"` where it has that. `fullgraph=True` shows where a graph breaks.',
    ),
    Reason.WEIGHTS_READ: (
        "Something besides the product with V reads the attention weights; the aligned read never has them in memory.",
        "Do not ask for them: `output_attentions=False`.",
    ),
    Reason.SECOND_READER: (
        "Something besides attention reads the cache, or the past that it is concatenated from. The rewrite would not give it"
        " what it reads, or would have to keep a copy.",
        "Nothing, if the model needs it. A debugging hook that looks at the cache inside the compiled code can go outside.",
    ),
    Reason.SECOND_WRITER: (
        "The cache is written in a way that the planes could not follow.",
        "Write rows by the cache's own `update`, or as one of `cache.index_copy_(2, positions, rows)`,"
        " `cache[:, :, positions] = rows` and `cache[:, :, start : start + n] = rows`; edits belong outside of the compiled"
        " code, where they are noticed.",
    ),
    Reason.WRITE_ORDER: (
        "Attention reads the cache before this step's rows are in it, or K and V are not written alike.",
        "Nothing: it is the model's meaning, and stock attention keeps it.",
    ),
    Reason.REARRANGED: (
        "On its way to attention the cache passes through operations after which a row is no longer a row of the cache: a part"
        " of it other than its first rows is taken, heads are repeated in another order, numbers are rounded, axes mixed.",
        "Repeat KV heads as `repeat_kv` does, and slice masks instead of caches.",
    ),
    Reason.MIXED_CACHES: (
        "K and V of one attention come from caches of different kinds, or one of them from none.",
        "Nothing: what is computed from the cache at each step cannot be read from planes of it.",
    ),
    Reason.MEMORY: (
        "The cache tensor shares its memory with another input of the graph, or its rows are not contiguous.",
        "Allocate K and V as tensors of their own, the head dimension last.",
    ),
    Reason.TENSOR_TYPE: (
        "The cache or the mask is a tensor subclass, sparse, nested or quantized, as in a quantized cache.",
        "Use a `StaticCache` or `DynamicCache`; this backend quantizes beside them.",
    ),
    Reason.DTYPE: (
        "Caches and queries may be bfloat16, float16 or float32, and K must have V's dtype.",
        "Load the model in one of these dtypes.",
    ),
    Reason.SHAPE: (
        "Query, K and V have shapes that the read is not generated for: other ranks, numbers of heads that do not divide, or a"
        " head dimension above the limit.",
        "Nothing, if the model is made so. A broken cache shows here too.",
    ),
    Reason.LENGTH: (
        "A length depends on data or is no input of the graph, or K and V differ in it.",
        "Keep the number of new tokens a plain integer; data-dependent lengths come from indexing by masks.",
    ),
    Reason.MASK: (
        "The mask does not broadcast to `[batch, heads, query rows, cache rows]`, or is neither bool nor floating.",
        "Pass a bool mask (True attends) or a floating one that is added to the scores.",
    ),
    Reason.ARGUMENTS: (
        "The attention call itself is not what the read computes: dropout, `is_causal` over a cache, or arguments that are"
        " known only when it runs.",
        "Call `model.eval()`; pass a mask instead of `is_causal=True`, which aligns to the first row of the cache.",
    ),
    Reason.DEVICE: (
        "There is no code generator for this device.",
        "Run on a CPU, or on a GPU for which Inductor generates Triton.",
    ),
    Reason.GUARANTEE: (
        '`guarantee="worst_case"` was asked for where no certified read is generated, or over a cache of too few bits.',
        'Use `guarantee="expected"`, or run on a CPU, with a cache of transformers or a lossless `alignedkv_compile.Cache`.',
    ),
    Reason.INTERNAL_ERROR: (
        "The passes or the compiler failed, and the whole graph went to stock Inductor. This is a defect of this package.",
        "Please report it, with `TORCH_LOGS=+alignedkv_compile`; `strict=True` raises the error instead.",
    ),
}
