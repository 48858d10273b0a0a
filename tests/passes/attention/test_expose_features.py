"""expose-features: the second output holds the very vectors that the eager model computes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import FAMILIES, Subject, Toy, after, program_of, tiny_program
from torch import nn

from smelt.compiler.features import step_features
from smelt.compiler.manager import PassManager
from smelt.compiler.numerics import step_values
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.passes.attention.expose_features import ExposeFeatures, stream_layers
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.program import Program


def outputs(program: Program, subject: Subject, rows: list[int] | None = None) -> Any:
    weights = dict(program.weights.materialize(program.used_weights(), subject.source))
    values = step_values(program, subject.ids)
    if rows is not None:
        values["logits_rows"] = torch.tensor(rows)
    return program.run(values, weights)


def eager_streams(subject: Subject) -> list[torch.Tensor]:
    """What enters each layer, and the last layer's result, [T, K] each; by forward hooks."""
    streams: list[torch.Tensor] = []
    (layers,) = [
        m
        for m in subject.model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == subject.config.num_hidden_layers
    ]

    def keep(value: Any) -> None:
        streams.append((value[0] if isinstance(value, tuple) else value)[0])

    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda m, args, out: keep(out)))
    with torch.no_grad():
        subject.model(input_ids=subject.ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return streams


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streams_of_every_family_are_eagers(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops(), KeepLogitsRows())
    found = check_pass(
        subject,
        ExposeFeatures(),
        before={},
        after={},
        matched=1,
        rewritten=1,
        options={"kind": "eagle3"},
    )
    streams = eager_streams(subject)
    logits, features = outputs(found.program, subject, [3])
    layers = stream_layers(len(streams) - 1)
    assert logits.shape[0] == 1 and found.record["notes"][0]["layers"] == list(layers)
    wanted = torch.cat([streams[n] for n in layers], -1)
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "gpt2", "granite"])
def test_final_rows_enter_the_output_layer(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops(), KeepLogitsRows())
    found = check_pass(subject, ExposeFeatures(), before={}, after={}, matched=1, rewritten=1)
    seen: list[torch.Tensor] = []
    head = subject.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        subject.model(input_ids=subject.ids[None], use_cache=False)
    hook.remove()
    rows = [28, 5]
    _, features = outputs(found.program, subject, rows)
    torch.testing.assert_close(features, seen[0][rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["final", "eagle3"])
def test_the_whole_pipeline_keeps_them(kind: str) -> None:
    plain, subject = tiny_program("llama"), tiny_program("llama")
    PassManager(pipeline(PipelineConfig())).run(plain.program)
    PassManager(pipeline(PipelineConfig(features=kind))).run(subject.program)
    assert step_features(plain.program) == {}
    found = step_features(subject.program)["features"]
    hidden = subject.config.hidden_size
    assert found["kind"] == kind and found["width"] == hidden * (3 if kind == "eagle3" else 1)
    tables = [subject.program.weights.specs[found[name]].shape for name in ("embedding", "head")]
    assert tables == [(subject.config.vocab_size, hidden)] * 2


class Small(Toy):
    """One residual addition and no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.sin(x))


def test_the_output_grows_by_what_the_head_reads() -> None:
    check_pass(
        program_of(Small()),
        ExposeFeatures(),
        before={},
        after={},
        matched=1,
        golden="expose-features_final",
    )


def test_a_model_without_layers_has_no_streams() -> None:
    check_pass(
        program_of(Small()),
        ExposeFeatures(),
        before={},
        after={},
        matched=0,
        options={"kind": "eagle3"},
        declined=["0 layers"],
        fewer=True,
    )


def test_the_layers_are_eagles_and_always_three() -> None:
    assert [stream_layers(n) for n in (32, 28, 5)] == [(2, 16, 29), (2, 14, 25), (1, 2, 3)]
    for count in range(2, 100):
        layers = stream_layers(count)
        assert all(a < b for a, b in pairwise(layers))
        assert layers[0] >= 0 and layers[-1] <= count
        if count > 9:
            assert layers == (2, count // 2, count - 3)
