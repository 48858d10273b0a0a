"""fp8 as a pass, and e4m3 as a format of plain rounding."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.data import data_path
from helpers.quantized import (
    checkpoint,
    logits,
    module,
    program_of,
    random_ids,
    score,
    text_ids,
    weights_of,
)
from helpers.tiny import Toy
from helpers.tiny import program_of as toy_program
from torch import nn

from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import Fp8Options, QuantizeFp8, QuantizeRtn, QuantSpec
from smelt.passes.quantize.fp8 import quantize_fp8
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.ops.linear_fp8 import dequantize_fp8

smelt = torch.ops.smelt
SPECS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"activations": "static"},
    "blocks": {"group_size": 128},
}
SAMPLES = random_ids(8, 32)


def fp8(
    model: torch.nn.Module, samples: list[list[int]] = SAMPLES, **spec: Any
) -> tuple[Program, PassResult]:
    program = program_of(model)
    options = Fp8Options(QuantSpec("fp8", **spec), samples, ModuleSource(model))
    result = QuantizeFp8().run(program, options)
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return program, result


@lru_cache
def plain() -> torch.nn.Module:
    return module("Llama", num_hidden_layers=1)


class Layer(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("name", list(SPECS))
def test_what_becomes_of_a_layer(name: str) -> None:
    subject = toy_program(Layer())
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 37, (4, 24), generator=generator).tolist()
    spec = QuantSpec("fp8", **SPECS[name])
    found = check_pass(
        subject,
        QuantizeFp8(),
        before={"aten.linear": 3},
        after={"aten.linear": 1, "smelt.linear_fp8": 2},
        matched=3,
        rewritten=2,
        declined=["lm_head"],
        options={"spec": spec, "samples": samples, "source": subject.source},
        golden=f"quantize-fp8_{name}",
    )
    notes = [n for n in found.record["notes"] if n.get("method") == "fp8"]
    weights = {subject.program.weights.specs[n["weight"]].shape for n in notes}
    assert len(notes) == 2 and all(len(shape) == 2 for shape in weights)
    assert all(("error" in n) == (name == "static") for n in notes)


def test_rounding_to_fp8_leaves_inputs_alone() -> None:
    found = check_pass(
        Layer(),
        QuantizeRtn(),
        before={"aten.linear": 3},
        after={"aten.linear": 1, "smelt.linear_fp8": 2},
        matched=3,
        options={"spec": QuantSpec("rtn", "fp8")},
        declined=["lm_head"],
        golden="quantize-rtn_fp8",
    )
    nodes = found.program.calls(smelt.linear_fp8.default)
    assert {node.args[5] for node in nodes} == {"none"}
    assert all("activations" not in n for n in found.record["notes"])


@pytest.mark.parametrize("name", list(SPECS))
def test_logits_stay_close(name: str) -> None:
    model = plain()
    ids, source = random_ids(4, 32, seed=9), ModuleSource(model)
    reference = logits(program_of(model), source, ids)
    program, result = fp8(model, **SPECS[name])
    assert result.matched == 8 and result.rewritten == 7
    assert score(logits(program, source, ids), reference, ids).kl < 2e-3
    weights = weights_of(program, source)
    assert {w.dtype for n, w in weights.items() if n.endswith(".qweight")} == {torch.float8_e4m3fn}


def test_values_too_large_for_e4m3_are_scaled_and_not_lost() -> None:
    model: Any = deepcopy(plain())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e4
    weights = weights_of(fp8(plain())[0], ModuleSource(model))
    q = weights["model.layers.0.mlp.down_proj.weight.qweight"]
    assert torch.isfinite(q.float()).all() and float(q.float().abs().max()) == 448


def test_static_activations_need_text_and_dynamic_ones_do_not() -> None:
    model = plain()
    assert not QuantSpec("fp8").needs_calibration
    QuantizeFp8().run(program_of(model), Fp8Options())
    static = QuantSpec("fp8", activations="static")
    assert static.needs_calibration
    with pytest.raises(UserError, match="static activations need calibration text"):
        QuantizeFp8().run(program_of(model), Fp8Options(static))


def test_nan_in_a_weight_names_the_layer() -> None:
    model: Any = deepcopy(plain())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 4] = float("nan")
    program, _ = fp8(plain())
    with pytest.raises(SmeltError, match=r"model\.layers\.0\.mlp\.down_proj: 1 of its"):
        weights_of(program, ModuleSource(model))


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (64, 96), (256, 130)])
def test_a_blocks_scale_is_its_largest_weight_over_448(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    q, scales = quantize_fp8(weight, 128)
    assert q.shape == shape and scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert float(scales[i, j]) == pytest.approx(float(part.abs().max()) / 448)
    error = (dequantize_fp8(q, scales, 128) - weight).abs()
    assert (error <= weight.abs() / 16 + scales.max() * 2**-10 + 1e-7).all(), "half a step of 2^-3"


def test_rows_have_scales_of_their_own() -> None:
    weight = torch.randn(4, 32) * torch.tensor([1.0, 1e-4, 1e4, 0.0])[:, None]
    q, scales = quantize_fp8(weight, 0)
    assert scales.shape == (4, 1) and float(scales[3]) == 1
    assert q.float().abs().amax(1).tolist() == [448, 448, 448, 0]


@pytest.mark.parametrize("name", list(SPECS))
def test_a_trained_checkpoint_stays_within_two_percent(name: str) -> None:
    folder = data_path("models/babyllama361")
    samples = text_ids(folder, data_path("texts/tinystories_train.txt"), 8, 128)
    ids = text_ids(folder, data_path("texts/tinystories_valid.txt"), 12, 256)
    model = checkpoint(folder)
    source = ModuleSource(model)
    reference = logits(program_of(model), source, ids)
    original = score(reference, reference, ids)
    program, _ = fp8(model, samples, **SPECS[name])
    found = score(logits(program, source, ids), reference, ids)
    assert found.perplexity < 1.02 * original.perplexity
