"""Position scaling: the factors, the trace and the cached step are those of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.rotary import (
    BY_LENGTH,
    CLOSE,
    KINDS,
    LIMIT,
    alone,
    cached,
    rotary_config,
    rotary_lowered,
    rotary_subject,
)
from helpers.steps import Stepper
from helpers.tiny import Subject, tiny_config

from smelt.compiler.rotary import RotaryError, length_rotaries, rotation_by_token
from smelt.compiler.trace import check_against_eager, trace_config
from smelt.models.config import max_positions
from smelt.models.skeleton import build
from smelt.passes.program import Program

LENGTHS = (5, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 4 * LIMIT)
MODELS = [("llama", kind) for kind in KINDS] + [("phi3", "longrope")]


def rotary_module(kind: str, theta: float = 10000.0) -> Any:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(rotary_config(kind, theta=theta))


def transformers_frequencies(kind: str, length: int) -> torch.Tensor:
    """float32 [D / 2], as transformers initialises them for a sequence of `length` tokens."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    module = rotary_module(kind)
    if kind == "default":
        return module.compute_default_rope_parameters(module.config)[0]
    return ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=length)[0]


@pytest.mark.parametrize("length", [*LENGTHS, 1000, 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_frequencies_are_those_of_transformers(kind: str, length: int) -> None:
    module = rotary_module(kind)
    expected = transformers_frequencies(kind, length)
    found = length_rotaries(torch.nn.ModuleList([module]))
    assert bool(found) == (kind in BY_LENGTH)
    if found:
        short, own = found[0].frequencies(torch.tensor([1, length]))
        torch.testing.assert_close(short, transformers_frequencies(kind, 1), atol=0, rtol=1e-6)
    else:
        own = module.inv_freq
    torch.testing.assert_close(own, expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_cosines_and_sines_are_those_of_the_module(kind: str, length: int) -> None:
    """Of a sequence alone: by transformers, and by what is traced, for every position of it."""
    module = rotary_module(kind)
    positions = torch.arange(length)[None]
    x = torch.zeros(1)
    expected = copy.deepcopy(module)(x, positions)
    with rotation_by_token(torch.nn.ModuleList([module])):
        ours = module(x, positions)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["cohere", "gemma3_text", "glm", "phi3", "gpt_neox"])
@pytest.mark.parametrize("kind", BY_LENGTH)
def test_other_layouts_of_the_angles_are_found(kind: str, family: str) -> None:
    """Pairs (Cohere), parts of the head (GLM, GPT-NeoX), one kind for each type of layer."""
    config = tiny_config(family)
    nested = family == "gemma3_text"
    old = config.rope_parameters["full_attention"] if nested else config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(head * old.get("partial_rotary_factor", 1.0)) // 2
    new = {**old, "rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        new |= {
            "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0] * pairs,
            "long_factor": [1.0 + i / 8 for i in range(pairs)],
        }
    if nested:
        config.rope_parameters["full_attention"] = new
    else:
        config.rope_parameters = new
    program, difference = check_against_eager(config)
    assert difference < 1e-5
    assert program.facts.module_counts["rotary_by_length"] == 1
    assert len(program.calls(torch.ops.smelt.sequence_length.default)) == 1


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_model_traces_without_its_weights(kind: str) -> None:
    program = trace_config(rotary_config(kind), torch.bfloat16)
    assert len(program.calls(torch.ops.smelt.sequence_length.default)) == 1
    assert program.facts.max_position == 4 * LIMIT


def test_a_module_that_computes_something_else_is_refused() -> None:
    model = build(rotary_config("dynamic"), torch.float32, real=True)
    model.model.rotary_emb.attention_scaling = 1.5
    model.model.rotary_emb.original_inv_freq *= 1.01
    with pytest.raises(RotaryError, match="LlamaRotaryEmbedding computes dynamic rotary scaling"):
        length_rotaries(model)
        with rotation_by_token(model):
            pass


def test_two_ways_at_once_are_refused() -> None:
    modules = torch.nn.ModuleList([rotary_module("dynamic"), rotary_module("longrope")])
    with pytest.raises(RotaryError, match="in more than one way"):
        length_rotaries(modules)


def test_a_model_with_rotary_code_of_its_own_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = rotary_config("dynamic")
    with pytest.raises(RotaryError, match="Linear uses dynamic rotary scaling in a module of its"):
        length_rotaries(model)


def test_the_module_gets_its_forward_back() -> None:
    module = rotary_module("longrope")
    with rotation_by_token(torch.nn.ModuleList([module])):
        assert "forward" in vars(module)
    assert "forward" not in vars(module)


@pytest.mark.parametrize(
    ("kind", "length"),
    [("default", LIMIT)] + [(k, 4 * LIMIT) for k in KINDS if k != "default"],
)
def test_the_context_is_what_scaling_makes_of_it(kind: str, length: int) -> None:
    assert max_positions(rotary_config(kind)) == length


def run_traced(program: Program, subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    weights = dict(program.weights.materialize(program.used_weights(), subject.source))
    output = program.run({"input_ids": ids, "position_ids": torch.arange(len(ids))}, weights)
    logits: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return logits


@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_traced_logits_beyond_the_training_length(family: str, kind: str) -> None:
    subject = rotary_subject(kind, family)
    for length in LENGTHS:
        ids = subject.ids[:length]
        found = run_traced(subject.program, subject, ids)
        torch.testing.assert_close(found, alone(subject, ids), **CLOSE)


def stepper(subject: Subject, *sequences: torch.Tensor, prompts: Any = None) -> Stepper:
    program = subject.program
    weights = dict(program.weights.materialize(program.used_weights(), subject.source))
    return Stepper(program, weights, sequences, prompts)


@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_a_short_and_a_long_sequence_in_chunks_of_one_batch(family: str, kind: str) -> None:
    """Each takes its own factors, and chunks of a prompt those of the whole."""
    subject = rotary_lowered(kind, family)
    spec = subject.program.caches
    assert spec is not None
    assert (spec.rope is not None) == (kind in BY_LENGTH)
    long, short = subject.ids[: 3 * LIMIT], subject.ids.flip(0)[: LIMIT - 4]
    steps = stepper(subject, long, short)
    parts: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for chunks in ({0: 7, 1: 3}, {1: 20}, {0: 60, 1: 1}, {0: 29, 1: 4}):
        for b, logits in steps.step(chunks).items():
            parts[b].append(logits)
    torch.testing.assert_close(torch.cat(parts[0]), alone(subject, long), **CLOSE)
    torch.testing.assert_close(torch.cat(parts[1]), alone(subject, short), **CLOSE)


@pytest.mark.parametrize("prompt", [LIMIT - 5, LIMIT, LIMIT + 7])
def test_dynamic_decodes_as_transformers_does_with_its_cache(prompt: int) -> None:
    subject = rotary_lowered("dynamic")
    ids = subject.ids[: LIMIT + 20]
    expected = cached(subject, ids, prompt)
    steps = stepper(subject, ids, prompts=[prompt])
    rows = [steps.step({0: prompt})[0]]
    rows += [steps.step({0: 1})[0] for _ in range(len(ids) - prompt)]
    torch.testing.assert_close(torch.cat(rows), expected, **CLOSE)
    # A cache that is made anew in other chunks is the same cache.
    again = stepper(subject, ids, prompts=[prompt])
    rows = [again.step({0: count})[0] for count in (prompt - 3, 9, len(ids) - prompt - 6)]
    torch.testing.assert_close(torch.cat(rows), expected, **CLOSE)
    # Which is another than that of one forward over all.
    assert (alone(subject, ids) - expected)[-1].abs().max() > 1e-3
