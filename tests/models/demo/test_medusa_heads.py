"""The demo's Medusa heads: the shipped ones are right often, and the script makes such a folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smelt
from smelt.compiler.api import compile_model
from smelt.models.demo.acceptance import questions
from smelt.models.demo.train_medusa import train
from smelt.runtime.batch import Features
from smelt.runtime.speculation.medusa import open_medusa

HERE = Path(__file__).resolve().parents[3] / "models" / "demo"
DEMO, HEADS = HERE / "smelt-demo", HERE / "smelt-demo-medusa"


@pytest.mark.slow
def test_the_shipped_heads_save_steps(tmp_path: Path) -> None:
    """The model's card names 3.08 tokens a step that had a draft, over more questions."""
    compile_model(DEMO, tmp_path / "OUT", backend="eager", features="final")
    params = smelt.SamplingParams(temperature=0.0, max_tokens=48)
    options = {"draft": f"medusa:{HEADS}", "draft_tokens": 3}
    with smelt.load(tmp_path / "OUT", kv_cache_tokens=1024, **options) as llm:
        answers = sum(len(llm.chat(chat, params).token_ids) for chat in questions(1)[:12])
        metrics = llm.engine.metrics
    assert metrics.accepted_length > 1.8
    assert metrics.steps < 0.75 * answers + 12


def program() -> Any:
    """What opening heads asks of the demo's program."""
    weights = {"embed": load_file(DEMO / "model.safetensors")["model.embed_tokens.weight"]}
    features = Features("final", 256, (), "embed", "embed")
    return SimpleNamespace(
        features=features, weights=weights, vocab_size=1024, device=torch.device("cpu")
    )


def test_the_shipped_heads_open() -> None:
    drafter = open_medusa(HEADS, program())
    assert drafter.longest == 3 and drafter.nodes(3) == 19
    assert drafter.heads.logits(torch.randn(3, 256)).shape == (3, 3, 1024)


def test_a_run_of_one_step_writes_heads_that_open(tmp_path: Path) -> None:
    train(DEMO, tmp_path, count=2, layers=1, steps=1)
    state = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        **{f"{i}.0.linear.weight": (256, 256) for i in range(2)},
        **{f"{i}.0.linear.bias": (256,) for i in range(2)},
    }
    assert all(value.dtype == torch.bfloat16 for value in state.values())
    assert open_medusa(tmp_path, program()).longest == 2
