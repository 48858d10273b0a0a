"""Quantized checkpoints of other projects, compiled as they are and compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import foreign

import smelt
from smelt.compiler.numerics import spec_values
from smelt.runtime.artifact import open_artifact
from smelt.runtime.batch import Batch

IDS = torch.arange(3, 27) * 5 % 128


def compiled(folder: Path, out: Path, **options: Any) -> Any:
    return smelt.compile(folder, out, backend="eager", dtype="fp32", **options)


def logits(artifact: Path) -> torch.Tensor:
    step = open_artifact(artifact).program
    values = spec_values(step.spec, IDS)
    names = ("input_ids", "position_ids", "query_start", "seq_lens")
    groups = range(len(step.spec.groups))
    batch = Batch(
        *(values[name] for name in names),
        [values[f"slot_mapping_{g}"] for g in groups],
        [values[f"block_tables_{g}"] for g in groups],
        values["logits_rows"],
    )
    return step.run(batch, [values[f"kv_cache_{i}"] for i in range(step.spec.layers)])


def check(tmp_path: Path, reference: torch.nn.Module, **operators: int) -> Any:
    """Compile tmp_path/model; its logits must be those of `reference`, its operators as counted."""
    made = compiled(tmp_path / "model", tmp_path / "out")
    with torch.no_grad():
        expected = reference(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)
    found = [p["operator"] for p in made.manifest.providers]
    assert {name: found.count(name) for name in operators} == operators
    return made


def verdicts(made: Any) -> list[dict[str, Any]]:
    record = next(r for r in made.manifest.passes if r["name"] == "keep-quantized")
    return [note for note in record["notes"] if "layer" in note]


# q+k+v, o, gate+up and down in each of two layers; the logits' linear stays.
INT4 = {"linear_int4": 8, "linear_int8": 0, "linear": 1}
INT8 = {"linear_int4": 0, "linear_int8": 8, "linear": 1}
PLAIN = {"linear_int4": 0, "linear_int8": 0, "linear": 9}


def test_awq(tmp_path: Path) -> None:
    made = check(tmp_path, foreign.awq(tmp_path / "model"), **INT4)
    first = verdicts(made)[0]
    assert first["layer"] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert (first["method"], first["format"], first["group_size"]) == ("awq", "int4", 32)
    assert first["scale_change"] == 0 and "reason" not in first
    assert made.manifest.quant["method"] == "awq"


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(tmp_path: Path, v2: bool, symmetric: bool) -> None:
    check(tmp_path, foreign.gptq(tmp_path / "model", v2=v2, symmetric=symmetric), **INT4)


@pytest.mark.parametrize("order", ["features", "groups"])
def test_gptq_with_features_out_of_order(tmp_path: Path, order: str) -> None:
    made = check(tmp_path, foreign.gptq(tmp_path / "model", order=order), **INT4)
    text = str(made.manifest.passes)
    assert "keep-quantized" in text


def test_gptq_of_whole_rows(tmp_path: Path) -> None:
    check(tmp_path, foreign.gptq(tmp_path / "model", group=-1), **INT4)


def test_gptq_with_8_bits(tmp_path: Path) -> None:
    check(tmp_path, foreign.gptq(tmp_path / "model", bits=8, symmetric=True), **INT8)


def test_gptq_with_8_bits_and_zero_points_is_dequantized(tmp_path: Path) -> None:
    made = check(tmp_path, foreign.gptq(tmp_path / "model", bits=8), **PLAIN)
    reasons = [v["reason"] for v in verdicts(made)]
    assert reasons[0] == "no operator yet for 8 bits with zero points: dequantized to float32"
