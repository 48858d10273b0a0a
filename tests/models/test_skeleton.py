"""Modules without storage: shapes and ties as in a real one, buffers real, memory untouched."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import tiny_config
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from smelt.models.config import shrink
from smelt.models.skeleton import build, fake_parameters, meta_parameters
from smelt.runtime.errors import UserError


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_parameters_are_those_of_the_real_model(family: str) -> None:
    config = shrink(tiny_config(family))
    skeleton = build(config, torch.bfloat16, real=False)
    real = build(config, torch.bfloat16, real=True)
    shapes = {n: (p.shape, p.dtype) for n, p in real.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in skeleton.named_parameters()} == shapes
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, dict(real.named_buffers())[name]), name


def test_an_enormous_model_costs_no_memory() -> None:
    config = tiny_config(
        "llama",
        hidden_size=16384,
        intermediate_size=53248,
        num_attention_heads=128,
        num_hidden_layers=2,
    )
    skeleton = build(config, torch.bfloat16, real=False)
    assert sum(p.numel() for p in skeleton.parameters()) > 6e9
    assert not skeleton.training


def test_fake_parameters_keep_ties_and_need_no_gradient() -> None:
    model = build(shrink(tiny_config("gemma2")), torch.float32, real=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_parameters(model, mode)
    assert all(isinstance(p.data, FakeTensor) for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    names = dict(model.named_parameters(remove_duplicate=False))
    assert names["lm_head.weight"] is names["model.embed_tokens.weight"]


def test_parameters_are_real_again_outside() -> None:
    with meta_parameters():
        inside = nn.Linear(2, 2)
        inside.register_buffer("table", torch.ones(2))
    assert inside.weight.device.type == "meta" and inside.table.device.type == "cpu"
    with pytest.raises(RuntimeError, match="stop"), meta_parameters():
        raise RuntimeError("stop")
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_configuration_that_cannot_be_built_is_one_line() -> None:
    config = shrink(tiny_config("llama", hidden_act="nonesuch"))
    with pytest.raises(UserError, match="transformers cannot build the model") as caught:
        build(config, torch.float32, real=False)
    assert "\n" not in str(caught.value)
