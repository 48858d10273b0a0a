"""Attention over packed tokens: without a cache (the traced form) and over the paged cache.

The scores are softmax(q k^T * scale), computed in float32. Grouped key/value heads, sliding
windows, soft-capped scores (Gemma 2) and attention sinks (a learned logit a head that takes
probability and gives no value) are arguments, so that every decoder uses one operator.
"""

from __future__ import annotations

import torch

from .cache_format import dequantize_rows, quantize_rows
from .library import operator


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [T, H, D], k [L, G, D], v [L, G, Dv], visible bool [T, L] -> [T, H, Dv], dtype of q."""
    heads, kv_heads = q.shape[1], k.shape[1]
    keys = k.float().repeat_interleave(heads // kv_heads, 1)
    values = v.float().repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("thd,lhd->htl", q.float(), keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(heads, q.shape[0], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, values).to(q.dtype)


def _causal(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """bool [T, L]: which key positions each query position sees."""
    distance = queries[:, None] - keys[None, :]
    visible = distance >= 0
    return visible & (distance < window) if window > 0 else visible


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@operator(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int window, float softcap, "
    "Tensor? sinks) -> Tensor",
    _attention_fake,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of one whole sequence. q [T, H, D], k and v [T, G, D] -> [T, H, D].

    window 0 is full attention, otherwise a token sees the last `window` tokens, itself included.
    softcap 0 is none. sinks: [H] or None.
    """
    positions = torch.arange(q.shape[0], device=q.device)
    visible = _causal(positions, positions, window)
    return _attend(q, k, v, visible, scale, softcap, sinks).contiguous()


def _cached_attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


_CACHED_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor query_start, Tensor seq_lens, Tensor block_table, float scale, int window, "
    "float softcap, Tensor? sinks, Tensor? tree_mask) -> Tensor"
)


# The second name is for `--provider cached_attention=reference`: where the CPU kernels are loaded,
# they answer for the first on every CPU tensor.
@operator("cached_attention_reference" + _CACHED_SCHEMA, _cached_attention_fake)
@operator("cached_attention" + _CACHED_SCHEMA, _cached_attention_fake)
def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Write k and v to their slots, then attend over each sequence's blocks.

    q [T, H, D]; k, v [T, G, D]; kv_cache [blocks, 2, block_size, G, D], mutated in place;
    slot_mapping int64 [T], -1 writes nothing; query_start int32 [B+1]; seq_lens int32 [B];
    block_table int32 [B, M] -> [T, H, D] in q's dtype. Row i of sequence b stands at position
    seq_lens[b] - (query_start[b+1] - query_start[b]) + i. Rows outside every sequence give zeros.
    tree_mask, bool [T, W]: column j says whether a row sees the j-th token that its own sequence
    brings in this step, itself included; it stands in the text behind those. None, or W = 0: the
    step's tokens are seen like all others.
    """
    _write(kv_cache, slot_mapping, k.to(kv_cache.dtype), v.to(kv_cache.dtype))
    return _attend_sequences(
        *(q, k, kv_cache, None, query_start, seq_lens, block_table),
        *(scale, window, softcap, sinks, tree_mask),
    )


_QUANTIZED_SCHEMA = _CACHED_SCHEMA.replace("Tensor? tree_mask)", "Tensor? tree_mask, str format)")


@operator("cached_attention_quantized_reference" + _QUANTIZED_SCHEMA, _cached_attention_fake)
@operator("cached_attention_quantized" + _QUANTIZED_SCHEMA, _cached_attention_fake)
def cached_attention_quantized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    format: str,
) -> torch.Tensor:
    """`cached_attention` over a cache of `format` ("fp8", "int8", "int4": cache_format.py).

    kv_cache uint8 [blocks, 2, block_size, G, row bytes], mutated in place. Every key and value is
    read back from the cache in float32, those of this very step, too: what a row gives does not
    depend on how the tokens before it were cut into steps.
    """
    _write(kv_cache, slot_mapping, quantize_rows(k, format), quantize_rows(v, format))
    return _attend_sequences(
        *(q, k, kv_cache, format, query_start, seq_lens, block_table),
        *(scale, window, softcap, sinks, tree_mask),
    )


def _write(
    kv_cache: torch.Tensor, slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Rows k and v [T, G, width] to their slots; -1 writes nothing."""
    block_size = kv_cache.shape[2]
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    kv_cache[slots // block_size, 0, slots % block_size] = k[written]
    kv_cache[slots // block_size, 1, slots % block_size] = v[written]


def _attend_sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    kv_cache: torch.Tensor,
    format: str | None,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of each sequence over its blocks; format: of quantized rows, None for elements."""
    block_size, size = kv_cache.shape[2], k.shape[2]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for b, length in enumerate(lengths):
        first, last = starts[b], starts[b + 1]
        if first == last:
            continue
        blocks = block_table[b, : -(-length // block_size)].long()
        keys = kv_cache[blocks, 0].flatten(0, 1)[:length]
        values = kv_cache[blocks, 1].flatten(0, 1)[:length]
        if format is not None:
            keys = dequantize_rows(keys, format, size)
            values = dequantize_rows(values, format, size)
        key_positions = torch.arange(length, device=q.device)
        before = length - (last - first)
        tree = None
        if tree_mask is not None and tree_mask.shape[1]:
            tree = tree_mask[first:last, : last - first]
            key_positions[before:] = before + tree.sum(1) - 1
        visible = _causal(key_positions[before:], key_positions, window)
        if tree is not None:
            positions = key_positions[before:]
            near = positions[:, None] - positions < window if window > 0 else True
            visible[:, before:] = tree & near
        out[first:last] = _attend(q[first:last], keys, values, visible, scale, softcap, sinks)
    return out
