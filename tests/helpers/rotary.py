"""Tiny random models with every kind of rotary scaling, trained to 32 tokens as it were."""

from __future__ import annotations

import functools
from typing import Any

import torch
from helpers.tiny import Subject, clone_program, tiny_config

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.trace import (
    PackedForward,
    export,
    program_from_export,
    refuse_unsupported,
)
from smelt.compiler.weights import ModuleSource
from smelt.models.skeleton import build

LIMIT = 32
HEAD = 16
# What the last bits of a power may move frequencies by, and logits of these models.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "llama3": {
        **{"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": LIMIT,
    },
    "longrope": {
        **{"factor": 4.0, "original_max_position_embeddings": LIMIT},
        "short_factor": [1.0 + 0.05 * i for i in range(HEAD // 2)],
        "long_factor": [1.5 + 0.7 * i for i in range(HEAD // 2)],
    },
}
KINDS = tuple(PARAMETERS)
BY_LENGTH = ("dynamic", "longrope")


def rotary_config(kind: str, family: str = "llama", theta: float = 100.0) -> Any:
    """A small theta, so that all features turn within a few hundred tokens."""
    stretched = kind in ("llama3", "longrope")
    sizes: dict[str, Any] = {
        **{"vocab_size": 64, "hidden_size": 4 * HEAD, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "max_position_embeddings": 4 * LIMIT if stretched else LIMIT,
        **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    }
    if family == "phi3":
        sizes |= {"original_max_position_embeddings": LIMIT, "sliding_window": None}
    parameters = {"rope_type": kind, "rope_theta": theta, **PARAMETERS[kind]}
    return tiny_config(family, **sizes, rope_parameters=parameters)


@functools.cache
def _subject(kind: str, family: str) -> Subject:
    config = rotary_config(kind, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config, torch.float32, real=True)
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv" in name:
                parameter.data *= 12  # attention that looks at positions sharply
            elif parameter.dim() == 2:
                parameter.data *= 4
        ids = torch.randint(0, 64, (4 * LIMIT,))
    program = program_from_export(export(model), model, config)
    refuse_unsupported(program, config)
    return Subject(program, ModuleSource(model), ids, model, config)


def rotary_subject(kind: str, family: str = "llama") -> Subject:
    """A traced model with that kind of scaling, the caller's own copy; ids int64 [4 * LIMIT]."""
    return _subject(kind, family).clone()


@functools.cache
def rotary_lowered(kind: str, family: str = "llama") -> Subject:
    """The same after the whole default pipeline, shared: do not change it."""
    subject = rotary_subject(kind, family)
    program = clone_program(subject.program)
    PassManager(pipeline(PipelineConfig())).run(program)
    return Subject(program, subject.source, subject.ids, subject.model, subject.config)


def alone(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one forward of transformers over ids [T], as of a model just loaded."""
    with torch.no_grad():
        forward = PackedForward(subject.model)
        forward(ids[:1], torch.arange(1))  # a short sequence: dynamic NTK forgets earlier ones
        logits: torch.Tensor = forward(ids, torch.arange(len(ids)))
    return logits


def cached(subject: Subject, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits [T, V] by transformers with its cache: the prompt whole, then token by token."""
    model: Any = subject.model
    rows = []
    with torch.no_grad():
        model(input_ids=ids[None, :1], use_cache=False)
        output = model(input_ids=ids[None, :prompt], use_cache=True)
        rows.append(output.logits[0])
        for i in range(prompt, len(ids)):
            output = model(
                input_ids=ids[None, i : i + 1],
                position_ids=torch.tensor([[i]]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            rows.append(output.logits[0])
    return torch.cat(rows)
