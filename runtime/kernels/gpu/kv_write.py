"""Rotary embedding, quantization and the write into the paged cache, in one launch.

Every head of every token is a row of D features. A program takes a tile of rows: of keys, which are
rotated, rounded to the cache's format and scattered to their slots; of values, the same without
the rotation; or of queries, which are rotated and written densely. So q, k and v are read once and
nothing passes through memory in between; without the fusion keys are written by the rotation and
read again by the write, and each format's parameters take further passes.

A feature's partner in the rotation is loaded a second time instead of being exchanged between
threads: the bytes are in the first-level cache, and any D' works. Where pairs are neighbours
(interleaved) they already lie in one thread.

Roundings are those of `rope` and of `quantize_rows` (runtime/ops) on the CPU, bit for bit: products
in the common dtype of x and cos, each rounded by itself (no fused multiply-add), quotients
correctly rounded (torch on CUDA multiplies by the reciprocal of a Python number), e4m3 and integers
to nearest even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from smelt.runtime.ops.cache_format import CACHE_FORMATS, row_bytes

from .cache_rows import write_rows
from .e4m3 import NATIVE_FROM
from .launch import WIDEN, Variant, cdiv, launch
from .roofline import Cost
from .rounding import narrow, wide
from .tuning import Config, capability, choose

TABLE = "kv_write"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def _product(a, b, ASM: tl.constexpr):
    """a * b rounded to float32: the compiler may not merge it with the addition that follows."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a * b


@triton.jit
def _rotated(
    at,
    cos,
    sin,
    live,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr,
    PAIR: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The rows that start at pointers `at` [ROWS, 1], rotated: float32, values of DTYPE.

    cos and sin: pointers [ROWS, 1] to each row's angles. live: bool [ROWS]. ROTARY: D', 0 leaves
    the rows as they are. ROUND: products are of DTYPE. PAIR: the partners of PAIR features, counted
    from a multiple of PAIR, lie side by side.
    """
    feature = tl.arange(0, BLOCK_D)
    x = wide(tl.load(at + feature[None, :], mask=live[:, None] & (feature < D)[None, :]), WIDEN)
    if ROTARY > 0:
        turned = (feature < ROTARY)[None, :]
        mask = live[:, None] & turned
        c = wide(tl.load(cos + feature[None, :], mask=mask), WIDEN)
        s = wide(tl.load(sin + feature[None, :], mask=mask), WIDEN)
        if INTERLEAVED:
            first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK_D // 2, 2]))
            partner = tl.reshape(tl.join(-second, first), [x.shape[0], BLOCK_D])
        else:
            HALF: tl.constexpr = ROTARY // 2
            other = tl.where(feature < HALF, feature + HALF, feature - HALF)
            other = tl.max_contiguous(tl.multiple_of(other, PAIR), PAIR)
            partner = wide(tl.load(at + other[None, :], mask=mask), WIDEN)
            partner = tl.where((feature < HALF)[None, :], -partner, partner)
        straight, crossed = _product(x, c, not WIDEN), _product(partner, s, not WIDEN)
        if ROUND:
            straight = wide(narrow(straight, DTYPE, WIDEN), WIDEN)
            crossed = wide(narrow(crossed, DTYPE, WIDEN), WIDEN)
        x = tl.where(turned, wide(narrow(straight + crossed, DTYPE, WIDEN), WIDEN), x)
    return x


@triton.jit
def rope_write(
    q,
    k,
    v,
    cos,
    sin,
    kv_cache,
    slots,
    out,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    cos_token,
    sin_token,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr,
    PAIR: tl.constexpr,
    DTYPE: tl.constexpr,
    CACHE_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """See `rope_write_triton`. q_token, q_head, ...: strides. WIDTH: elements of a cache row."""
    ROWS: tl.constexpr = TILE // BLOCK_D
    tile = tl.program_id(0)
    kv_tiles = tl.cdiv(tokens * G, ROWS)
    feature = tl.arange(0, BLOCK_D)
    real = (feature < D)[None, :]
    if tile < 2 * kv_tiles:
        which = (tile >= kv_tiles).to(tl.int32)
        row = (tile - which * kv_tiles) * ROWS + tl.arange(0, ROWS)
        token, head = row // G, row % G
        slot = tl.load(slots + token, mask=row < tokens * G, other=-1)
        live = slot >= 0
        if which == 0:
            at = k + (token.to(tl.int64) * k_token + head * k_head)[:, None]
            angles = token.to(tl.int64)[:, None]
            c, s = cos + angles * cos_token, sin + angles * sin_token
            x = _rotated(at, c, s, live, D, ROTARY, INTERLEAVED, ROUND, PAIR, DTYPE, BLOCK_D, WIDEN)
        else:
            at = v + (token.to(tl.int64) * v_token + head * v_head)[:, None]
            x = wide(tl.load(at + feature[None, :], mask=live[:, None] & real), WIDEN)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        to = kv_cache + (((block * 2 + which) * BLOCK_SIZE + offset) * G + head) * WIDTH
        write_rows(x, to, live, D, FORMAT, CACHE_DTYPE, BLOCK_D, NATIVE, WIDEN)
    else:
        row = (tile - 2 * kv_tiles) * ROWS + tl.arange(0, ROWS)
        token, head = row // H, row % H
        live = row < tokens * H
        at = q + (token.to(tl.int64) * q_token + head * q_head)[:, None]
        angles = token.to(tl.int64)[:, None]
        c, s = cos + angles * cos_token, sin + angles * sin_token
        x = _rotated(at, c, s, live, D, ROTARY, INTERLEAVED, ROUND, PAIR, DTYPE, BLOCK_D, WIDEN)
        dense = out + row.to(tl.int64)[:, None] * D + feature[None, :]
        tl.store(dense, narrow(x, DTYPE, WIDEN), mask=live[:, None] & real)


@triton_op(
    "smelt::rope_write_triton",
    mutates_args={"kv_cache"},
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) kv_cache, "
    "Tensor slot_mapping, bool interleaved, str format) -> Tensor",
)
def rope_write_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    interleaved: bool,
    format: str,
) -> torch.Tensor:
    """q [T, H, D]; k and v [T, G, D], of one dtype; cos and sin [T, D'] or None -> q rotated.

    Keys, rotated, and values go to their slots (int64 [T], -1 writes nothing) of the contiguous
    kv_cache [blocks, 2, block_size, G, row], in `format`: "auto" for elements of its dtype,
    otherwise uint8 as cache_format.py says. Without cos and sin nothing is rotated and the result
    is a copy of q: an operator may not return its input.
    """
    tokens, heads, size = q.shape
    groups = k.shape[1]
    rotary = 0 if cos is None else cos.shape[1]
    _check(q, k, v, cos, sin, kv_cache, format)
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    cos, sin = (slot_mapping if x is None else _dense_rows(x) for x in (cos, sin))
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    found = capability(q.device)
    config = choose(TABLE, [f"{format}/{size}", format], found)
    block_d = _block(size)
    rows = int(config.constants["TILE"]) // block_d
    launch(
        rope_write,
        (cdiv(tokens * heads, rows) + 2 * cdiv(tokens * groups, rows),),
        *(q, k, v, cos, sin, kv_cache, slot_mapping.contiguous(), out, tokens),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(cos.stride(0), sin.stride(0)),
        **_constants(heads, groups, size, rotary, interleaved, q.dtype, format),
        ROUND=rotary > 0 and cos.dtype == q.dtype != torch.float32,
        CACHE_DTYPE="" if format != "auto" else DTYPES[kv_cache.dtype],
        BLOCK_SIZE=kv_cache.shape[2],
        NATIVE=found >= NATIVE_FROM,
        config=config,
    )
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache: torch.Tensor,
    format: str,
) -> None:
    size = q.shape[2]
    if format not in CACHE_FORMATS:
        raise ValueError(f"unknown format {format!r}, known: {', '.join(CACHE_FORMATS)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not one 16 or 32 bit")
    if k.shape[2] != size or v.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"k and v have heads {[*k.shape[1:]]} and {[*v.shape[1:]]}, q's size {size}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together or not at all")
    if cos is not None and sin is not None:
        if cos.dtype != sin.dtype or cos.dtype not in DTYPES or cos.shape[1] != sin.shape[1]:
            raise ValueError(f"cos is {cos.dtype} of {cos.shape[1]}, sin {sin.dtype}")
        if cos.shape[1] % 2 or cos.shape[1] > size:
            raise ValueError(f"{cos.shape[1]} angles for {size} features")
    known = kv_cache.dtype in DTYPES if format == "auto" else kv_cache.dtype == torch.uint8
    row = (2, k.shape[1], row_bytes(size, format, torch.uint8))
    if not known or (kv_cache.shape[1], *kv_cache.shape[3:]) != row:
        raise ValueError(
            f"a cache of {kv_cache.dtype} {[*kv_cache.shape[1:]]} in format {format!r}"
        )
    if not kv_cache.is_contiguous():
        raise ValueError("the cache is not contiguous")


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Heads may lie anywhere (slices of a fused projection), the features of one side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(size: int) -> int:
    return max(2, triton.next_power_of_2(size))


def _constants(
    heads: int,
    groups: int,
    size: int,
    rotary: int,
    interleaved: bool,
    dtype: torch.dtype,
    format: str,
) -> dict[str, Any]:
    """Those of the kernel's constants that shapes and types give."""
    half = rotary // 2
    return {
        **{"H": heads, "G": groups, "D": size, "ROTARY": rotary, "INTERLEAVED": interleaved},
        "PAIR": min(16, half & -half) or 1,
        **{"DTYPE": DTYPES[dtype], "FORMAT": format, "BLOCK_D": _block(size), "WIDEN": WIDEN},
        "WIDTH": row_bytes(size, format, torch.uint8),
    }


def cost(
    tokens: int, heads: int, groups: int, size: int, rotary: int, format: str = "auto"
) -> Cost:
    """Of 16-bit q, k, v, cos, sin and cache elements; a quantized cache takes fewer bytes."""
    read = 2 * (heads + 2 * groups) * size + 2 * 2 * rotary + 8
    written = 2 * heads * size + 2 * groups * row_bytes(size, format, torch.bfloat16)
    return Cost(tokens * (read + written))


def candidates(shape: str, found: int) -> list[Config]:
    """What `smelt tune` tries for a shape class, a format perhaps with "/D": tiles of 8 to 64
    elements a thread."""
    base = choose(TABLE, [shape, shape.split("/")[0]], found)
    tried = [(tile, warps) for warps in (1, 2, 4, 8) for tile in (512 * warps, 1024 * warps)]
    made = [Config({"TILE": tile}, warps, 1) for tile, warps in tried]
    return [base, *(config for config in made if config != base)]


def variants(found: int) -> Iterator[Variant]:
    """Llama-8B (H 32, G 8, D 128) in every format, and one of each other kind of row."""
    sixteen, wide_ = torch.bfloat16, torch.float32
    cases = [(128, 128, False, sixteen, sixteen, form, 16) for form in CACHE_FORMATS]
    cases += [
        (128, 128, True, sixteen, sixteen, "auto", 16),
        (128, 128, True, sixteen, sixteen, "int4", 16),
        (64, 64, False, torch.float16, torch.float16, "auto", 32),
        (256, 256, False, sixteen, wide_, "fp8", 64),
        (80, 32, False, sixteen, sixteen, "int8", 128),
        (128, 0, False, sixteen, sixteen, "auto", 16),
        (128, 128, False, wide_, wide_, "auto", 16),
    ]
    for size, rotary, interleaved, dtype, angles, form, block_size in cases:
        config = choose(TABLE, [f"{form}/{size}", form], found)
        strides = [f"{name}_{of}" for name in "qkv" for of in ("token", "head")]
        strides += ["cos_token", "sin_token"]
        signature = dict.fromkeys(("q", "k", "v", "out"), f"*{DTYPES[dtype]}")
        signature |= dict.fromkeys(("cos", "sin"), f"*{DTYPES[angles]}")
        signature["kv_cache"] = f"*{DTYPES[dtype]}" if form == "auto" else "*u8"
        signature |= {"slots": "*i64", "tokens": "i32", **dict.fromkeys(strides, "i32")}
        constants = {
            **_constants(32, 8, size, rotary, interleaved, dtype, form),
            "WIDEN": False,
            "ROUND": angles == dtype != wide_,
            "CACHE_DTYPE": "" if form != "auto" else DTYPES[dtype],
            "BLOCK_SIZE": block_size,
            "NATIVE": found >= NATIVE_FROM,
        }
        kind = "interleaved" if interleaved else f"rotary {rotary}"
        yield Variant(
            f"rope_write {form} {DTYPES[dtype]} D {size} {kind}",
            *(rope_write, signature, constants, config),
            aligned=frozenset(signature) - {"tokens"},
        )
