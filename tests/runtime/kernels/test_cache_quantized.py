"""The kernel over a quantized cache against its reference: the bytes it writes, what it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smelt.runtime.ops.attention import cached_attention
from smelt.runtime.ops.attention import cached_attention_quantized as reference
from smelt.runtime.ops.cache_format import QUANTIZED, dequantize_rows, quantize_rows

from .test_attention import DECODE, MIXED, TOLERANCE, Arguments, Case, _inputs

FORMATS = tuple(QUANTIZED)
DTYPES = tuple(TOLERANCE)
CASES = {
    "decode": Case(DECODE),
    "mixed": Case(MIXED, heads=4, kv_heads=1, size=128),
    "size 40": Case(DECODE, heads=3, kv_heads=3, size=40, block_size=8),
    "size 172": Case(((30, 9), (70, 1)), heads=4, kv_heads=2, size=172),
    "odd size": Case(((30, 9), (100, 1)), heads=4, kv_heads=2, size=23, block_size=5),
    "window": Case(MIXED, window=37),
    "freed blocks": Case(((900, 1), (700, 50)), window=70, freed=True),
    "softcap and sinks": Case(MIXED, softcap=20.0, sinks=True),
    "tree": Case(((0, 4), (100, 7), (510, 9)), tree=True),
    "padded": Case(((9, 1), (3, 4)), padding=5),
    "strided": Case(MIXED, strided=True),
}


def _filled(case: Case, dtype: torch.dtype, name: str) -> Arguments:
    """Arguments with a cache of quantized random rows, some far from 0 as keys with a bias are."""
    args = _inputs(case, dtype)
    cache = args[3]
    assert isinstance(cache, torch.Tensor)
    shift = torch.randn(cache.shape[3:]) * 2
    return [*args[:3], quantize_rows(cache.float() + shift, name), *args[4:]]


def _run(args: Arguments, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's output and the cache it left."""
    cache = args[3].clone()  # type: ignore[union-attr]
    out = torch.ops.smelt.cached_attention_quantized(*args[:3], cache, *args[4:], name)
    return out, cache


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_and_reference(isa: str, case: str, name: str) -> None:
    for dtype in DTYPES:
        torch.manual_seed(0)
        args = _filled(CASES[case], dtype, name)
        theirs = args[3].clone()  # type: ignore[union-attr]
        want = reference(*args[:3], theirs, *args[4:], name)  # type: ignore[arg-type]
        got, mine = _run(args, name)
        assert torch.equal(mine, theirs), "the bytes of the cache"
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_attention_over_the_values_read_back(name: str) -> None:
    """Against the operator without quantization, over a cache that holds the rounded values."""
    torch.manual_seed(0)
    case = Case(MIXED, size=64, window=300)
    args = _filled(case, torch.float32, name)
    q, k, v, cache = args[:4]
    plain = dequantize_rows(cache, name, case.size)  # type: ignore[arg-type]
    read = [dequantize_rows(quantize_rows(x, name), name, case.size) for x in (k, v)]  # type: ignore[arg-type]
    want = cached_attention(q, *read, plain, *args[4:])  # type: ignore[arg-type]
    got = reference(*args, name)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dequantize_rows(cache, name, case.size), plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_kind_are_written_to_the_same_bytes(isa: str, name: str) -> None:
    """Signed zeros, constants, tiny and huge numbers, halves between two steps, NaN, infinity."""
    size = 33
    rows = torch.randn(24, size)
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2, ::2], rows[2, 1::2] = 0.0, -0.0
    rows[3] = 0.1
    rows[4] = torch.arange(size) * 0.5  # steps of 0.5 over a scale that is no multiple of it
    rows[5] = torch.arange(size) / 2**5
    rows[6] *= 1e-7
    rows[7] *= 1e-9
    rows[8] *= 2e4
    rows[9] = torch.linspace(-65504, 65504, size)
    rows[10, 3] = 65520.0
    rows[11, 32] = float("nan")
    rows[12, 32] = float("inf")
    rows[13, 0] = float("-inf")
    rows[14] = 100.0 + rows[14] / 100
    rows[15, 1:] *= 2.0 ** -torch.arange(1, size)  # down to e4m3's smallest numbers
    rows[16] = torch.tensor([0.5, 255.0] + [x + 0.5 for x in range(31)])
    k = rows[:, None].contiguous()
    cache = torch.zeros(2, 2, 16, 1, QUANTIZED[name].row_bytes(size), dtype=torch.uint8)
    slots, table = torch.arange(24), torch.tensor([[0, 1]], dtype=torch.int32)
    bounds = torch.tensor([0, 24], dtype=torch.int32), torch.tensor([24], dtype=torch.int32)
    args = [k, k, -k, cache, slots, *bounds, table, 1.0, 0, 0.0, None, None]
    _, written = _run(args, name)
    for row in range(24):
        got = written[row // 16, :, row % 16, 0]
        assert torch.equal(got, quantize_rows(torch.stack((k[row, 0], -k[row, 0])), name)), row


@pytest.mark.parametrize("before", [4, 1030])
@pytest.mark.parametrize("name", ["auto", *FORMATS])
def test_nan_in_a_key_reaches_the_result(isa: str, name: str, before: int) -> None:
    """It may stand in an early chunk of many, where later ones have ordinary scores."""
    torch.manual_seed(0)
    case = Case(((before, 2),), softcap=5.0 if before > 4 else 0.0)
    args = _inputs(case, torch.float32) if name == "auto" else _filled(case, torch.float32, name)
    args[1] = args[1].clone()  # type: ignore[union-attr]
    args[1][1, 0, 5] = float("nan")  # the second token's first kv head, so its query heads
    if before > 4:  # the token to a slot that the first one's row sees, too
        args[4] = args[4].clone()  # type: ignore[union-attr]
        args[4][1] = int(args[7][0, 0]) * case.block_size + 3  # type: ignore[index]
    cache = args[3].clone()  # type: ignore[union-attr]
    if name == "auto":
        out = torch.ops.smelt.cached_attention(*args[:3], cache, *args[4:])
    else:
        out, _ = _run(args, name)
    assert out[1, :3].isnan().all() and out[:, 3:].isfinite().all()
    assert out[0, :3].isnan().all() == (before > 4)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_do_not_depend_on_chunks_or_threads(isa: str, name: str) -> None:
    """Prefill in one piece, in chunks and token by token give the same bits."""
    torch.manual_seed(0)
    case = replace(CASES["decode"], sequences=((0, 600),), heads=3, kv_heads=1, size=32)
    args = _filled(case, torch.bfloat16, name)
    threads = torch.get_num_threads()

    def stepwise(cuts: list[int]) -> torch.Tensor:
        cache, rows, first = args[3].clone(), [], 0  # type: ignore[union-attr]
        for end in cuts:
            step = [x[first:end] for x in args[:3]]  # type: ignore[index]
            bounds = torch.tensor([0, end - first], dtype=torch.int32)
            length = torch.tensor([end], dtype=torch.int32)
            slots = args[4][first:end]  # type: ignore[index]
            rows.append(
                torch.ops.smelt.cached_attention_quantized(
                    *step, cache, slots, bounds, length, *args[7:], name
                )
            )
            first = end
        return torch.cat(rows)

    try:
        whole = stepwise([600])
        for count in (1, 3):
            torch.set_num_threads(count)
            for cuts in ([250, 577, 600], [560, *range(561, 601)]):
                assert torch.equal(stepwise(cuts), whole), (cuts, count)
    finally:
        torch.set_num_threads(threads)


def test_misfits_are_refused() -> None:
    args = _filled(CASES["decode"], torch.float32, "int8")
    with pytest.raises(RuntimeError, match="no cache format int3"):
        _run(args, "int3")
    with pytest.raises(RuntimeError, match="do not fit"):
        _run(args, "int4")
    with pytest.raises(RuntimeError, match="with a cache of Float"):
        _run([*args[:3], args[3].float(), *args[4:]], "int8")  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="with a cache of Byte"):
        torch.ops.smelt.cached_attention(*args)
