"""Small programs to test passes on: hand-written toys, and tiny random transformers models."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.trace import (
    _small_model,
    check_against_eager,
    export,
    program_from_export,
    refuse_unsupported,
)
from smelt.compiler.weights import ModuleSource
from smelt.passes.base import Pass
from smelt.passes.program import Program
from smelt.passes.weights import TensorSource, WeightPlan

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"),
    *("gpt2", "gpt_neox", "stablelm", "cohere2", "starcoder2", "smollm3", "mixtral", "qwen3_moe"),
)
TOY_VOCAB = 37


class Toy(nn.Module):
    """Embedding, `body`, output layer, called as transformers calls a causal LM.

    A test overrides `body(x [1, T, K], positions [1, T]) -> [1, T, K]`.
    """

    def __init__(self, hidden: int = 16, layers: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOY_VOCAB, hidden)
        self.head = nn.Linear(hidden, TOY_VOCAB, bias=False)
        self.layers_with_attention = layers

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        x = self.body(self.embed(input_ids), position_ids)
        return SimpleNamespace(logits=self.head(x))


@dataclass(frozen=True)
class Subject:
    """A traced program with the weights to run it and token ids of its vocabulary.

    model and logits ([T, V], eager) are there for transformers models.
    """

    program: Program
    source: TensorSource
    ids: torch.Tensor
    model: Any = None
    config: Any = None
    logits: torch.Tensor | None = None

    def clone(self) -> Subject:
        parts = (self.source, self.ids, self.model, self.config, self.logits)
        return Subject(clone_program(self.program), *parts)


def program_of(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Subject:
    """Trace a `Toy` with random weights; one-dimensional ones lie around one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 1 + 0.3 * noise
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5
    module = module.to(dtype).eval().requires_grad_(False)
    config = SimpleNamespace(
        vocab_size=TOY_VOCAB,
        max_position_embeddings=256,
        num_hidden_layers=getattr(module, "layers_with_attention", 0),
    )
    program = program_from_export(export(module), module, config)
    ids = torch.randint(0, TOY_VOCAB, (11,), generator=generator)
    return Subject(program, ModuleSource(module), ids, module, config)


def tiny_config(family: str, **overrides: Any) -> Any:
    """transformers' default configuration of a model type, with `overrides`; tracing shrinks it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **overrides)


@functools.cache
def _traced(family: str) -> tuple[Subject, float]:
    config = tiny_config(family)
    program, difference = check_against_eager(config)
    small, model, ids, logits = _small_model(config, False)
    refuse_unsupported(program, small)
    return Subject(program, ModuleSource(model), ids, model, small, logits), difference


def tiny_difference(family: str) -> float:
    """Largest difference between the traced graph's logits and eager's."""
    return _traced(family)[1]


def tiny_program(family: str) -> Subject:
    """A tiny random model of a family, traced once a process; the caller gets its own copy."""
    return _traced(family)[0].clone()


@functools.cache
def _lowered(family: str) -> Subject:
    subject = tiny_program(family)
    PassManager(pipeline(PipelineConfig())).run(subject.program)
    return subject


def tiny_lowered(family: str) -> Subject:
    """`tiny_program` after the whole default pipeline, shared: do not change it."""
    return _lowered(family)


def clone_program(program: Program) -> Program:
    """A copy whose graph, inputs and plan can change without the original."""
    graph = copy.deepcopy(program.graph)
    plan = program.weights
    return Program(
        module=fx.GraphModule(program.module, graph),
        inputs=dict(program.inputs),
        weights=WeightPlan(list(plan.steps), dict(plan.specs), dict(plan.computed)),
        facts=program.facts,
        dialect=program.dialect,
        caches=program.caches,
        layout=program.layout,
        target=program.target,
        records=list(program.records),
    )


def after(subject: Subject, *passes: Pass) -> Subject:
    """`subject` after `passes`, in place."""
    for pass_ in passes:
        result = pass_.run(subject.program, pass_.options({}))
        assert result is not None
        if pass_.produces is not None:
            subject.program.dialect = pass_.produces
        subject.program.clean()
    return subject
