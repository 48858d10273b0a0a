"""Every Triton kernel and every shipped table entry, compiled for GPUs that are not here.

    make kernels
    python -m benchmarks.kernels_gpu --capability 90 --only linear_int4

Writes benchmarks/results/kernels.json: for each kernel, entry and compute capability its registers,
spills, shared memory against the chip's limit, tensor-core instructions, and whether it loads 16
bytes at once. Exits with 1 if a hot kernel spills, shared memory is over-full, an instruction that
is meant to be there is not, or an entry of a table is compiled by nothing.

A row that is there already stands, as long as the kernel's source, what it is compiled with and
Triton's version are those it was made from; `--anew` compiles all of them (half an hour on two
cores).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "kernels.json"
CAPABILITIES = (80, 86, 90, 100, 120)
MODULES = (
    "attention",
    "experts",
    "experts_int4",
    "kv_write",
    "linear_fp8",
    "linear_fp8_weight",
    "linear_int4",
    "linear_int8",
    "linear_w8a8",
    "norms",
    "quantize",
    "routing",
    "sampling",
)


def variants(module: str, capability: int) -> Iterator[Any]:
    """What a kernel module wants compiled for a capability."""
    found = importlib.import_module(f"smelt.runtime.kernels.gpu.{module}")
    yield from found.variants(capability)


def key(variant: Any, capability: int) -> str:
    """Of all that the result of compiling follows from."""
    import triton

    facts = (
        *(variant.name, variant.kernel.cache_key, sorted(variant.signature.items())),
        *(sorted(variant.constants.items()), variant.config.to_json(), sorted(variant.aligned)),
        *(variant.hot, variant.tensor_cores, variant.wide_loads, capability, triton.__version__),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def recorded() -> dict[str, dict[str, Any]]:
    """Rows of the result file by their keys."""
    if not OUT.is_file():
        return {}
    return {row["key"]: row for row in json.loads(OUT.read_text())["rows"] if "key" in row}


def compile_one(job: tuple[str, int, int]) -> dict[str, Any]:
    """Row of the result for variant number `index` of (module, capability, index)."""
    from smelt.runtime.kernels.gpu.ahead import compile_for, complaint

    module, capability, index = job
    variant = list(variants(module, capability))[index]
    row: dict[str, Any] = {
        "kernel": module,
        "variant": variant.name,
        "capability": capability,
        "key": key(variant, capability),
        **variant.config.to_json(),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            usage = compile_for(variant, capability)
    except Exception as error:  # of whatever stage of the compiler
        lines = str(error).strip().splitlines() or ["?"]
        return {**row, "complaint": f"does not compile: {type(error).__name__}: {lines[0]}"}
    row |= asdict(usage) | {"matrix": list(usage.matrix), "hot": variant.hot}
    return {**row, "complaint": complaint(variant, usage, capability)}


def uncompiled(capabilities: list[int]) -> list[str]:
    """Entries of shipped tables that no variant listed in this process was made of."""
    from smelt.runtime.kernels.gpu.tuning import tables, used

    chosen = used()
    return [
        f"tuned/{kernel}.json: {capability} {shape} is compiled by no variant"
        for kernel, by_capability in tables().items()
        for capability, entries in by_capability.items()
        if capability in capabilities
        for shape in entries
        if (kernel, capability, shape) not in chosen
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--only", action="append", choices=MODULES)
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--anew", action="store_true", help="compile what is recorded as well")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.relative_to(ROOT)}, if all are")
    given = parser.parse_args()
    capabilities = given.capability or list(CAPABILITIES)
    modules = given.only or list(MODULES)
    before = {} if given.anew else recorded()
    wanted = {
        (module, capability, i): key(variant, capability)
        for module in modules
        for capability in capabilities
        for i, variant in enumerate(variants(module, capability))
    }
    jobs = [job for job, found in wanted.items() if found not in before]
    # Spawned: a fork would take the parent's threads and locks along.
    context = get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        made = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    rows = [made[job] if job in made else before[found] for job, found in wanted.items()]
    complaints = [
        f"{row['kernel']} {row['variant']} sm_{row['capability']}: {row['complaint']}"
        for row in rows
        if row["complaint"]
    ]
    if modules == list(MODULES):
        complaints += uncompiled(capabilities)
        if given.out or (capabilities == list(CAPABILITIES) and rows != list(before.values())):
            write(given.out or OUT, rows)
    elif given.out:
        write(given.out, rows)
    for line in complaints:
        print(line, file=sys.stderr)
    print(f"{len(rows)} kernels, {len(jobs)} compiled now, {len(complaints)} complaints")
    return 1 if complaints else 0


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    import torch
    import triton

    facts = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
