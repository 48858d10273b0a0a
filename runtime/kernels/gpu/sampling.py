"""Top-k and top-p of rows of logits without sorting them, in one launch.

Sampling needs no order, only each row's two thresholds. A program takes a row [V]:

    1  the largest logit, and the largest of each of TILE interleaved parts (its lanes)
    2  top-k: at least k logits are not below the k-th largest lane, so that is a lower bound
       top-p alone: the sum Z of exp(x - max); tokens below (1 - p) Z / 2V make up less than 1 - p
       together, so none of them is needed
    3  what can be kept at all, mostly a few hundred tokens, is copied behind each other
    4  the k-th largest of these, by bisection of the float32's ordered bits with PIVOTS pivots a
       pass; then the same for the sum of exp(x - max), of what top-k has left
    5  what lies below a threshold becomes minus infinity

The bisection ends as soon as one value is left between the bounds, so ties are kept with the last
token kept, and a flat distribution only makes it longer. FlashInfer (Ye et al. 2025,
arXiv:2501.01005) searches for pivots as well; step 3 is what makes the passes short.

Kept are the tokens that filters.py keeps by sorting, except where a sum of probabilities comes
within float32's rounding of top_p (about 1e-6: exp is the device's approximation, and the order of
additions differs), and except of tokens whose probabilities differ in the last bit only.

Whether it pays, counted and not measured: for an entry of [R, V], torch moves 20 bytes or more in
topk, 28 in comparing and filling twice, 12 in softmax, 96 in sorting (32-bit keys with 64-bit
places, 8 bits a pass), 14 in cumsum and counting: 170 bytes in some 15 launches. Here steps 1, 2, 3
and 5 read it once each and 5 writes what changes: at most 20 bytes in one launch, most of them in
the second-level cache, where 64 rows of 128k entries have room (an H100's 50 MB). What there is to
lose: a row is read by one multiprocessor, at about 100 GB/s, so a few rows of more than 256k
entries take longer than the launches that are saved (`pays`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from ...transfer import send
from .launch import Variant, launch
from .roofline import Cost
from .tuning import Config, capability, choose

TABLE = "sampling"
FEWEST_ENTRIES = 1 << 14
LONGEST_ROW, MANY_ROWS = 1 << 18, 8


def pays(rows: int, vocab_size: int) -> bool:
    """Whether the kernel is faster than torch's sort (see above).

    With few entries both are launches' latency, and toy models need not wait for a compiler.
    """
    long = vocab_size > LONGEST_ROW and rows < MANY_ROWS
    return rows * vocab_size >= FEWEST_ENTRIES and not long


@triton.jit
def _key(x):
    """float32 -> int32 of the same order; its own inverse but for the type."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """int64 keys -> the float32 they are of."""
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _threshold(
    values,
    count,
    wanted,
    enough,
    low,
    high,
    MASS: tl.constexpr,
    SEARCH: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The largest key in low..high-1 such that the values from it on are, or sum to, `wanted`.

    values: pointer to `count` float32, which are not below `low` and are, or sum to, enough. MASS:
    they are summed, not counted, and lose their places. Any key that separates the same values will
    do, and one with at most `enough` values.
    """
    place = tl.arange(0, SEARCH)
    steps = tl.arange(0, PIVOTS).to(tl.int64)
    above, beyond = count, count * 0  # how many values there are from low on, and from high on
    heavy = wanted * 0.0  # the sum of those from high on
    gone, weight_gone = count * 0, wanted * 0.0  # of these, what has left `values`
    while (high - low > 1) & (above - beyond > 1) & (above > enough):
        pivots = tl.minimum(low + steps * tl.maximum((high - low) // PIVOTS, 1), high - 1)
        bounds = _value(pivots)[:, None]
        numbers = tl.zeros([PIVOTS, SEARCH], tl.int32)
        weights = tl.zeros([PIVOTS, SEARCH], tl.float32)
        for start in range(0, count, SEARCH):
            inside = start + place < count
            # NaN is above no pivot.
            value = tl.load(values + start + place, mask=inside, other=float("nan"))[None, :]
            over = value >= bounds
            numbers += over.to(tl.int32)
            if MASS:
                weights += tl.where(over, value, 0.0)
        number = gone + tl.sum(numbers, 1)
        if MASS:
            weight = weight_gone + tl.sum(weights, 1)
            # What the order of additions changes must not undo what was found before.
            reached = (weight >= wanted) | (pivots == low)
            heavy = tl.max(tl.where(reached, heavy, weight), 0)
        else:
            reached = number >= wanted
        above = tl.min(tl.where(reached, number, above), 0)
        beyond = tl.max(tl.where(reached, beyond, number), 0)
        low = tl.max(tl.where(reached, pivots, low), 0)
        high = tl.min(tl.where(reached, high, pivots), 0)
        if MASS:  # noqa: SIM102 (a constant: without it the rest is not compiled)
            if (count > SEARCH) & (4 * (above - beyond) < count):
                left = count * 0
                for start in range(0, count, SEARCH):
                    inside = start + place < count
                    value = tl.load(values + start + place, mask=inside, other=float("nan"))
                    take = (value >= _value(low)) & (value < _value(high))
                    # The running sum waits for all threads' values of this round: none is lost.
                    to = left + tl.cumsum(take.to(tl.int32), 0) - 1
                    tl.store(values + to, value, mask=take)
                    left += tl.sum(take.to(tl.int32), 0)
                tl.debug_barrier()
                count, gone, weight_gone = left, beyond, heavy
    return low


@triton.jit
def filter_rows(
    scores,
    wanted,
    scratch,
    size,
    stride,
    scratch_stride,
    TILE: tl.constexpr,
    SEARCH: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """See `filter_top`. wanted: float32 [R, 2], top_k and top_p. scratch: a row has TILE entries or
    more."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    scratch += row * scratch_stride
    top_k = tl.load(wanted + 2 * row).to(tl.int32)
    top_p = tl.load(wanted + 2 * row + 1)
    by_count, by_mass = (top_k > 0) & (top_k < size), top_p < 1
    nothing = float("-inf")
    if by_count | by_mass:
        lane = tl.arange(0, TILE)
        best = tl.full([TILE], nothing, tl.float32)
        for start in range(0, size, TILE):
            x = tl.load(scores + start + lane, mask=start + lane < size, other=nothing)
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
        unknown = tl.max((best != best).to(tl.int32), 0) > 0
        top = tl.max(best, 0)
        if (not unknown) & (tl.abs(top) < float("inf")):
            # Of what can be kept at all: x is not below `bound`, exp(x - top) not below `least`.
            bound = tl.full([], nothing, tl.float32)
            least = tl.full([], 0.0, tl.float32)
            mass = tl.full([], 0.0, tl.float32)
            beyond = _key(top).to(tl.int64) + 1
            if by_count:
                # Without more than 2 top_k lanes the bound stays as it is.
                tl.store(scratch + lane, best)
                tl.debug_barrier()
                lanes = tl.full([], TILE, tl.int32)
                low = _key(bound).to(tl.int64)
                key = _threshold(
                    scratch, lanes, top_k, 2 * top_k, low, beyond, False, SEARCH, PIVOTS
                )
                bound = _value(key)
                tl.debug_barrier()
            else:
                sums = tl.zeros([TILE], tl.float32)
                for start in range(0, size, TILE):
                    x = tl.load(scores + start + lane, mask=start + lane < size, other=nothing)
                    sums += tl.exp(x - top)
                mass = tl.sum(sums, 0)
                least = mass * (1 - top_p) / (2.0 * size)

            count = 0
            for start in range(0, size, TILE):
                x = tl.load(scores + start + lane, mask=start + lane < size, other=nothing)
                take = (x >= bound) & (tl.exp(x - top) >= least) & (x > nothing)
                place = count + tl.cumsum(take.to(tl.int32), 0) - 1
                tl.store(scratch + place, x, mask=take)
                count += tl.sum(take.to(tl.int32), 0)
            tl.debug_barrier()

            if by_count:
                low = _key(bound).to(tl.int64)
                key = _threshold(scratch, count, top_k, top_k, low, beyond, False, SEARCH, PIVOTS)
                bound = _value(key)
            if by_mass:
                tl.debug_barrier()
                sums = tl.zeros([TILE], tl.float32)
                for start in range(0, count, TILE):
                    inside = start + lane < count
                    x = tl.load(scratch + start + lane, mask=inside, other=nothing)
                    part = tl.where(x >= bound, tl.exp(x - top), 0.0)
                    tl.store(scratch + start + lane, part, mask=inside)
                    sums += part
                if by_count:
                    mass = tl.sum(sums, 0)
                tl.debug_barrier()
                if tl.sum(sums, 0) < top_p * mass:  # by rounding, where top_p is next to 1
                    least = least * 0.0
                else:
                    low = _key(least).to(tl.int64)
                    beyond = tl.full([], 0x3F800001, tl.int64)  # behind exp(0)
                    key = _threshold(
                        scratch, count, top_p * mass, 0, low, beyond, True, SEARCH, PIVOTS
                    )
                    least = _value(key)

            for start in range(0, size, TILE):
                x = tl.load(scores + start + lane, mask=start + lane < size, other=nothing)
                drop = (x < bound) | (tl.exp(x - top) < least)
                tl.store(scores + start + lane, nothing, mask=drop & (start + lane < size))


def filter_top(scores: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> torch.Tensor:
    """Each row's tokens behind its top_k most likely, and then those behind the most likely ones
    that reach top_p, become minus infinity: in `scores` itself, if its rows are dense.

    scores float32 [R, V]; one number a row, top_k 0 or top_p 1 (or more) for no filter. Tokens tied
    with the last one kept are kept. A row with NaN or plus infinity, or of minus infinity alone,
    stays as it is: it has no distribution.
    """
    if scores.dtype != torch.float32:
        raise ValueError(f"scores are {scores.dtype}, not float32")
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    rows, size = scores.shape
    config = choose(TABLE, ["rows"], capability(scores.device))
    # In one tensor, so that one copy goes to the device; float32 holds a count below 2^24.
    wanted = send(
        [(min(k, size), p) for k, p in zip(top_k, top_p, strict=True)],
        torch.float32,
        scores.device,
    )
    scratch = scores.new_empty(rows, max(size, int(config.constants["TILE"])))
    launch(
        *(filter_rows, (rows,), scores, wanted, scratch, size),
        *(scores.stride(0), scratch.stride(0)),
        config=config,
    )
    return scores


def cost(rows: int, vocab_size: int) -> Cost:
    """Each entry read once from device memory and written once; the passes after the first find
    the rows in the second-level cache, and less than all of it is written."""
    return Cost(2 * 4 * rows * vocab_size)


def candidates(shape: str, found: int) -> list[Config]:
    """What `smelt tune` tries on capability `found`; the only shape class is "rows"."""
    base = choose(TABLE, [shape], found)
    tried = [(2048, 512, 8, 8), (4096, 1024, 8, 16), (4096, 2048, 4, 16), (8192, 1024, 4, 16)]
    tried += [(8192, 2048, 4, 16), (4096, 512, 8, 8)]
    made = [
        Config({"TILE": tile, "SEARCH": search, "PIVOTS": pivots}, warps, 1)
        for tile, search, pivots, warps in tried
    ]
    return [base, *(config for config in made if config != base)]


def variants(found: int) -> Iterator[Variant]:
    """Rows that begin at multiples of 16 bytes, and rows of GPT-2's 50257 entries."""
    config = choose(TABLE, ["rows"], found)
    signature = {
        **dict.fromkeys(("scores", "wanted", "scratch"), "*fp32"),
        **dict.fromkeys(("size", "stride", "scratch_stride"), "i32"),
    }
    tensors = frozenset(("scores", "wanted", "scratch"))
    for name, aligned in (
        ("", frozenset(("size", "stride", "scratch_stride"))),
        (" odd", frozenset()),
    ):
        yield Variant(
            *(f"filter_rows{name}", filter_rows, signature, {}, config),
            aligned=tensors | aligned,
            wide_loads=not name,
        )
