"""Our CPU kernels beside torch's, interleaved in one run: matrix-vector products and attention.

    python benchmarks/kernels_cpu.py [--threads N] [--rounds N]

Weights rotate through copies larger than the caches together, as they do in a model, so that the
products are held against the read bandwidth of memory, measured between them. Prints tables and
writes benchmarks/results/kernels_cpu-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from smelt.runtime.kernels import build

SHAPES = ((576, 576), (1536, 576), (49152, 576), (2048, 2048), (5632, 2048), (32000, 2048))
ROTATED_BYTES = 192 << 20
GROUP = 64
# heads, kv heads, head size, tokens before, tokens of the step, sequences
ATTENTION = (
    (9, 3, 64, 0, 1024, 1),
    (32, 4, 64, 0, 1024, 1),
    (32, 8, 128, 1000, 256, 1),
    (9, 3, 64, 128, 1, 1),
    (9, 3, 64, 1000, 1, 1),
    (32, 8, 128, 4000, 1, 1),
    (9, 3, 64, 200, 1, 16),
)
Weight = tuple[torch.Tensor, ...]
Timed = dict[str, tuple[Callable[[], object], int]]  # name: (call, calls a round)


def interleaved(timed: Timed, rounds: int) -> dict[str, tuple[float, float]]:
    """(median, best) seconds of one call of each, all of them in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(rounds + 1):
        for name, (call, calls) in timed.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: (statistics.median(s), min(s)) for name, s in seconds.items()}


def _rotating(
    call: Callable[..., object], make: Callable[[], tuple[torch.Tensor, ...]]
) -> tuple[Callable[[], object], int, int]:
    """(call over rotating copies, number of copies, bytes of one)."""
    first = make()
    size = sum(t.nbytes for t in first)
    copies = [first, *(make() for _ in range(max(0, ROTATED_BYTES // size)))]
    turn: Iterator[tuple[torch.Tensor, ...]] = itertools.cycle(copies)
    return (lambda: call(*next(turn))), len(copies), size


def dense_weight(n: int, k: int) -> Weight:
    """Random, bfloat16 [n, k]."""
    return (torch.randn(n, k, dtype=torch.bfloat16),)


def int8_weight(n: int, k: int, groups: int) -> Weight:
    """A random blocked weight of 8 bits and its scales, `groups` of them a row."""
    blocks = -(-n // 16)
    packed = torch.randint(-127, 128, (blocks, k, 16), dtype=torch.int8)
    return packed, torch.rand(blocks, groups, 16).bfloat16()


def grouped_weight(n: int, k: int, bits: int) -> Weight:
    """A random blocked weight of 3 or 4 bits in groups of GROUP, its scales and zero points."""
    blocks, groups = -(-n // 16), k // GROUP
    packed = torch.randint(-(2**31), 2**31 - 1, (blocks, k * bits // 32, 16), dtype=torch.int32)
    zeros = torch.full((blocks, groups, 16), 2 ** (bits - 1), dtype=torch.uint8)
    return packed, torch.rand(blocks, groups, 16).bfloat16(), zeros


def gemv(n: int, k: int, rows: int, rounds: int, memory: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of one shape's table; `memory` is read for the bandwidth."""
    ops, x = torch.ops.smelt, torch.randn(rows, k).bfloat16()

    def dense() -> Weight:
        return dense_weight(n, k)

    def int8() -> Weight:
        return int8_weight(n, k, k // GROUP)

    def int4() -> Weight:
        return grouped_weight(n, k, 4)

    kinds = {
        "torch bf16": _rotating(lambda w: F.linear(x, w), dense),
        "bf16": _rotating(lambda w: ops.linear(x, w, None), dense),
        "int8": _rotating(lambda w, s: ops.linear_int8_blocked(x, w, s, None, n), int8),
        "int4": _rotating(lambda w, s, z: ops.linear_int4_blocked(x, w, s, z, None, n), int4),
    }
    timed: Timed = {name: (call, min(copies, 200)) for name, (call, copies, _) in kinds.items()}
    timed["read"] = (lambda: memory.sum(), 1)
    result = interleaved(timed, rounds)
    bandwidth = memory.nbytes / result["read"][0]
    best_bandwidth = memory.nbytes / result["read"][1]
    lines = []
    for name, (_, _, size) in kinds.items():
        median, best = result[name]
        lines.append(
            {
                **{"n": n, "k": k, "rows": rows, "kernel": name},
                **{"median_us": median * 1e6, "best_us": best * 1e6},
                **{"gb_s": size / median / 1e9, "of_read": size / median / bandwidth},
                "best_of_best_read": size / best / best_bandwidth,
            }
        )
    return lines


def attention(
    heads: int, kv: int, size: int, before: int, new: int, batch: int, rounds: int
) -> dict[str, Any]:
    """One line of the attention table: bfloat16, blocks of 16, torch on a contiguous cache."""
    length, ops = before + new, torch.ops.smelt
    blocks = -(-length // 16)
    cache = torch.randn(blocks * batch, 2, 16, kv, size).bfloat16()
    table = torch.arange(blocks * batch, dtype=torch.int32).view(batch, blocks)
    slots = torch.cat([torch.arange(before, length) + b * blocks * 16 for b in range(batch)])
    q, k = (torch.randn(batch * new, h, size).bfloat16() for h in (heads, kv))
    starts = torch.arange(batch + 1, dtype=torch.int32) * new
    lengths = torch.full((batch,), length, dtype=torch.int32)
    queries = q.view(batch, new, heads, size).transpose(1, 2)
    keys = torch.randn(batch, kv, length, size).bfloat16()
    mask = None
    if before and new > 1:
        mask = torch.ones(new, length, dtype=torch.bool).tril(before)
    scale = size**-0.5
    result = interleaved(
        {
            "ours": (
                lambda: ops.cached_attention(
                    *(q, k, k, cache, slots, starts, lengths, table, scale, 0, 0.0, None, None)
                ),
                5,
            ),
            "torch": (
                lambda: F.scaled_dot_product_attention(
                    queries, keys, keys, mask, is_causal=not before, enable_gqa=True
                ),
                1,
            ),
        },
        rounds,
    )
    return {
        **{"heads": heads, "kv_heads": kv, "size": size, "before": before, "new": new},
        **{"batch": batch, "median_us": result["ours"][0] * 1e6},
        **{"best_us": result["ours"][1] * 1e6, "torch_median_us": result["torch"][0] * 1e6},
        **{"torch_best_us": result["torch"][1] * 1e6},
        "speedup": result["torch"][0] / result["ours"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{"torch": torch.__version__, "python": platform.python_version()},
        **{"machine": platform.processor() or platform.machine(), "isa": build.active_isa()},
        **{"threads": options.threads, "rounds": options.rounds},
        "load_average": os.getloadavg(),  # of a shared machine: reads the numbers' worth
    }
    print(facts)
    memory = torch.ones(64 << 20)
    products: list[dict[str, Any]] = []
    print(f"{'n x k':>14} {'rows':>4} {'kernel':>11} {'us':>9} {'best':>9} {'GB/s':>6} of read")
    for n, k in SHAPES:
        for line in gemv(n, k, 1, options.rounds, memory):
            products.append(line)
            print(
                f"{n:>7} x {k:<4} {line['rows']:>4} {line['kernel']:>11} {line['median_us']:>9.0f} "
                f"{line['best_us']:>9.0f} {line['gb_s']:>6.1f} {line['of_read']:.2f}",
                flush=True,
            )
    attended = []
    print(f"{'attention':>34} {'us':>8} {'torch us':>9} speed-up")
    for case in ATTENTION:
        line = attention(*case, options.rounds)
        attended.append(line)
        name = "H{} G{} D{} before {} new {} x {}".format(*case)
        print(
            f"{name:>34} {line['median_us']:>8.0f} {line['torch_median_us']:>9.0f} "
            f"{line['speedup']:.2f}",
            flush=True,
        )
    name = f"kernels_cpu-{facts['date'][:10]}.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    record = {**facts, "products": products, "attention": attended}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
