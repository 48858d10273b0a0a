"""Round to nearest as a pass: what it rewrites, what it leaves, what it reports."""

from __future__ import annotations

import pytest
import torch
from helpers.quantized import logits, module, program_of, random_ids, traced, weights_of

from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import QuantizeRtn, QuantSpec, RtnOptions
from smelt.passes.quantize.formats import fake_quantize
from smelt.passes.quantize.spec import Scheme
from smelt.runtime.errors import SmeltError

smelt = torch.ops.smelt


def quantize(program: Program, spec: QuantSpec) -> PassResult:
    result = QuantizeRtn().run(program, RtnOptions(spec))
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return result


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_every_linear_but_the_head(form: str) -> None:
    program, source = traced("Llama")
    expected = QuantizeRtn().expect(program)
    result = quantize(program, QuantSpec("rtn", form, 32))
    target = smelt.linear_int4.default if form == "int4" else smelt.linear_int8.default
    assert len(program.calls(target)) == 8  # per layer: qkv, o, gate_up, down
    assert len(program.calls(torch.ops.aten.linear.default)) == 1
    assert result.matched == expected == 15  # 7 modules a layer and the head
    assert result.rewritten == 14
    assert result.declined == [("lm_head", "lm_head")]
    weights = weights_of(program, source)
    assert {w.dtype for n, w in weights.items() if n.endswith(".qweight")} == {
        torch.uint8 if form == "int4" else torch.int8
    }


def test_result_is_the_same_as_rounding_the_weights_by_hand() -> None:
    model = module("Llama", num_key_value_heads=2)
    program, source = program_of(model), ModuleSource(model)
    ids = random_ids(2, 20)
    quantize(program, QuantSpec("rtn", "int4", 32))
    found = logits(program, source, ids)
    with torch.no_grad():
        for name, linear in model.named_modules():
            if isinstance(linear, torch.nn.Linear) and name != "lm_head":
                linear.weight.copy_(fake_quantize(linear.weight, Scheme("int4", 32)))
        for row, sequence in zip(found, ids, strict=True):
            expected = model(torch.tensor([sequence])).logits[0]
            assert torch.allclose(row, expected, atol=1e-3)


def test_a_second_run_changes_nothing() -> None:
    program, _ = traced("Llama", num_hidden_layers=1)
    quantize(program, QuantSpec("rtn"))
    again = quantize(program, QuantSpec("rtn"))
    assert again.rewritten == 0


def test_rows_that_no_group_divides_are_one_group_and_said_so() -> None:
    program, source = traced("Llama", num_hidden_layers=1, intermediate_size=172)
    result = quantize(program, QuantSpec("rtn", "int4", 64))
    notes = {note["layer"]: note for note in result.notes if "layer" in note}
    down = notes["model.layers.0.mlp.down_proj"]
    assert down["group_size"] == 0
    assert down["reason"] == "K = 172 is not divisible by 64: one group a row"
    assert notes["model.layers.0.self_attn.o_proj"]["group_size"] == 64
    weights = weights_of(program, source)
    assert weights["model.layers.0.mlp.down_proj.weight.scales"].shape == (64, 1)


def test_odd_k_packs() -> None:
    program, source = traced("Llama", num_hidden_layers=1, intermediate_size=97)
    quantize(program, QuantSpec("rtn", "int4", 32))
    assert torch.isfinite(logits(program, source, random_ids(1, 9))[0]).all()


def test_small_layers_stay() -> None:
    program, _ = traced("Llama", num_hidden_layers=1)
    result = quantize(program, QuantSpec("rtn", "int4", 32, min_features=80))
    reasons = {note["layer"]: note.get("reason") for note in result.notes if "layer" in note}
    assert reasons["model.layers.0.self_attn.o_proj"] == "too small (64 x 64)"


def test_summary_line_counts_parameters_once() -> None:
    model = module("Llama", tie_word_embeddings=True)
    program = program_of(model)
    result = quantize(program, QuantSpec("rtn", "int4", 32))
    summary = result.notes[-1]
    total = sum(p.numel() for p in model.parameters())
    left = model.lm_head.weight.numel() + sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert summary["parameters"] == total
    assert summary["parameters_quantized"] == total - left
    share = 100 * (total - left) / total
    assert summary["summary"] == (
        f"quantized {share:.1f} % of the parameters; "
        "left at 16 bit: embeddings, lm_head (tied), norms and biases"
    )


def test_nan_in_a_weight_names_the_layer_when_it_is_made() -> None:
    model = module("Llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 4] = float("nan")
    program = program_of(model)
    quantize(program, QuantSpec("rtn", "int4", 32))
    with pytest.raises(SmeltError, match=r"model\.layers\.0\.mlp\.down_proj: 1 of its"):
        weights_of(program, ModuleSource(model))


def test_biases_stay_with_their_linear() -> None:
    model = module("Qwen2", num_hidden_layers=1)
    program, source = program_of(model), ModuleSource(model)
    reference = logits(program, source, random_ids(1, 12))[0]
    quantize(program, QuantSpec("rtn", "int8"))
    found = logits(program, source, random_ids(1, 12))[0]
    assert (found - reference).abs().max() < 0.1 * reference.abs().max()
    with_bias = [
        node for node in program.calls(smelt.linear_int8.default) if node.args[3] is not None
    ]
    assert len(with_bias) == 1
