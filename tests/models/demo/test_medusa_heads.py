"""The demo's Medusa heads: the shipped ones are right often, and the script makes such a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import smelt
from smelt.compiler.api import compile_model
from smelt.models.demo.acceptance import questions
from smelt.models.demo.train_medusa import train
from smelt.runtime.artifact import open_artifact
from smelt.runtime.speculation.medusa import open_medusa

HERE = Path(__file__).resolve().parents[3] / "models" / "demo"
DEMO, HEADS = HERE / "smelt-demo", HERE / "smelt-demo-medusa"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "OUT"
    compile_model(DEMO, out, backend="eager", features="final")
    return out


def test_the_shipped_heads_save_steps(artifact: Path) -> None:
    """Three in five guesses of the first head are right on the answers they were measured on."""
    params = smelt.SamplingParams(temperature=0.0, max_tokens=48)
    with smelt.load(artifact, kv_cache_tokens=1024, draft=f"medusa:{HEADS}", draft_tokens=3) as llm:
        answers = sum(len(llm.chat(chat, params).token_ids) for chat in questions(1)[:12])
        metrics = llm.engine.metrics
    assert metrics.accepted_length > 1.8
    assert metrics.steps < 0.75 * answers + 12


def test_a_run_of_one_step_writes_heads_that_open(artifact: Path, tmp_path: Path) -> None:
    train(DEMO, tmp_path / "heads", count=2, layers=1, steps=1)
    state = load_file(tmp_path / "heads" / "medusa_lm_head.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        **{f"{i}.0.linear.weight": (256, 256) for i in range(2)},
        **{f"{i}.0.linear.bias": (256,) for i in range(2)},
    }
    assert all(value.dtype == torch.bfloat16 for value in state.values())
    drafter = open_medusa(tmp_path / "heads", open_artifact(artifact).program)
    assert drafter.longest == 2
    assert drafter.heads.logits(torch.randn(3, 256)).shape == (2, 3, 1024)
