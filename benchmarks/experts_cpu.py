"""The experts' CPU kernels beside the loop over experts in torch, interleaved in one run.

    python benchmarks/experts_cpu.py [--threads N] [--rounds N] [--tokens 1,8,64,512]

Layers of Mixtral's and Qwen3-MoE's shape with fewer experts than they have, so that a copy fits
beside others: layers rotate, as they do in a model, and each call finds its weights in memory and
not in a cache. The loop is the reference on bfloat16 weights: gather, two products, scatter. Tokens
choose their experts at random. Prints a table and writes
benchmarks/results/experts_cpu-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels_cpu import ROTATED_BYTES, Timed, interleaved

from smelt.runtime.kernels import build
from smelt.runtime.ops.experts import experts as reference

# name, K, I, experts here, experts a token
SHAPES = (
    ("mixtral-8x7b / 4", 1024, 3584, 8, 2),
    ("qwen3-30b-a3b", 2048, 768, 32, 8),
)
GROUP = 64
WORDS = {"int4": 8, "int2": 16}  # features a word of the blocked layout
Layer = tuple[torch.Tensor | None, ...]


def dense(k: int, width: int, experts: int) -> Layer:
    gate_up = torch.randn(experts, 2 * width, k, dtype=torch.bfloat16)
    return gate_up, torch.randn(experts, k, width, dtype=torch.bfloat16)


def blocked(format: str, k: int, width: int, experts: int) -> Layer:
    """(packed, scales, zeros) of gate_up and of down, with values at random."""
    made: list[torch.Tensor | None] = []
    for n, features in ((2 * width, k), (k, width)):
        blocks = experts * n // 16
        if format == "fp8":
            q = torch.randint(0, 120, (blocks, features, 16), dtype=torch.uint8)
            made += [q.view(torch.float8_e4m3fn), torch.rand(blocks, 1, 16), None]
            continue
        groups = 1 if format == "int8" else features // GROUP
        scales = torch.rand(blocks, groups, 16).bfloat16()
        if format == "int8":
            q = torch.randint(-127, 128, (blocks, features, 16), dtype=torch.int8)
            made += [q, scales, None]
            continue
        words = (blocks, features // WORDS[format], 16)
        q = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32)
        made += [q, scales, torch.full(scales.shape, 8, dtype=torch.uint8)]
    return tuple(made)


def rotating(call: Callable[..., object], make: Callable[[], Layer]) -> tuple[Any, int, int]:
    """(call over rotating layers, how many, bytes of one)."""
    first = make()
    size = sum(t.nbytes for t in first if t is not None)
    layers = [first, *(make() for _ in range(max(1, ROTATED_BYTES // size)))]
    turn = itertools.cycle(layers)
    return (lambda: call(*next(turn))), len(layers), size


def measure(
    name: str, k: int, width: int, experts: int, top: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Lines of one shape and number of tokens; the loop's is the first."""
    ops, x = torch.ops.smelt, torch.randn(tokens, k).bfloat16()
    index = torch.rand(tokens, experts).argsort(1)[:, :top]
    share = torch.full((tokens, top), 1 / top)
    used = int(index.unique().numel()) / experts

    def quantized(format: str) -> tuple[Any, int, int]:
        def call(*layer: torch.Tensor | None) -> object:
            sizes = ("silu", format, experts, 0, width)
            return ops.experts_quantized_blocked(x, index, share, *layer, *sizes)

        return rotating(call, lambda: blocked(format, k, width, experts))

    kinds = {
        "torch loop": rotating(
            lambda *w: reference(x, index, share, *w, "silu"), lambda: dense(k, width, experts)
        ),
        "bf16": rotating(
            lambda *w: ops.experts_dense(x, index, share, *w, "silu"),
            lambda: dense(k, width, experts),
        ),
        **{format: quantized(format) for format in ("int8", "int4", "int2", "fp8")},
    }
    timed: Timed = {name: (call, layers) for name, (call, layers, _) in kinds.items()}
    found = interleaved(timed, rounds)
    return [
        {
            **{"layer": name, "k": k, "width": width, "experts": experts, "top": top},
            **{"tokens": tokens, "kernel": kernel},
            **{"median_us": found[kernel][0] * 1e6, "best_us": found[kernel][1] * 1e6},
            "gb_s": size * used / found[kernel][0] / 1e9,
            "speedup": found["torch loop"][0] / found[kernel][0],
        }
        for kernel, (_, _, size) in kinds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", default="1,8,64,512")
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
    lines: list[dict[str, Any]] = []
    print(f"{'layer':>18} {'tokens':>6} {'kernel':>10} {'us':>9} {'best':>9} {'GB/s':>6} speed-up")
    for shape in SHAPES:
        for tokens in map(int, options.tokens.split(",")):
            for line in measure(*shape, tokens, options.rounds):
                lines.append(line)
                print(
                    f"{line['layer']:>18} {tokens:>6} {line['kernel']:>10} "
                    f"{line['median_us']:>9.0f} {line['best_us']:>9.0f} {line['gb_s']:>6.1f} "
                    f"{line['speedup']:.2f}",
                    flush=True,
                )
    path = Path(__file__).parent / "results" / f"experts_cpu-{facts['date'][:10]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, "experts": lines}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
