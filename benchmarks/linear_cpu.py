"""Linear layers of every format on each instruction set of this machine, beside torch, in one run.

    python -m benchmarks.linear_cpu --rounds 9

Weights are random and rotate through copies of 192 MiB together; torch multiplies by bfloat16
ones. Prints a line a case and writes benchmarks/results/linear-cpu.json: microseconds of a call by
format, shape, rows of x, and set.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from smelt.runtime import machine
from smelt.runtime.kernels import build

from .kernels_cpu import (
    ROTATED_BYTES,
    Weight,
    dense_weight,
    grouped_weight,
    int8_weight,
    interleaved,
)

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (11264, 2048), (2048, 5632))
ROWS = (1, 4, 8, 16, 64, 512)
# Sets that are worth comparing.
SETS = ("avx512_bf16", "amx_bf16")


def _w8a8(n: int, k: int) -> Weight:
    packed = torch.randint(-127, 128, (n // 16, k // 4, 16, 4), dtype=torch.int8)
    return packed, torch.rand(n)


def _fp8(n: int, k: int) -> Weight:
    return torch.randn(n // 16, k, 16).to(torch.float8_e4m3fn), torch.rand(n // 16, 1, 16)


# format: (a random weight, the product)
FORMATS: dict[str, tuple[Callable[[int, int], Weight], Callable[..., torch.Tensor]]] = {
    "bf16": (dense_weight, lambda x, n, w: torch.ops.smelt.linear(x, w, None)),
    "int8": (
        lambda n, k: int8_weight(n, k, 1),
        lambda x, n, *w: torch.ops.smelt.linear_int8_blocked(x, *w, None, n),
    ),
    "int4": (
        lambda n, k: grouped_weight(n, k, 4),
        lambda x, n, *w: torch.ops.smelt.linear_int4_blocked(x, *w, None, n),
    ),
    "int3": (
        lambda n, k: grouped_weight(n, k, 3),
        lambda x, n, *w: torch.ops.smelt.linear_int3_blocked(x, *w, None, n),
    ),
    "w8a8": (_w8a8, lambda x, n, *w: torch.ops.smelt.linear_w8a8_blocked(x, *w, None, None)),
    "fp8": (
        _fp8,
        lambda x, n, *w: torch.ops.smelt.linear_fp8_blocked(x, *w, None, None, "none", 0, n),
    ),
}


def measure(
    library: ctypes.CDLL, format: str, n: int, k: int, rows: int, rounds: int, sets: list[str]
) -> dict[str, Any]:
    """Median microseconds of a call by set, and of torch's bfloat16 product."""
    x = torch.randn(rows, k).bfloat16()
    make, call = FORMATS[format]

    def copies(make: Callable[[int, int], Weight]) -> list[Weight]:
        first = make(n, k)
        most = 100 if rows < 64 else 10
        count = max(2, min(most, ROTATED_BYTES // sum(t.nbytes for t in first)))
        return [first, *(tuple(t.clone() for t in first) for _ in range(count - 1))]

    weights, dense = copies(make), copies(dense_weight)

    def on(name: str) -> Callable[[], object]:
        def all_copies() -> None:
            if name == "torch":
                for (weight,) in dense:
                    F.linear(x, weight)
                return
            library.smelt_cpu_set_isa(name.encode())
            for weight in weights:
                call(x, n, *weight)

        return all_copies

    found = interleaved({name: (on(name), 1) for name in [*sets, "torch"]}, rounds)
    library.smelt_cpu_set_isa(sets[-1].encode())
    counts = {name: len(dense if name == "torch" else weights) for name in found}
    return {name: round(1e6 * found[name][0] / counts[name], 1) for name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/linear-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    best, library = build.active_isa(), ctypes.CDLL(str(build.library_path()))
    known = list(build.ISA_FLAGS)
    sets = [name for name in SETS if known.index(name) <= known.index(best)]
    rows: list[dict[str, Any]] = []
    for name, (n, k), m in itertools.product(given.formats.split(","), SHAPES, ROWS):
        found = measure(library, name, n, k, m, given.rounds, sets)
        rows.append({"format": name, "n": n, "k": k, "rows": m, **found})
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "microseconds": rows,
        "threads": given.threads,
        "torch": torch.__version__,
        "processor": machine.cpu_model(),
        "date": time.strftime("%Y-%m-%d"),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
