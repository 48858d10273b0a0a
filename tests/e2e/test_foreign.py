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
from smelt.runtime.errors import UserError

IDS = torch.arange(3, 27) * 5 % 128


def compiled(folder: Path, out: Path, **options: Any) -> Any:
    return smelt.compile(folder, out, backend="eager", dtype="fp32", **options)


def logits(artifact: Path) -> torch.Tensor:
    step = open_artifact(artifact).program
    values = spec_values(step.spec, IDS)
    batch = Batch.named(values, step.spec)
    return step.run(batch, [values[f"kv_cache_{i}"] for i in range(step.spec.layers)])


def check(tmp_path: Path, reference: torch.nn.Module, atol: float = 1e-4, **operators: int) -> Any:
    """Compile tmp_path/model; its logits must be those of `reference`, its operators as counted."""
    made = compiled(tmp_path / "model", tmp_path / "out")
    with torch.no_grad():
        expected = reference(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=atol, rtol=1e-4)
    found = [p["operator"] for p in made.manifest.providers]
    assert {name: found.count(name) for name in operators} == operators
    return made


# q+k+v, o, gate+up and down in each of two layers; the logits' linear stays.
INT4 = {"linear_int4": 8, "linear_int8": 0, "linear": 1}


def test_gptq_in_activation_order(tmp_path: Path) -> None:
    made = check(tmp_path, foreign.gptq(tmp_path / "model", order="features"), **INT4)
    quant = {"method": "gptq", "format": "int4", "group_size": 32}
    quant |= {"from": "checkpoint", "mixed": False, "activations": "none"}
    assert made.manifest.quant == quant


def test_compressed_tensors_as_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    foreign.compressed(tmp_path / "model", weights=weights)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert hasattr(reference.model.layers[0].mlp.up_proj, "weight_packed")
    made = check(tmp_path, reference.eval(), **INT4)
    assert made.manifest.quant["method"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("kind", "dynamic", "operator"),
    [("int", False, "linear_w8a8"), ("float", False, "linear_fp8"), ("float", True, "linear_fp8")],
)
def test_inputs_are_rounded_as_compressed_tensors_does(
    tmp_path: Path, kind: str, dynamic: bool, operator: str
) -> None:
    from transformers import AutoModelForCausalLM

    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}
    inputs = {**weights, "dynamic": dynamic, "strategy": "token" if dynamic else "tensor"}
    foreign.compressed(
        tmp_path / "model",
        weights=weights,
        activations=inputs,
        input_scale=None if dynamic else lambda name: 0.035,
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    # Sums in another order move a value to its neighbour when a layer's input is rounded.
    made = check(tmp_path, reference.eval(), atol=2e-3, **{operator: 8, "linear": 1})
    assert made.manifest.quant["activations"] == ("dynamic" if dynamic else "static")


def test_another_quantization_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    foreign.awq(tmp_path / "model")
    with pytest.raises(UserError, match=r"already quantized \(awq int4 g32\), which cannot become"):
        compiled(tmp_path / "model", tmp_path / "out", quant="rtn", format="int8")
    assert not (tmp_path / "out").exists()
