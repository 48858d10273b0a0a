"""`smelt eval` on the demo model: its needle, and its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from helpers.artifacts import DEMO

import smelt
from smelt.cli.app import main
from smelt.models.demo.evaluate import task_accuracy, transformers_generate_fn
from smelt.models.demo.needle import haystack
from smelt.runtime.needle import _score, prompts


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard output of a good call."""
    with pytest.raises(SystemExit) as left:
        main(["eval", *arguments])
    captured = capsys.readouterr()
    assert left.value.code == 0, captured.err
    return captured.out


def test_the_demo_model_finds_near_needles_and_loses_far_ones(
    fp32: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--needle-lengths", "128,512", "--needle-depths", "0,100")
    found = json.loads(call(capsys, str(fp32), "--needle", "demo", *size, "--json"))["needle"]
    near = {(c["length"], c["depth"]): c["found"] for c in found["cells"]}
    assert near[128, 1.0] == near[512, 1.0] == 1.0
    assert near[512, 0.0] < 1
    assert found["gain"] > 0.5


def test_found_is_what_greedy_decoding_writes(fp32: Path) -> None:
    with smelt.load(fp32) as llm:
        group = [
            prompt
            for seed in range(3)
            for prompt in prompts(haystack(), llm.tokenizer, 256, (0.0, 0.5, 1.0), Random(seed))
        ]
        asked = [list(prompt.tokens[: -prompt.answer]) for prompt in group]
        params = [smelt.SamplingParams(max_tokens=p.answer, ignore_eos=True) for p in group]
        written = [tuple(output.token_ids) for output in llm.generate(asked, params)]
        found = [bool(right) for right, _, _ in _score(group, llm.logits)]
    assert found == [p.tokens[-p.answer :] == w for p, w in zip(group, written, strict=True)]
    assert set(found) == {True, False}


def test_demo_tasks_equal_transformers(fp32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, str(fp32), "--tasks", "demo", "--limit", "2", "--json")
    found = json.loads(out)["tasks"]["demo"]
    expected = task_accuracy(transformers_generate_fn(DEMO), 2)
    assert found["accuracy"] == expected
    assert found["questions"] == 2 * len(expected)
    assert found["mean"] == pytest.approx(sum(expected.values()) / len(expected))
    lines = call(capsys, str(fp32), "--tasks", "demo", "--limit", "1").splitlines()
    assert lines[0] == f"task demo: {len(expected)} held-out questions"
    assert lines[-1].split()[0] == "mean" and len(lines) == len(expected) + 2
