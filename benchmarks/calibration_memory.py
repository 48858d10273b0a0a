"""The memory that calibration takes, beside the plan it makes of it.

    python -m benchmarks.calibration_memory                 shape S, awq and gptq
    python -m benchmarks.calibration_memory --shape M --quant awq --samples 32

Each method quantizes a random-weight Llama of the shape in a process of its own. Measured is the
process's anonymous memory (RssAnon of /proc/self/status, read every 5 ms) above what it had when
calibration began; mapped checkpoint files are not in it, as they are not in the plan. As in `smelt
compile`, the C library gives freed blocks back at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from . import shapes

ROOT = Path(__file__).resolve().parents[1]
QUANTS = ("awq", "gptq", "smoothquant", "mixed")


def anonymous() -> int:
    """Bytes of this process that no file is behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon: Linux is needed")


class Peak(threading.Thread):
    """The largest `anonymous` while it runs, less what there was at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.highest = anonymous()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, anonymous())

    def stop(self) -> int:
        self.done.set()
        self.join()
        return max(self.highest, anonymous()) - self.before


def measure(shape: str, quant: str, samples: int, seqlen: int) -> dict[str, Any]:
    """One method in this process."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from smelt.compiler.loading import load
    from smelt.compiler.manager import PassManager
    from smelt.compiler.options import CompileOptions
    from smelt.compiler.pipeline import PipelineConfig, pipeline
    from smelt.compiler.quantization import stage_for
    from smelt.compiler.trace import export, program_from_export
    from smelt.compiler.weights import bind
    from smelt.models.skeleton import fake_parameters
    from smelt.passes.quantize import QuantSpec
    from smelt.runtime.machine import return_freed_memory

    return_freed_memory()
    model = shapes.SHAPES[shape]
    loaded = load(shapes.checkpoint(model), CompileOptions(dtype="bf16"))
    fake_parameters(
        loaded.skeleton, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    )
    program = program_from_export(export(loaded.skeleton), loaded.skeleton, loaded.config)
    bind(program.weights, loaded.stored, loaded.skeleton, loaded.name, loaded.quantized)
    stages = pipeline(PipelineConfig())
    names = [stage.pass_.name for stage in stages]
    PassManager(stages[: names.index("keep-logits-rows")]).run(program)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.vocab, (samples, seqlen), generator=generator).tolist()
    size = {} if quant in ("smoothquant", "mixed") else {"group_size": model.group}
    planned: list[Any] = []
    stage = stage_for(QuantSpec(quant, **size), ids, loaded.source, planned=planned.append)
    peak, started = Peak(), time.perf_counter()
    peak.start()
    stage.pass_.run(program, stage.options)
    found = peak.stop()
    plan = max(planned, key=lambda memory: memory.bytes)
    return {
        "shape": shape,
        "quant": quant,
        "samples": samples,
        "seqlen": seqlen,
        "planned_bytes": plan.bytes,
        "measured_bytes": found,
        "measured_over_planned": round(found / plan.bytes, 3),
        "where": plan.where,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--quant", action="append", choices=QUANTS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quants = given.quant or ["awq", "gptq", "smoothquant"]
    if given.here:
        print(json.dumps(measure(given.shape, quants[0], given.samples, given.seqlen)))
        return
    rows = []
    for quant in quants:
        command = [sys.executable, "-m", "benchmarks.calibration_memory", "--here"]
        command += ["--shape", given.shape, "--quant", quant]
        command += ["--samples", str(given.samples), "--seqlen", str(given.seqlen)]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    out = given.out or ROOT / "benchmarks" / "results" / f"calibration-memory-{given.shape}.json"
    record = {
        "rows": rows,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
