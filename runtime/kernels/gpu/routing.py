"""Token choices sorted by expert, on the device: what grouped matrix products over experts read.

A choice is one (token, expert) pair of index [T, top_k], numbered token * top_k + j. The sort is
stable and made by counting, without atomics, so that a step gives the same lists every time it
runs. Sizes come from T, top_k, E and the block size alone: the host never waits for a count.

order    int32 [T * top_k]: the choices, those of expert 0 first, in order of their number within
         an expert.
blocks   int32 [most_blocks, 3]: (expert, first place in `order`, how many places) of each block of
         at most BLOCK_M choices of one expert, those that are used first; the others have 0 places.

Up to FEW_CHOICES one kernel compares every choice with every other. Beyond, a first kernel counts
choices per expert in chunks, and a second adds up the counts before a chunk and ranks within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Size, Variant, cdiv, launch
from .roofline import Cost
from .tuning import Config

# Comparisons grow with the square: 2^20 of them take a multiprocessor's worth of microseconds.
FEW_CHOICES = 1024
_FEW = Config({"SLICE": 32, "STEP": 32}, num_warps=4)
_COUNT = Config({"CHUNK": 256, "STEP": 32}, num_warps=4)
_PLACE = Config({"CHUNK": 256, "SLICE": 32, "CHUNKS": 16}, num_warps=8)


class Routing(NamedTuple):
    """order and blocks as the module describes them."""

    order: torch.Tensor
    blocks: torch.Tensor


def most_blocks(choices: Size, experts: int, block_m: int) -> Size:
    """How many blocks `choices` fill at worst: every expert that is chosen ends with a single one.

    For symbolic sizes as well.
    """
    return (choices + torch.sym_min(choices, experts) * (block_m - 1)) // block_m


def sort_by_expert(index: torch.Tensor, experts: int, block_m: int, rows: int) -> Routing:
    """index int64 [T, top_k], values in 0 .. experts - 1, T at most `rows` unless that is 0."""
    top_k = index.shape[1]
    choices = index.shape[0] * top_k
    count = most_blocks(choices, experts, block_m)
    index = index.contiguous()
    order = index.new_empty(choices, dtype=torch.int32)
    blocks = index.new_empty((count, 3), dtype=torch.int32)
    lanes = triton.next_power_of_2(experts)
    if 0 < rows * top_k <= FEW_CHOICES:
        grid = (cdiv(choices, int(_FEW.constants["SLICE"])),)
        launch(
            *(_sort_few, grid, index, order, blocks, choices, count),
            LANES=lanes,
            BLOCK_M=block_m,
            config=_FEW,
        )
        return Routing(order, blocks)
    chunks = cdiv(choices, int(_COUNT.constants["CHUNK"]))
    counts = index.new_empty((chunks, lanes), dtype=torch.int32)
    launch(_count, (chunks,), index, counts, choices, LANES=lanes, config=_COUNT)
    launch(
        *(_place, (chunks,), index, counts, order, blocks, choices, count),
        LANES=lanes,
        BLOCK_M=block_m,
        config=_PLACE,
    )
    return Routing(order, blocks)


def cost(choices: int, experts: int, block_m: int) -> Cost:
    """Of one `sort_by_expert`."""
    return Cost(choices * (8 + 4) + 12 * int(most_blocks(choices, experts, block_m)))


@triton.jit
def _sort_few(
    index,
    order,
    blocks,
    choices,
    count,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Places SLICE choices: each goes where the number of those before it says. LANES >= E."""
    lane = tl.arange(0, LANES)
    mine = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    chosen = tl.load(index + mine, mask=mine < choices, other=LANES).to(tl.int32)
    place = tl.zeros([SLICE], tl.int32)
    total = tl.zeros([LANES], tl.int32)
    for start in range(0, choices, STEP):
        other = start + tl.arange(0, STEP)
        theirs = tl.load(index + other, mask=other < choices, other=LANES).to(tl.int32)
        total += tl.sum((theirs[None, :] == lane[:, None]).to(tl.int32), 1)
        place += _before(chosen, theirs, mine, other)
        place += tl.sum((theirs[None, :] < chosen[:, None]).to(tl.int32), 1)
    tl.store(order + place, mine, mask=mine < choices)
    _write_blocks(blocks, total, mine, count, LANES, BLOCK_M)


@triton.jit
def _count(index, counts, choices, LANES: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """counts [chunks, LANES]: how many of CHUNK choices go to each expert."""
    lane = tl.arange(0, LANES)
    chunk = tl.program_id(0)
    total = tl.zeros([LANES], tl.int32)
    for start in range(0, CHUNK, STEP):
        other = chunk * CHUNK + start + tl.arange(0, STEP)
        theirs = tl.load(index + other, mask=other < choices, other=LANES).to(tl.int32)
        total += tl.sum((theirs[None, :] == lane[:, None]).to(tl.int32), 1)
    tl.store(counts + chunk * LANES + lane, total)


@triton.jit
def _place(
    index,
    counts,
    order,
    blocks,
    choices,
    count,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Places CHUNK choices after those of earlier experts, earlier chunks and earlier numbers."""
    lane = tl.arange(0, LANES)
    chunk = tl.program_id(0)
    total = tl.zeros([LANES], tl.int32)
    earlier = tl.zeros([LANES], tl.int32)
    chunks = tl.num_programs(0)
    for start in range(0, chunks, CHUNKS):
        row = start + tl.arange(0, CHUNKS)
        part = tl.load(
            counts + row[:, None] * LANES + lane[None, :], mask=row[:, None] < chunks, other=0
        )
        total += tl.sum(part, 0)
        earlier += tl.sum(tl.where(row[:, None] < chunk, part, 0), 0)
    base = tl.cumsum(total, 0) - total + earlier
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, SLICE):
        mine = start + tl.arange(0, SLICE)
        chosen = tl.load(index + mine, mask=mine < choices, other=LANES).to(tl.int32)
        # The same once more, along the other axis of the comparison.
        other = start + tl.arange(0, SLICE)
        theirs = tl.load(index + other, mask=other < choices, other=LANES).to(tl.int32)
        its = chosen[:, None] == lane[None, :]
        place = tl.sum(tl.where(its, base[None, :], 0), 1) + _before(chosen, theirs, mine, other)
        tl.store(order + place, mine, mask=mine < choices)
        base += tl.sum(its.to(tl.int32), 0)
        _write_blocks(blocks, total, mine, count, LANES, BLOCK_M)


@triton.jit
def _before(chosen, theirs, mine, other):
    """How many of `theirs`, numbered `other`, chose the same expert and have a lower number."""
    same = (theirs[None, :] == chosen[:, None]) & (other[None, :] < mine[:, None])
    return tl.sum(same.to(tl.int32), 1)


@triton.jit
def _write_blocks(blocks, total, at, count, LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Entries `at` of the block list, from how many choices each expert has.

    There are never more blocks than choices, so that programs that place all choices write all.
    """
    lane = tl.arange(0, LANES)
    used = (total + BLOCK_M - 1) // BLOCK_M
    end = tl.cumsum(used, 0)
    first_place = tl.cumsum(total, 0) - total
    expert = tl.sum((end[None, :] <= at[:, None]).to(tl.int32), 1)
    its = expert[:, None] == lane[None, :]
    done = (at - tl.sum(tl.where(its, (end - used)[None, :], 0), 1)) * BLOCK_M
    first = tl.sum(tl.where(its, first_place[None, :], 0), 1) + done
    left = tl.sum(tl.where(its, total[None, :], 0), 1) - done
    places = tl.where(expert < LANES, tl.minimum(left, BLOCK_M), 0)
    tl.store(blocks + at * 3, expert, mask=at < count)
    tl.store(blocks + at * 3 + 1, first, mask=at < count)
    tl.store(blocks + at * 3 + 2, places, mask=at < count)


def variants(capability: int) -> Iterator[Variant]:
    """Sorts for the largest number of experts and a small one; the same on every capability."""
    signature = {
        **{"index": "*i64", "order": "*i32", "blocks": "*i32", "counts": "*i32"},
        **{"choices": "i32", "count": "i32"},
    }
    aligned = frozenset({"index", "order", "blocks", "counts"})
    for kernel, config in ((_sort_few, _FEW), (_count, _COUNT), (_place, _PLACE)):
        for lanes in (8, 256):
            constants = {"LANES": lanes, "BLOCK_M": 16 if kernel is _sort_few else 128}
            yield Variant(
                *(f"{kernel.__name__.strip('_')} {lanes}", kernel, signature, constants, config),
                aligned=aligned,
                wide_loads=False,
            )
