"""Do fused operators of our own beat leaving the fusion to Inductor? One interleaved run, CPU.

    python -m benchmarks.fusion [--rounds 30] [--threads 1,2] [--packages DIR] [--out FILE]

A four-layer random bf16 Llama of shape S's width, with a small vocabulary so that the layers and
not the output layer decide the step, is compiled once for each variant:

    shipped              the pipeline as it is; references are inlined and Inductor fuses them
    add-norm-inlined     residual add + rms_norm as one operator of this script, inlined
    add-norm-kernel      the same node kept whole, computed by a C++ kernel (fusion_ops.cpp)
    activation-kernel    smelt::gated_activation kept whole, C++ kernel
    rope-kernel          smelt::rope kept whole, C++ kernel

Every round times each variant, beginning with another one each round, and keeps the quickest of a
few calls, which other work on the machine disturbs least; a variant is compared with `shipped` of
the same round. Kernels are counted in the C++ that Inductor wrote into the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import smelt
from smelt.passes import dialect, providers
from smelt.passes.base import Close, PassResult
from smelt.passes.program import Program as PassProgram
from smelt.passes.rewrite import aten, dtype, getitem, is_call, shape
from smelt.runtime import isa, machine
from smelt.runtime.artifact import open_artifact
from smelt.runtime.batch import Batch, no_tree
from smelt.runtime.kernels import build
from smelt.runtime.ops.library import operator
from smelt.runtime.ops.norm import rms_norm

from .shapes import SHAPES

HERE = Path(__file__).resolve().parent
LAYERS, VOCAB, PROMPT = 4, 1024, 128
BLOCKS = 16
DECODES, PREFILLS = 20, 3  # calls of one variant in a round
BASE = "shipped"


def _fake(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@operator(
    "bench_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) "
    "-> (Tensor, Tensor)",
    _fake,
)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [..., K] -> (rms_norm(residual + x), residual + x), both in x's dtype."""
    total = residual + x
    return rms_norm(total, weight, eps, offset), total


def allow(name: str, reference: Any) -> None:
    """Let the dialects and `choose-providers` of this process know one more operator."""
    for operators in dialect.ALLOWED.values():
        operators.add(name)
    providers.INLINED[name] = reference
    providers.PROVIDERS[name] = ("inductor", "reference")


class FuseAddRmsNorm(smelt.Pass):
    """A residual sum and the norm that reads it become one node.

    Before                              After
        s = aten.add(r, x)                  n, s = smelt.bench_add_rms_norm(x, r, w, ...)
        n = smelt.rms_norm(s, w)
    """

    name = "fuse-add-rms-norm"
    summary = "a residual add and its norm become one operator"
    after = ("canonicalize-rms-norm",)
    numerics = Close()

    def run(self, program: PassProgram, options: Any) -> PassResult:
        result = PassResult()
        for norm in program.calls(torch.ops.smelt.rms_norm.default):
            total, *rest = norm.args
            if not is_call(total, aten.add.Tensor) or len(total.users) < 2:
                continue
            residual, x = total.args
            same = shape(residual) == shape(x) and dtype(residual) == dtype(x)
            if not same or rest[0] is None:
                result.decline(norm, "the terms differ in shape or dtype, or no weight")
                continue
            with program.graph.inserting_before(total):
                target = torch.ops.smelt.bench_add_rms_norm.default
                both = program.call(target, (x, residual, *rest), like=norm)
                normed, summed = getitem(both, 0), getitem(both, 1)
            program.replace(norm, normed)
            program.replace(total, summed)
            result.matched += 1
            result.rewritten += 1
        return result


@dataclass(frozen=True)
class Variant:
    """How one package is made. kept: the operator that stays a call of a kernel."""

    name: str
    fuse: bool = False
    kept: str | None = None

    def options(self) -> dict[str, Any]:
        return {
            "passes": (FuseAddRmsNorm(),) if self.fuse else (),
            "providers": ((self.kept, "reference"),) if self.kept else (),
        }


VARIANTS = (
    Variant(BASE),
    Variant("add-norm-inlined", fuse=True),
    Variant("add-norm-kernel", fuse=True, kept="bench_add_rms_norm"),
    Variant("activation-kernel", kept="gated_activation"),
    Variant("rope-kernel", kept="rope"),
)


def main() -> None:
    options = arguments()
    allow("bench_add_rms_norm", add_rms_norm)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        torch.ops.load_library(str(build_kernels(folder)))
        steps, counts, logits = {}, {}, {}
        for variant in VARIANTS:
            say(f"compiling {variant.name}")
            steps[variant.name], counts[variant.name] = compile_variant(variant, folder)
            logits[variant.name] = steps[variant.name].prefill().float()
        result: dict[str, Any] = {
            "command": f"python -m benchmarks.fusion --rounds {options.rounds} "
            f"--threads {','.join(map(str, options.threads))}",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "shape": {**config(), "dtype": "bfloat16"},
            "prompt": PROMPT,
            "rounds": options.rounds,
            "machine": facts(),
            "variants": {
                v.name: {
                    "generated": counts[v.name],
                    "logits_difference": (logits[v.name] - logits[BASE]).abs().max().item(),
                }
                for v in VARIANTS
            },
            "threads": {},
        }
        for threads in options.threads:
            torch.set_num_threads(threads)
            result["threads"][str(threads)] = measure(steps, options.rounds)
        result["machine"]["load_average_after"] = os.getloadavg()[0]
    show(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"results: {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, with commas between")
    parser.add_argument("--packages", type=Path, help="keep what is compiled here, and reuse it")
    default = HERE / "results" / f"fusion-{time.strftime('%Y-%m-%d')}.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file")
    options = parser.parse_args()
    options.threads = [int(n) for n in options.threads.split(",")]
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def config() -> dict[str, Any]:
    return {**SHAPES["S"].config(), "num_hidden_layers": LAYERS, "vocab_size": VOCAB}


def build_kernels(folder: Path) -> Path:
    """fusion_ops.cpp as a library, for this machine alone."""
    library = folder / "fusion_ops.so"
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= isa.available()
    name = "AVX512" if wide else "AVX2" if "avx2" in isa.available() else "DEFAULT"
    flags = ["-O3", "-fPIC", "-march=native", f"-DCPU_CAPABILITY={name}"]
    flags += [f"-DCPU_CAPABILITY_{name}", *build._torch_flags(), *build._link_flags()]
    command = [*build._compiler(), str(HERE / "fusion_ops.cpp"), *flags, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def compile_variant(variant: Variant, folder: Path) -> tuple[Step, dict[str, Any]]:
    """The variant's opened step, and what Inductor generated for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config())).to(torch.bfloat16).eval()
    out = folder / variant.name
    if not out.exists():
        smelt.compile(model, out, **variant.options())
    return Step(out), generated(out / "graphs" / "step.pt2")


def generated(package: Path) -> dict[str, Any]:
    """The C++ of a package: kernels defined, their calls in a step, operator calls, and a hash of
    the kernels without comments (they hold the compiler's command line)."""
    with zipfile.ZipFile(package) as archive:
        names = [n for n in archive.namelist() if n.endswith(".cpp")]
        text = "\n".join(archive.read(n).decode() for n in names)
        lines = [
            line
            for name in sorted(n for n in names if n.endswith(".kernel.cpp"))
            for line in archive.read(name).split(b"\n")
            if line.strip() and not line.startswith(b"//")
        ]
    defined = set(re.findall(r'extern "C"\s+void\s+(cpp_fused_\w+)\s*\(', text))
    defined |= set(re.findall(r"void\s+(cpp_fused_\w+)\s*\([^;{]*\)\s*\{", text))
    calls = Counter(re.findall(r"^\s+(cpp_fused_\w+)\(", text, re.MULTILINE))
    operators = len(
        re.findall(r"^\s+(?:AOTI_TORCH_ERROR_CODE_CHECK\()?aoti_torch_proxy_ex", text, re.M)
    )
    return {
        "kernels": len(defined),
        "kernel_calls": sum(calls.values()),
        "operator_calls": operators,
        "kernel_source_sha256": hashlib.sha256(b"\n".join(lines)).hexdigest()[:16],
    }


class Step:
    """An artifact's step over one sequence: prefill of the prompt, and the decode step after it."""

    def __init__(self, folder: Path) -> None:
        self.program = open_artifact(folder).program
        self.caches = self.program.spec.allocate(BLOCKS)
        ids = torch.randint(0, VOCAB, (PROMPT + 1,), generator=torch.Generator().manual_seed(1))
        self._prompt = self._batch(ids[:PROMPT], 0)
        self._next = self._batch(ids[PROMPT:], PROMPT)

    def prefill(self) -> torch.Tensor:
        return self.program.run(self._prompt, self.caches)

    def decode(self) -> torch.Tensor:
        return self.program.run(self._next, self.caches)

    def _batch(self, ids: torch.Tensor, start: int) -> Batch:
        count = len(ids)
        at = torch.arange(start, start + count)
        return Batch(
            input_ids=ids,
            position_ids=at,
            query_start=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([start + count], dtype=torch.int32),
            slot_mapping=[at],
            block_tables=[torch.arange(BLOCKS, dtype=torch.int32)[None]],
            logits_rows=torch.tensor([count - 1]),
            tree_mask=no_tree(count),
        )


def measure(steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Microseconds a step by variant: median and best round, and the median ratio to BASE."""
    names = list(steps)
    times: dict[str, dict[str, list[float]]] = {n: {"decode": [], "prefill": []} for n in names}
    for index in range(rounds + 1):
        at = index % len(names)
        for name in names[at:] + names[:at]:
            step = steps[name]
            for kind, call, calls in (
                ("prefill", step.prefill, PREFILLS),
                ("decode", step.decode, DECODES),
            ):
                taken = [timed(call) for _ in range(calls)]
                if index:  # the first round warms up
                    times[name][kind].append(min(taken))
    out: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        base = times[BASE][kind]
        out[kind] = {
            name: {
                "median_us": round(median(times[name][kind]), 1),
                "best_us": round(min(times[name][kind]), 1),
                f"median_ratio_to_{BASE}": round(
                    median(
                        mine / theirs for mine, theirs in zip(times[name][kind], base, strict=True)
                    ),
                    4,
                ),
                "rounds_us": [round(t, 1) for t in times[name][kind]],
            }
            for name in names
        }
    return out


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def facts() -> dict[str, Any]:
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.usable_cores(),
        "instruction_sets": sorted(f for f in isa.available() if f.startswith(("avx", "amx"))),
        "kernels": build.active_isa(),
        "load_average_before": os.getloadavg()[0],
        "versions": {n: machine.package_version(n) for n in ("torch", "transformers", "smelt")},
    }


def show(result: dict[str, Any]) -> None:
    for threads, found in result["threads"].items():
        print(f"\n{threads} threads: decode and prefill, best and median us, ratio to {BASE}")
        for variant in VARIANTS:
            cells = [f"{variant.name:20}"]
            for kind in ("decode", "prefill"):
                one = found[kind][variant.name]
                ratio = one[f"median_ratio_to_{BASE}"]
                cells.append(f"{one['best_us']:9.0f} {one['median_us']:9.0f} {ratio:6.3f}")
            made = result["variants"][variant.name]["generated"]
            cells.append(f"{made['kernels']} kernels, {made['kernel_calls']} calls")
            print("  ".join(cells))


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
