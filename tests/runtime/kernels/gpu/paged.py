"""A step over a paged cache for tests of GPU attention: the kernels' output, and how far it may lie
from attention in float32.

What may not be read is poison: unused blocks, slots behind a sequence's end, blocks before its
window, rows of the mask that belong to nobody, and every tensor before it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from smelt.runtime.kernels.gpu.attention import paged_attention_triton
from smelt.runtime.kernels.gpu.launch import INTERPRETED
from smelt.runtime.ops.attention import _attend_sequences
from smelt.runtime.ops.cache_format import QUANTIZED, dequantize_rows, quantize_rows

# Kernels run where triton runs them: on a device, and without one in the interpreter.
DEVICE = "cpu" if INTERPRETED else "cuda"

# Query heads, kv heads, head size and block size of layers of real models.
REAL_LAYERS = ((32, 8, 128, 16), (64, 8, 64, 64), (16, 8, 256, 32), (40, 8, 80, 128))

# Half a unit in the last place of 1.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@contextmanager
def poison() -> Iterator[None]:
    """New tensors hold NaN: what is read, or returned, unwritten shows."""
    made = torch.Tensor.new_empty

    def filled(*args: object, **named: object) -> torch.Tensor:
        new = made(*args, **named)  # type: ignore[arg-type]
        return new.fill_(float("nan") if new.is_floating_point() else 77)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.Tensor, "new_empty", filled)
        yield


@dataclass(frozen=True)
class Case:
    """sequences: (tokens before, tokens of this step) of each; and what a layer is.

    tree: sequences with tokens before come with a random tree. padding: rows behind all sequences.
    """

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    size: int = 32
    block_size: int = 16
    format: str = "auto"
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    tree: bool = False
    padding: int = 0
    strided: bool = False
    max_query: int = 0
    seed: int = 0


class PagedStep:
    """The tensors of a case. cache: what the reference reads; poisoned: what the kernels read."""

    def __init__(self, case: Case) -> None:
        source = torch.Generator().manual_seed(case.seed)
        self.case = case
        lengths = [before + new for before, new in case.sequences]
        blocks = [-(-length // case.block_size) for length in lengths]
        order = torch.randperm(sum(blocks) + 2, generator=source).int()
        shape = (len(order), 2, case.block_size, case.kv_heads, case.size)
        values = torch.randn(shape, generator=source)
        # As keys with a bias, some features lie far from 0.
        values += 2 * torch.randn(shape[3:], generator=source)
        if case.format == "auto":
            self.cache = values.to(case.cache_dtype or case.dtype)
        else:
            self.cache = quantize_rows(values, case.format)
        used = torch.zeros(len(order), case.block_size, dtype=torch.bool)
        self.table = torch.full((len(lengths), max(blocks, default=0) + 1), -1).int()
        self.whole_table = torch.zeros_like(self.table)
        taken = 0
        for b, (before, _) in enumerate(case.sequences):
            mine = order[taken : taken + blocks[b]]
            taken += blocks[b]
            self.whole_table[b, : len(mine)] = mine
            first = max(0, before - case.window + 1) if case.window else 0
            for p in range(first, lengths[b]):
                used[mine[p // case.block_size].long(), p % case.block_size] = True
            self.table[b, : len(mine)] = mine
            self.table[b, : first // case.block_size] = -1
        self.poisoned = self.cache.clone()
        unused = ~used[:, None].expand(-1, 2, -1)
        self.poisoned[unused] = float("nan") if case.format == "auto" else 255
        new = torch.tensor([0, *(new for _, new in case.sequences)])
        self.starts = new.cumsum(0).int()
        self.lengths = torch.tensor(lengths).int()
        rows, extra = int(self.starts[-1]) + case.padding, 3 if case.strided else 0
        q = torch.randn(rows, case.heads + extra, case.size, generator=source)
        self.q = q.to(case.dtype)[:, : case.heads]
        self.sinks = torch.randn(case.heads, generator=source).to(case.dtype)
        self.tree = self._tree(rows, source) if case.tree else torch.zeros(rows, 0).bool()

    def _tree(self, rows: int, source: torch.Generator) -> torch.Tensor:
        case = self.case
        wide = max((new for _, new in case.sequences), default=0) + 2
        tree = torch.ones(rows, wide, dtype=torch.bool)
        for b, (before, new) in enumerate(case.sequences):
            first = int(self.starts[b])
            seen = torch.ones(new, new).bool().tril()
            for i in range(1, new if before else 0):
                # One of the last three, so that branches become longer than windows.
                parent = max(0, i - 1 - int(torch.randint(3, (1,), generator=source)))
                seen[i] = seen[parent]
                seen[i, i] = True
            tree[first : first + new, :new] = seen
        return tree

    def reference(self, cache: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Attention of float32 queries over a cache of float32."""
        case = self.case
        bounds = self.starts, self.lengths, self.whole_table
        sinks = self.sinks.float() if case.sinks else None
        scale = case.size**-0.5
        return _attend_sequences(
            *(q, q, cache, None, *bounds, scale, case.window, case.softcap, sinks, self.tree)
        )

    def kernels(self) -> torch.Tensor:
        """What the operator gives, with poison wherever nothing may be read."""
        case = self.case
        cache, bounds = self.poisoned.to(DEVICE), (self.starts.to(DEVICE), self.lengths.to(DEVICE))
        sinks = self.sinks.to(DEVICE) if case.sinks else None
        tree = self.tree.to(DEVICE) if case.tree else None
        before = self.poisoned.clone()
        with poison():
            out = paged_attention_triton(
                *(self.q.to(DEVICE), cache, *bounds, self.table.to(DEVICE)),
                *(case.size**-0.5, case.window, case.softcap, sinks, tree),
                *(case.format, case.kv_heads, case.max_query),
            )
        assert torch.equal(before.view(torch.uint8), cache.cpu().view(torch.uint8))
        assert out.dtype == case.dtype and out.is_contiguous()
        return out.cpu()

    def check(self) -> torch.Tensor:
        """The output; raises where it is further from float32's than its roundings explain.

        They are those of the output, of probabilities (to the dtype of the product), and for
        quantized rows of queries and, in long sequences, of keys and values, to float16.
        """
        case, out, q = self.case, self.kernels(), self.q.float()
        if case.format == "auto":
            cache, spread = self.cache.float(), 0.0
            kind = torch.promote_types(self.cache.dtype, self.cache.dtype)
            unit = 2.0**-24 if torch.float32 in (kind, case.dtype) else ROUNDING[kind]
            query_unit = 0.0 if kind == case.dtype or unit == 2.0**-24 else unit
        else:
            cache = dequantize_rows(self.cache, case.format, case.size)
            # Integers count from a row's least value: what is rounded is as large as its range.
            low = cache.amin(-1, keepdim=True)
            spread = (cache - low).abs() if "int" in case.format else 0.0
            unit, query_unit = 2.0**-11, 2 * 2.0**-11
        exact = self.reference(cache, q)
        size = cache.clone()
        size[:, 1] = (cache.abs() + spread)[:, 1]
        one = self.reference(size, q)
        keys = cache[:, 0].abs().flatten(0, 1)
        scores = torch.einsum("thd,lgd->thlg", q.abs(), keys).amax((1, 2, 3)) * case.size**-0.5
        # A score that is off by d changes weights by the factor exp(d), and their sum, too.
        off = 2 * (query_unit + 2e-6) * scores[:, None, None]
        bound = (off + 2.1 * unit + 1e-5) * one + ROUNDING[case.dtype] * exact.abs() + 1e-6
        error = (out.float() - exact).abs()
        assert (error <= bound).all(), (error / bound).amax().item()
        assert not out[int(self.starts[-1]) :].any()
        return out


assert set(QUANTIZED) == {"fp8", "int8", "int4"}
