"""The cached attention kernel against its reference, over random batches and block tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from smelt.runtime.ops.attention import cached_attention as reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """(tokens before, tokens of this step) of each sequence, and the shape of the layer."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 6
    kv_heads: int = 2
    size: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    tree: bool = False
    padding: int = 0
    cache: torch.dtype | None = None
    strided: bool = False
    freed: bool = False  # blocks left of every window were given away


DECODE = ((5, 1), (0, 1), (700, 1), (1100, 1))
MIXED = ((0, 70), (33, 1), (0, 0), (600, 41), (2, 3))
CASES = {
    "decode": Case(DECODE),
    "one head each": Case(DECODE, heads=3, kv_heads=3, size=40, block_size=8),
    "many heads": Case(((40, 1), (0, 5)), heads=71, kv_heads=1, size=64),
    "mixed": Case(MIXED),
    "wide heads": Case(MIXED, heads=4, kv_heads=4, size=256, block_size=32),
    "window": Case(MIXED, window=37),
    "wide window": Case(((900, 1), (700, 50)), window=600),
    "freed blocks": Case(((900, 1), (700, 50)), window=70, freed=True),
    "softcap and sinks": Case(MIXED, softcap=20.0, sinks=True),
    "tree": Case(((0, 4), (100, 7), (510, 9)), tree=True),
    "tree in a window": Case(((20, 12), (100, 7)), tree=True, window=5),
    "padded": Case(((9, 1), (3, 4)), padding=5),
    "nothing": Case((), padding=3),
    "strided": Case(MIXED, strided=True),
    "odd size": Case(((30, 9),), heads=4, kv_heads=2, size=23, block_size=5),
}


Arguments = list[torch.Tensor | float | int | None]


def _inputs(case: Case, dtype: torch.dtype) -> Arguments:
    """Arguments of cached_attention; blocks are spread over the cache at random."""
    lengths = [before + new for before, new in case.sequences]
    need = [-(-length // case.block_size) for length in lengths]
    shape = (sum(need) + 3, 2, case.block_size, case.kv_heads, case.size)
    cache = torch.randn(shape).to(case.cache or dtype)
    order = torch.randperm(shape[0]).int()
    table = torch.full((len(lengths), max(need, default=0) + 1), -1, dtype=torch.int32)
    slots, used = [], 0
    for b, (before, new) in enumerate(case.sequences):
        table[b, : need[b]] = order[used : used + need[b]]
        used += need[b]
        for p in range(before, before + new):
            block = int(table[b, p // case.block_size])
            slots.append(block * case.block_size + p % case.block_size)
        if case.freed:
            table[b, : max(0, before - case.window + 1) // case.block_size] = -1
    slots += [-1] * case.padding
    starts = [0, *torch.tensor([new for _, new in case.sequences]).cumsum(0).int().tolist()]
    rows = len(slots)
    extra = 2 if case.strided else 1
    q = torch.randn(rows, case.heads * extra, case.size).to(dtype)[:, : case.heads]
    kv = torch.randn(rows, 2 * case.kv_heads * extra, case.size).to(dtype)
    k, v = kv[:, : case.kv_heads], kv[:, case.kv_heads : 2 * case.kv_heads]
    mask = None
    if case.tree:
        widest = max(new for _, new in case.sequences)
        mask = torch.rand(rows, widest) < 0.4
        mask[torch.arange(rows), torch.cat([torch.arange(n) for _, n in case.sequences])] = True
    return [
        *(q, k, v, cache),
        *(torch.tensor(slots, dtype=torch.int64), torch.tensor(starts, dtype=torch.int32)),
        *(torch.tensor(lengths, dtype=torch.int32), table),
        *(case.size**-0.5, case.window, case.softcap),
        torch.randn(case.heads).to(dtype) if case.sinks else None,
        mask,
    ]


def _check(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = _inputs(case, dtype)
    cache = inputs[3]
    assert isinstance(cache, torch.Tensor)
    mine, theirs = cache.clone(), cache.clone()
    got = torch.ops.smelt.cached_attention(*inputs[:3], mine, *inputs[4:])
    want = reference(*inputs[:3], theirs, *inputs[4:])  # type: ignore[arg-type]
    assert torch.equal(mine, theirs)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_attention(isa: str, name: str) -> None:
    for dtype in TOLERANCE:
        _check(CASES[name], dtype)


def test_a_cache_of_another_dtype(isa: str) -> None:
    _check(Case(MIXED, cache=torch.float32), torch.bfloat16)
    _check(replace(Case(MIXED), cache=torch.float16), torch.float32)


def _stepwise(case: Case, dtype: torch.dtype, cuts: list[int], threads: int) -> torch.Tensor:
    """One sequence fed in the pieces that `cuts` end; rows in order."""
    torch.manual_seed(0)
    args = _inputs(case, dtype)
    q, k, v, cache, slots, _, _, table = args[:8]
    torch.set_num_threads(threads)
    rows, first = [], 0
    for end in cuts:
        bounds = torch.tensor([0, end - first], dtype=torch.int32)
        rows.append(
            torch.ops.smelt.cached_attention(
                *(x[first:end] for x in (q, k, v)),  # type: ignore[index]
                *(cache, slots[first:end], bounds),  # type: ignore[index]
                *(torch.tensor([end], dtype=torch.int32), table),
                *args[8:],
            )
        )
        first = end
    return torch.cat(rows)


@pytest.mark.parametrize("window", (0, 100))
def test_rows_do_not_depend_on_chunks_or_threads(isa: str, window: int) -> None:
    """Prefill in one piece, in chunks and token by token give the same bits."""
    case = Case(((0, 1100),), window=window, heads=3, kv_heads=1, size=32, block_size=16)
    threads = torch.get_num_threads()
    try:
        whole = _stepwise(case, torch.bfloat16, [1100], 1)
        for cuts in ([1100], [500, 777, 1100], [1000, *range(1001, 1101)]):
            for count in (1, 2, 3):
                assert torch.equal(_stepwise(case, torch.bfloat16, cuts, count), whole), cuts
    finally:
        torch.set_num_threads(threads)


def test_misfits_are_refused() -> None:
    args = _inputs(CASES["decode"], torch.float32)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        torch.ops.smelt.cached_attention(
            *(x.double() for x in args[:3]),  # type: ignore[union-attr]
            *args[3:],
        )
    args[4] = args[4] + 10**6  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="beyond the cache"):
        torch.ops.smelt.cached_attention(*args)
