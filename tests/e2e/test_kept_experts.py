"""Mixtures that others quantized: compiled with their integers, and written as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import foreign
from helpers.mixtures import EXPERTS, SIZES, mixture
from helpers.steps import Opened, Stepper
from safetensors.torch import load_file

import smelt
from smelt.cli.layers import joined

IDS = torch.arange(3, 27) * 5 % 128
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
WEIGHTS = {"w4a16": INT4, "w8a16": INT8, "float8": {**INT8, "type": "float"}}
FORMATS = {"w4a16": "int4", "w8a16": "int8", "float8": "fp8"}


def compiled(folder: Path, out: Path, **options: Any) -> Any:
    return smelt.compile(folder, out, dtype="fp32", **{"backend": "eager", **options})


def logits(artifact: Path) -> torch.Tensor:
    return Stepper(Opened(artifact), {}, [IDS]).step({0: len(IDS)})[0]


def expected(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0]


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def same_bytes(first: Path, second: Path) -> None:
    """Both folders hold the same tensors, in value and in dtype."""
    given, back = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert set(back) == set(given)
    for name, value in given.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("kind", list(WEIGHTS))
@pytest.mark.parametrize("family", list(SIZES))
def test_a_mixture_is_kept_and_comes_back(family: str, kind: str, tmp_path: Path) -> None:
    model, exact = mixture(family, layers=2), kind != "float8"
    reference = foreign.compressed(
        tmp_path / "model", model=model, weights=WEIGHTS[kind], exact=exact
    )
    made = compiled(tmp_path / "model", tmp_path / "out")
    want = expected(reference)
    torch.testing.assert_close(logits(tmp_path / "out"), want, atol=1e-4, rtol=1e-4)
    rows = [row for row in joined(made.manifest) if row["operator"] == "experts_quantized"]
    assert [row["layer"] for row in rows] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert {(row["method"], row["format"]) for row in rows} == {
        ("compressed-tensors", FORMATS[kind])
    }

    done = smelt.export(tmp_path / "out", tmp_path / "folder")
    assert (done.quantized, done.notes) == (2 * (4 + 3 * EXPERTS), ())
    same_bytes(tmp_path / "model", tmp_path / "folder")
    torch.testing.assert_close(expected(loaded(tmp_path / "folder")), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_rounded_inputs_stay_with_the_linears_alone(kind: str, tmp_path: Path) -> None:
    """Experts come back as weights only, beside linears that round their inputs."""
    model, weights = mixture(), {**INT8, "type": kind}
    inputs = {**weights, "dynamic": True, "strategy": "token"}
    foreign.compressed(tmp_path / "model", model=model, weights=weights, activations=inputs)
    compiled(tmp_path / "model", tmp_path / "out")
    smelt.export(tmp_path / "out", tmp_path / "folder")
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    dense, experts = raw["config_groups"].values()
    assert dense["format"] == f"{kind}-quantized" and dense["input_activations"] is not None
    assert experts["format"] == {"int": "pack-quantized", "float": "naive-quantized"}[kind]
    assert experts["targets"][0].startswith("re:") and experts["input_activations"] is None
    compiled(tmp_path / "folder", tmp_path / "again")
    found = logits(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "again"), found)
    # Of int8 inputs, compressed-tensors divides by 127.5 and smelt by 127.
    atol = {"int": 5e-2, "float": 5e-3}[kind]
    torch.testing.assert_close(expected(loaded(tmp_path / "folder")), found, atol=atol, rtol=0)


def test_experts_with_zero_points_are_written_dequantized(tmp_path: Path) -> None:
    model = mixture()
    reference = foreign.gptq(tmp_path / "model", model=model, order="features")
    compiled(tmp_path / "model", tmp_path / "out")
    done = smelt.export(tmp_path / "out", tmp_path / "hf", format="hf")
    torch.testing.assert_close(
        expected(loaded(tmp_path / "hf")), expected(reference), atol=1e-4, rtol=1e-4
    )
    assert done.quantized == 0


def test_awq_experts_say_why_they_are_written_dequantized(tmp_path: Path) -> None:
    model = mixture()
    reference = foreign.awq(tmp_path / "model", model)
    compiled(tmp_path / "model", tmp_path / "out")
    done = smelt.export(tmp_path / "out", tmp_path / "folder")
    assert done.quantized == 4 and sorted(done.notes) == [
        f"model.layers.0.mlp.experts.{matrix}: written dequantized; "
        "transformers loads experts without zero points only"
        for matrix in ("down_proj", "gate_up_proj")
    ]
    torch.testing.assert_close(
        expected(loaded(tmp_path / "folder")), expected(reference), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("order", ["features", "groups"])
def test_features_out_of_order_come_back_as_symmetric_experts(order: str, tmp_path: Path) -> None:
    """Down's features are put in order, so that only what gate and up read can be out of it."""
    model = mixture()
    reference = foreign.gptq(tmp_path / "model", model=model, symmetric=True, order=order)
    compiled(tmp_path / "model", tmp_path / "out")
    done = smelt.export(tmp_path / "out", tmp_path / "folder")
    written = {"features": ["down_proj"], "groups": ["gate_up_proj", "down_proj"]}[order]
    noted = {note.split(":")[0].rpartition(".")[2] for note in done.notes}
    assert noted.isdisjoint(written)
    assert done.quantized >= EXPERTS * len(written)
    torch.testing.assert_close(
        expected(loaded(tmp_path / "folder")), expected(reference), atol=1e-3, rtol=1e-3
    )


@pytest.mark.slow  # a compilation
@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_the_compiled_kernels_say_the_same(kind: str, tmp_path: Path) -> None:
    model = mixture("Qwen3Moe")
    reference = foreign.compressed(
        tmp_path / "model", model=model, weights=WEIGHTS[kind], exact=kind != "float8"
    )
    made = compiled(tmp_path / "model", tmp_path / "out", backend="aoti")
    found = {p["provider"] for p in made.manifest.providers if "experts" in p["operator"]}
    assert found == {"cpu"}
    torch.testing.assert_close(logits(tmp_path / "out"), expected(reference), atol=1e-3, rtol=1e-3)
