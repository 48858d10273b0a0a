"""smelt::linear in bfloat16 on each instruction set of this machine, beside torch, in one run.

    python -m benchmarks.dense_cpu --rounds 9

Weights rotate through copies of 192 MiB together. Prints a line a case and writes
benchmarks/results/dense-cpu.json: microseconds of a call by shape, rows of x, and set.
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

from .kernels_cpu import interleaved

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((256, 256), (576, 576), (1536, 576), (2048, 2048), (11264, 2048), (2048, 5632))
ROWS = (1, 4, 8, 16, 32, 64, 128)
ROTATED_BYTES = 192 << 20
# Sets whose bfloat16 products are worth comparing, and torch's own.
SETS = ("avx2", "avx512", "avx512_bf16", "amx_bf16")


def measure(n: int, k: int, rows: int, rounds: int, sets: list[str]) -> dict[str, float]:
    """Median microseconds of a call by set, and of torch's."""
    library = ctypes.CDLL(str(build.library_path()))
    x = torch.randn(rows, k).bfloat16()
    copies = max(1, min(100, ROTATED_BYTES // (2 * n * k)))
    weights = [torch.randn(n, k).bfloat16() for _ in range(copies)]

    def on(name: str) -> Callable[[], object]:
        def all_copies() -> None:
            if name == "torch":
                for weight in weights:
                    F.linear(x, weight)
                return
            library.smelt_cpu_set_isa(name.encode())
            for weight in weights:
                torch.ops.smelt.linear(x, weight, None)

        return all_copies

    found = interleaved({name: (on(name), 1) for name in [*sets, "torch"]}, rounds)
    library.smelt_cpu_set_isa(sets[-1].encode())
    return {name: round(1e6 * median / copies, 1) for name, (median, _) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/dense-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    best = build.active_isa()
    known = list(build.ISA_FLAGS)
    sets = [name for name in SETS if known.index(name) <= known.index(best)]
    rows: list[dict[str, Any]] = []
    for (n, k), m in itertools.product(SHAPES, ROWS):
        rows.append({"n": n, "k": k, "rows": m, **measure(n, k, m, given.rounds, sets)})
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
