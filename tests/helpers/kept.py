"""Quantized folders up to the pass that keeps their integers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from helpers.quantized import exported, module
from helpers.tiny import Subject

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.stored import read_stored
from smelt.compiler.weights import bind, checkpoint_specs
from smelt.models.checkpoint import Checkpoint
from smelt.passes.quantize import QuantSpec

IDS = torch.arange(3, 27) * 5 % 128


@functools.cache
def llama() -> Any:
    return module("Llama")


def bound(folder: Path, model: Any = None) -> Subject:
    """The program of a quantized folder just before its quantization stage."""
    model = llama() if model is None else model
    checkpoint = Checkpoint(folder)
    stored = checkpoint_specs(checkpoint)
    quantized = read_stored(folder, checkpoint, QuantSpec())
    assert quantized is not None
    program = exported(model)
    bind(program.weights, stored, model, "here", quantized)
    stages = pipeline(PipelineConfig())
    names = [stage.pass_.name for stage in stages]
    PassManager(stages[: names.index("keep-logits-rows")]).run(program)
    return Subject(program, checkpoint, IDS)


def expected(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0]


def weights_of(subject: Subject) -> dict[str, torch.Tensor]:
    names = subject.program.used_weights()
    return dict(subject.program.weights.materialize(names, subject.source))
