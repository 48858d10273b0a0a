"""Attention over the paged cache on a GPU: the operator, and what its kernels are given.

    attention_decode.py    sequences with at most 16 tokens in the step, their keys cut into pieces
    attention_prefill.py   the others, by tiles of their rows

A step may have both kinds, and which is which stands on the device. So both are launched, each
leaves the other's sequences alone, and a program compiled for steps of few tokens has the first
alone. The step's keys and values are in the cache already (kv_write.py).

Against `cached_attention` of runtime/ops, where all is float32: probabilities are rounded to the
cache's dtype before they meet values. Over quantized rows few tokens round queries, relative to the
largest feature of each, and probabilities to float16, but no row; many tokens round rows and
probabilities to the queries' dtype. Sums are float32, and so is everything where queries or the
cache are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import triton_op

from .attention_decode import attend_pieces, combine_pieces
from .attention_prefill import attend_rows
from .attention_shapes import (
    MAX_TOKENS,
    Shape,
    constants,
    multiprocessors,
    of_kernel,
    pieces,
    unsupported,
)
from .launch import INTERPRETED, SOME_ROWS, Variant, cdiv, launch
from .roofline import Cost
from .tuning import Config, capability, choose

DECODE, PREFILL = "attention_decode", "attention_prefill"
# Pieces that the second kernel combines at once.
COMBINED = 16
COMBINE_CONSTANTS = ("BLOCK_SIZE", "SIZE", "BLOCK_D", "WINDOW", "MAX_TOKENS", "DTYPE", "WIDEN")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Step:
    """The tensors of one call, and a bound on the tokens of a sequence."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    table: torch.Tensor
    sinks: torch.Tensor | None
    tree: torch.Tensor | None
    max_query: int


@triton_op("smelt::paged_attention_triton", mutates_args=())
def paged_attention_triton(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    format: str,
    kv_heads: int,
    max_query: int,
) -> torch.Tensor:
    """`cached_attention` over a cache that holds this step's keys and values already.

    q [T, H, D]; kv_cache [blocks, 2, block_size, G, D], or uint8 [blocks, 2, block_size, G, row
    bytes] of `format`; query_start int32 [B+1], from 0; seq_lens int32 [B]; block_table int32
    [B, M]; sinks [H]; tree_mask bool [T, W]; kv_heads: G -> [T, H, D] in q's dtype, zeros outside
    every sequence. max_query: a bound on the tokens of a sequence, 0 for none.
    """
    if kv_cache.shape[3] != kv_heads:
        raise ValueError(f"kv_cache has {kv_cache.shape[3]} heads, kv_heads says {kv_heads}")
    if not kv_cache.is_contiguous():
        raise ValueError("kv_cache is not contiguous; the kernels find rows by its shape alone")
    cache_dtype = NAMES[kv_cache.dtype] if format == "auto" else "bf16"
    shape = Shape(
        *(q.shape[1], kv_heads, q.shape[2], kv_cache.shape[2], format),
        *(NAMES[q.dtype], cache_dtype),
    )
    reason = unsupported(shape)
    if reason is not None:
        raise ValueError(reason)
    if kv_cache.shape[4] != shape.row:
        raise ValueError(
            f"rows of kv_cache hold {kv_cache.shape[4]}, those of {format} {shape.row}"
        )
    tree = None if tree_mask is None else tree_mask.contiguous()
    step = Step(
        *(q if q.stride(2) == 1 else q.contiguous(), kv_cache, query_start, seq_lens),
        *(block_table.contiguous(), sinks, tree, max_query),
    )
    found = capability(q.device)
    values = constants(shape, scale, window, softcap, found, INTERPRETED)
    values["HAS_SINKS"] = sinks is not None
    out = q.new_empty(q.shape)
    _decode(step, shape, values, window, out)
    if not 0 < max_query <= MAX_TOKENS:
        _prefill(step, shape, values, out)
    return out


def _decode(
    step: Step, shape: Shape, values: Mapping[str, Any], window: int, out: torch.Tensor
) -> None:
    """Sequences of at most MAX_TOKENS tokens, and, where there are no others, rows of none."""
    q, tokens, sequences = step.q, step.q.shape[0], step.seq_lens.shape[0]
    few = 0 < step.max_query <= MAX_TOKENS
    config = choose(DECODE, shape.classes(), capability(q.device))
    most = pieces(
        *(sequences * shape.kv_heads, step.table.shape[1] * shape.block_size, window),
        *(multiprocessors(q.device), config),
    )
    # Prompts of thousands of tokens have no rows here.
    rows = tokens if few else torch.sym_min(tokens, MAX_TOKENS * sequences)
    parts = q.new_empty((rows, shape.heads, most, shape.size), dtype=torch.float32)
    logs = q.new_empty((rows, shape.heads, most), dtype=torch.float32)
    bound = torch.sym_min(tokens, step.max_query if few else MAX_TOKENS)
    tiles = cdiv(shape.ratio * bound, shape.columns)
    # A kernel's argument cannot be None on a device and in the interpreter alike: where there is
    # no tensor another one stands for it.
    sinks = q if step.sinks is None else step.sinks
    launch(
        *(attend_pieces, (shape.kv_heads, most, tiles * sequences)),
        *(q, step.kv_cache, step.query_start, step.seq_lens, step.table, _tree(step), sinks),
        *(out, parts, logs, q.stride(0), q.stride(1), step.table.shape[1], _width(step)),
        *(sequences, most, tokens, rows),
        **values,
        HAS_TREE=step.tree is not None,
        BLOCK_M=shape.columns,
        config=of_kernel(config),
    )
    launch(
        *(combine_pieces, (rows, shape.heads)),
        *(step.query_start, step.seq_lens, sinks, out, parts, logs),
        *(sequences, most, tokens, rows),
        **{name: values[name] for name in (*COMBINE_CONSTANTS, "HAS_SINKS")},
        HEADS=shape.heads,
        BLOCK_S=COMBINED,
        config=Config(of_kernel(config).constants, num_warps=4, num_stages=1),
    )


def _prefill(step: Step, shape: Shape, values: Mapping[str, Any], out: torch.Tensor) -> None:
    """Sequences of more than MAX_TOKENS tokens, and rows of no sequence."""
    q, tokens, sequences = step.q, step.q.shape[0], step.seq_lens.shape[0]
    # In a step that has a bound, a kernel that does nothing costs more than a tree's registers.
    kinds: Sequence[str] = ("",) if step.tree is None else ("", "tree/")
    if kinds[-1] and 0 < step.max_query <= SOME_ROWS:
        kinds = ("tree/",)
    for kind in kinds:
        config = choose(PREFILL, shape.classes(kind), capability(q.device))
        tiles = tokens * shape.ratio // int(config.constants["BLOCK_M"]) + sequences + 1
        launch(
            *(attend_rows, (tiles, shape.kv_heads)),
            *(q, step.kv_cache, step.query_start, step.seq_lens, step.table, _tree(step)),
            *(q if step.sinks is None else step.sinks, out, q.stride(0), q.stride(1)),
            *(step.table.shape[1], _width(step), sequences, tokens),
            **values,
            HAS_TREE=kind == "tree/",
            SHARED=len(kinds) > 1,
            config=config,
        )


def _tree(step: Step) -> torch.Tensor:
    return step.q if step.tree is None else step.tree


def _width(step: Step) -> Any:
    return 0 if step.tree is None else step.tree.shape[1]


def cost(
    before: Sequence[int], new: Sequence[int], shape: Shape, window: int = 0, pieces: int = 1
) -> Cost:
    """Of one call without a tree. before, new: tokens of each sequence in the cache, and in the
    step. pieces: into how many each sequence's keys are cut."""
    element = 4 if "fp32" in (shape.dtype, shape.cache_dtype) else 2
    row = shape.row * (element if shape.format == "auto" else 1)
    keys = read = 0
    for old, count in zip(before, new, strict=True):
        reach = [min(old + i + 1, window or old + i + 1) for i in range(count)]
        keys += sum(reach)
        read += min(old + count, reach[0] + count - 1) if count else 0
    rows = sum(new) * shape.heads
    between = 2 * 4 * rows * pieces * (shape.size + 1) if pieces > 1 else 0
    return Cost(
        2 * read * shape.kv_heads * row + 2 * rows * shape.size * element + between,
        4 * keys * shape.heads * shape.size,
    )


def candidates(shape: str, found: int, kernel: str = DECODE) -> list[Config]:
    """What `smelt tune` tries of a kernel for a shape class on a capability: the table's, and
    around it."""
    kind = "tree/" if shape.startswith("tree/") else ""
    base = choose(kernel, [shape, shape.rsplit("/", 1)[0], f"{kind}any"], found)
    n, warps, stages = int(base.constants["BLOCK_N"]), base.num_warps, base.num_stages
    tried = [base]
    if kernel == DECODE:
        programs = int(base.constants["PROGRAMS"])
        for change in ({"PROGRAMS": programs + 1}, {"PROGRAMS": max(1, programs - 1)}):
            tried.append(Config({**base.constants, **change}, warps, stages))
        for tile in (n // 2, 2 * n):
            sizes = {"BLOCK_N": tile, "PIECE": max(tile, int(base.constants["PIECE"]))}
            tried.append(Config({**base.constants, **sizes}, warps, stages))
    else:
        for sizes in ({"BLOCK_N": n // 2}, {"BLOCK_N": 2 * n}):
            tried.append(Config({**base.constants, **sizes}, warps, stages))
        half = {"BLOCK_M": int(base.constants["BLOCK_M"]) // 2}
        tried.append(Config({**base.constants, **half}, max(4, warps // 2), stages))
    if stages > 1:
        tried += [Config(base.constants, warps, s) for s in (stages - 1, stages + 1) if s > 1]
    tried.append(Config(base.constants, 12 - warps, stages))  # 4 for 8, and 8 for 4
    allowed = range(16, (32 if kind else 256) + 1)  # a tree's bits are those of an integer
    return [
        config
        for i, config in enumerate(tried)
        if config not in tried[:i] and int(config.constants["BLOCK_N"]) in allowed
    ]


_LLAMA = Shape(32, 8, 128, 16)
# Shapes of layers, and window and softcap of each.
_DECODED = (
    *((_LLAMA, 0, 0.0), (Shape(64, 8, 64, 64), 128, 0.0), (Shape(16, 8, 256, 32), 1024, 50.0)),
    *(
        (Shape(32, 8, 128, 16, "auto", "fp32", "fp32"), 0, 0.0),
        (Shape(32, 8, 128, 16, "fp8"), 0, 0.0),
    ),
    *((Shape(32, 8, 128, 128, "int8"), 0, 0.0), (Shape(32, 8, 128, 16, "int4"), 0, 0.0)),
    (Shape(16, 8, 256, 32, "fp8", "fp16"), 1024, 0.0),
)
_PREFILLED = (
    *_DECODED[:5],
    *((Shape(32, 8, 128, 16, "int4"), 0, 0.0), (Shape(16, 8, 256, 32, "int8", "fp16"), 1024, 0.0)),
)
_IN_TREES = (
    *((_LLAMA, 0, 0.0), (Shape(32, 8, 128, 16, "int4"), 0, 0.0)),
    (Shape(16, 8, 256, 32, "int8"), 1024, 0.0),
)


def variants(found: int) -> Iterator[Variant]:
    """The kernels of common layers in every format."""
    for shape, window, softcap in _DECODED:
        config = of_kernel(choose(DECODE, shape.classes(), found))
        values = constants(shape, shape.size**-0.5, window, softcap, found, interpreted=False)
        values |= {"HAS_SINKS": shape.size == 64, "HAS_TREE": True, "BLOCK_M": shape.columns}
        yield _variant("decode", attend_pieces, shape, values, config)
    shape, config = _LLAMA, of_kernel(choose(DECODE, _LLAMA.classes(), found))
    values = constants(shape, 1.0, 0, 0.0, found, interpreted=False)
    values = {name: values[name] for name in COMBINE_CONSTANTS}
    values |= {"HAS_SINKS": False, "HEADS": shape.heads, "BLOCK_S": COMBINED}
    config = Config(config.constants, num_warps=4, num_stages=1)
    yield _variant("combine", combine_pieces, shape, values, config)
    for kind, layers in (("", _PREFILLED), ("tree/", _IN_TREES)):
        for shape, window, softcap in layers:
            config = choose(PREFILL, shape.classes(kind), found)
            values = constants(shape, shape.size**-0.5, window, softcap, found, interpreted=False)
            values |= {"HAS_SINKS": shape.size == 64, "HAS_TREE": kind == "tree/", "SHARED": True}
            yield _variant(f"prefill {kind}", attend_rows, shape, values, config)


def _variant(
    name: str, kernel: Any, shape: Shape, values: Mapping[str, Any], config: Config
) -> Variant:
    element, stored = f"*{shape.dtype}", f"*{shape.cache_dtype}"
    pointers = {
        **dict.fromkeys(("q", "sinks", "out"), element),
        **dict.fromkeys(("query_start", "seq_lens", "table"), "*i32"),
        **{"cache": stored if shape.format == "auto" else "*u8", "tree": "*i1"},
        **{"parts": "*fp32", "logs": "*fp32"},
    }
    numbers = ("q_token", "q_head", "table_width", "tree_width", "sequences", "splits", "tokens")
    signature = {**pointers, **dict.fromkeys((*numbers, "part_rows"), "i32")}
    return Variant(
        f"attention {name} {shape.format} {shape.dtype} {shape.size}",
        kernel,
        {n: kind for n, kind in signature.items() if n in kernel.arg_names},
        values,
        config,
        aligned=frozenset((*pointers, "q_token", "q_head")),
        tensor_cores=kernel is not combine_pieces,
        # Quantized rows begin at addresses that no 16 bytes can be loaded from.
        wide_loads=shape.format == "auto",
    )
