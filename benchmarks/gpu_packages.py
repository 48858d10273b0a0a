"""Steps of real models for the GPU benchmark: compiled as `smelt compile` does it, without weights.

A checkpoint of an 8B model is 16 GB that nobody has here. A configuration is traced with fake
weights instead, goes through the pipeline and is lowered for every bound; what is written is the
packages, the manifest, and shapes and dtypes of the weights, which `random_weights` fills on the
device. Computed weights (rotary frequencies) are kept as they are. With fewer layers than the model
has, compilation takes minutes less, and everything counts the layers that are there.

A smoke run compiles the bf16 step by AOTInductor for the CPU with plain operators; the other
precisions keep the graph, whose Triton kernels then run in the interpreter.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.compiler import lower, portable
from smelt.compiler.api import bytes_per_token
from smelt.compiler.artifact import describe_target
from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.quantization import stage_for
from smelt.compiler.trace import trace_config
from smelt.passes.program import Program
from smelt.passes.quantize import QuantSpec
from smelt.runtime.batch import BatchLayout
from smelt.runtime.manifest import Manifest

from .gpu_cases import Model, Scale
from .gpu_lines import Lines

PRECISIONS = ("bf16", "int4", "fp8")
CONTEXT = 4096
MAX_TOKENS, MAX_SEQUENCES = 2048, 64
WEIGHTS, COMPUTED = "weights.json", "computed.safetensors"
# Operators that run in Triton's interpreter in a smoke run.
INTERPRETED = ("linear_int4", "linear_fp8", "cached_attention", "rms_norm", "gated_activation")
# Operators of the smoke run's package, which takes no C++ kernels along.
PLAIN = (("linear", "aten"), ("cached_attention", "reference"))


@dataclass(frozen=True)
class Job:
    """One model in one precision. layers: how many of the model's, 0 for all."""

    model: Model
    precision: str
    layers: int
    small: bool

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.precision}"

    def folder(self, base: Path) -> Path:
        return base / f"{self.model.name}-{self.precision}"


def jobs_of(scale: Scale, layers: int, names: Sequence[str]) -> list[Job]:
    """Jobs by name, in this order."""
    models = (scale.llama, scale.qwen3)
    every = [Job(model, kind, layers, scale.small) for model in models for kind in PRECISIONS]
    by_name = {job.name: job for job in every}
    return [by_name[name] for name in names]


def depth(model: Model, layers: int) -> int:
    """Layers that are compiled."""
    return min(layers, model.layers) if layers else model.layers


def configuration(model: Model, layers: int) -> Any:
    """The transformers configuration of a model."""
    from transformers import LlamaConfig, Qwen3Config

    kind = Qwen3Config if model.name.startswith("qwen3") else LlamaConfig
    return kind(
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=depth(model, layers),
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied,
        max_position_embeddings=CONTEXT,
    )


def _spec(job: Job) -> QuantSpec:
    if job.precision == "int4":
        return QuantSpec("rtn", "int4", 64 if job.small else 128)
    return QuantSpec("fp8") if job.precision == "fp8" else QuantSpec()


def _program(job: Job, device: str) -> Program:
    """Traced, and through the whole pipeline."""
    program = trace_config(configuration(job.model, job.layers), torch.bfloat16)
    program.target = device
    spec = _spec(job)
    options: dict[str, dict[str, Any]] = {"insert-kv-cache": {"block_size": 16}}
    if job.small:
        triton = (PLAIN[0], *((name, "triton") for name in INTERPRETED))
        options["choose-providers"] = {"overrides": PLAIN if _packaged(job) else triton}
    quantize = None if spec.method == "none" else stage_for(spec)
    stages = pipeline(PipelineConfig("O2", quantize, options=options))
    PassManager(stages).run(program)
    program.layout = BatchLayout(
        max_tokens=MAX_TOKENS,
        max_sequences=MAX_SEQUENCES,
        max_blocks=CONTEXT // 16,
        max_rows=MAX_TOKENS,
        max_position=CONTEXT,
    )
    return program


def _packaged(job: Job) -> bool:
    return not job.small or job.precision == "bf16"


def make(job: Job, base: Path, device: str, lines: Lines) -> None:
    """Write the steps of a job into a folder of `base`; a row when they are there."""
    began = time.perf_counter()
    lines.begin(job.name)
    folder = job.folder(base)
    graphs = folder / "graphs"
    graphs.mkdir(parents=True)
    program = _program(job, device)
    assert program.caches is not None and program.layout is not None
    seconds = {"trace and passes": time.perf_counter() - began}
    steps: list[dict[str, Any]] = []
    if _packaged(job):
        at = time.perf_counter()
        steps, constants = lower.compile_steps(program, folder)
        seconds["packages"] = time.perf_counter() - at
    else:
        exported, constants = portable.export_with_inputs(program, device)
        portable.save(exported, graphs / "step.pt2")
    _write(job, program, constants, steps, folder)
    lines.row(
        {
            "model": job.model.name,
            "precision": job.precision,
            "layers": depth(job.model, job.layers),
            "layers_of_the_model": job.model.layers,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "providers": _providers(program),
        }
    )


def _providers(program: Program) -> dict[str, int]:
    """How many nodes each provider computes: "linear_int4 triton" and so on."""
    found: dict[str, int] = {}
    for record in program.records:
        for note in record.get("notes", []) if record["name"] == "choose-providers" else ():
            key = f"{note['operator']} {note['provider']}"
            found[key] = found.get(key, 0) + 1
    return found


def _write(
    job: Job,
    program: Program,
    constants: dict[str, str],
    steps: list[dict[str, Any]],
    folder: Path,
) -> None:
    from safetensors.torch import save_file

    plan = program.weights
    names = program.used_weights()
    specs = {
        name: [list(plan.specs[name].shape), str(plan.specs[name].dtype).removeprefix("torch.")]
        for name in names
    }
    (folder / WEIGHTS).write_text(json.dumps(specs))
    computed = {name: plan.computed[name] for name in names if name in plan.computed}
    save_file({name: value.clone() for name, value in computed.items()}, folder / COMPUTED)
    facts = program.facts
    assert program.caches is not None and program.layout is not None
    Manifest(
        model={
            "name": job.model.name,
            "class": facts.model_class,
            "vocab_size": facts.vocab_size,
            "max_position": facts.max_position,
        },
        quant=_spec(job).to_json(),
        target=describe_target(program.target),
        backend="aoti" if _packaged(job) else "eager",
        cache=program.caches,
        layout=program.layout,
        constants=constants,
        layout_steps=[],
        passes=[],
        providers=[],
        memory={
            "weight_bytes_per_token": bytes_per_token(program),
            "kv_bytes_per_token": program.caches.bytes_per_token(),
            "weights_bytes": sum(plan.specs[name].nbytes for name in names),
        },
        steps=steps,
        files={step["file"]: {} for step in steps},
    ).write(folder)


def random_weights(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """What the packages of `folder` read, by planned name: random, and small enough to stay finite
    through all layers."""
    from safetensors.torch import load_file

    weights = {name: x.to(device) for name, x in load_file(folder / COMPUTED).items()}
    generator = torch.Generator(device).manual_seed(0)
    for name, (shape, kind) in json.loads((folder / WEIGHTS).read_text()).items():
        if name not in weights:
            dtype: torch.dtype = getattr(torch, kind)
            weights[name] = _filled(name, tuple(shape), dtype, device, generator)
    return weights


def _filled(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    if dtype == torch.uint8:
        low, high = 0, 16  # zero points of int4
        return torch.randint(low, high, shape, dtype=dtype, device=device, generator=generator)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        high = min(limits.max, 1 << 31)
        return torch.randint(-high, high, shape, dtype=dtype, device=device, generator=generator)
    if "scales" in name:
        return torch.full(shape, 2e-3, dtype=dtype, device=device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    made = torch.empty(shape, dtype=dtype, device=device)
    # A few rows at a time: the numbers are drawn in float32.
    step = max(1, (1 << 27) // max(1, math.prod(shape[1:])))
    scale = 8.0 if dtype.itemsize == 1 else 0.02
    for part in made.split(step):
        drawn = torch.randn(part.shape, device=device, generator=generator)
        part.copy_((drawn * scale).to(dtype))
    return made
