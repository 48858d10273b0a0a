"""Mixed precision: a table that tells the truth, bits where they count, never beyond the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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

from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import (
    GptqOptions,
    MixedOptions,
    QuantizeGptq,
    QuantizeMixed,
    QuantSpec,
)
from smelt.passes.quantize.calibrate import CalibrationOptions
from smelt.passes.quantize.formats import fake_quantize
from smelt.passes.quantize.groups import find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.passes.quantize.mixed import CANDIDATES
from smelt.passes.quantize.sensitivity import PROBE, measure
from smelt.runtime.errors import UserError

SAMPLES = random_ids(4, 32)
SPEC = QuantSpec("mixed")


def mixed(model: torch.nn.Module, bits: float, samples: Any = SAMPLES) -> tuple[Program, Any]:
    program = program_of(model)
    options = MixedOptions(QuantSpec("mixed", bits=bits), samples, ModuleSource(model))
    result = QuantizeMixed().run(program, options)
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return program, result


def layers(result: PassResult) -> dict[str, dict[str, Any]]:
    return {note["layer"]: note for note in result.notes if "expected_kl" in note}


def packed_bits(program: Program) -> int:
    """Bits of everything the quantized operators read, without their inputs."""
    kinds = (".qweight", ".scales", ".zeros")
    names = [n for n in program.used_weights() if n.partition("@")[0].endswith(kinds)]
    return 8 * sum(program.weights.specs[name].nbytes for name in names)


def test_the_table_is_the_divergence_of_one_group_alone() -> None:
    model = module("Llama")
    program, source = program_of(model), ModuleSource(model)
    groups = find_groups(program, find_linears(program, SPEC))
    options = CalibrationOptions(SPEC, SAMPLES, source, max_rows=10_000)
    table = measure(program, groups, (PROBE, *CANDIDATES), options)
    plain = logits(program, source, SAMPLES)
    for index in (1, 3, 6):
        (linear,) = groups[index].linears
        weights = weights_of(program, source)
        weights[linear.weight] = fake_quantize(weights[linear.weight], PROBE)
        total = 0.0
        for before, sample in zip(plain, SAMPLES, strict=True):
            ids = torch.tensor(sample)
            given = {"input_ids": ids, "position_ids": torch.arange(len(ids))}
            p = before.log_softmax(-1)
            q = program.run(given, weights)[0].log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
        assert table[index].kl == pytest.approx(total / sum(map(len, SAMPLES)), rel=1e-3)
        assert float(table[index].errors[0]) == pytest.approx(1.0)
    for entry in table:
        by_name = dict(zip(CANDIDATES, entry.costs()[1:], strict=True))
        sizes = [c for c in CANDIDATES if c.format == "int4"]
        assert sorted(by_name, key=lambda c: -by_name[c])[0].format == "int2"
        assert by_name[CANDIDATES[-1]] < min(by_name[c] for c in sizes)


@pytest.mark.parametrize("bits", [3.5, 4.5, 6.0])
def test_the_budget_holds_with_scales_and_zero_points(bits: float) -> None:
    program, result = mixed(module("Llama"), bits)
    weights = sum(note["parameters"] for note in layers(result).values())
    assert packed_bits(program) <= bits * weights
    assert result.notes[-1]["bits"] == pytest.approx(packed_bits(program) / weights, abs=1e-3)
    assert f"of {bits:g}" in result.notes[-1]["summary"]


def test_a_layer_that_is_sensitive_gets_more_bits() -> None:
    model: Any = module("Llama")
    with torch.no_grad():  # the residual stream of layer 0's MLP drowns what layer 1's adds
        model.model.layers[0].mlp.down_proj.weight *= 30
        model.model.layers[1].mlp.down_proj.weight *= 0.01
    _, result = mixed(model, 4.0)
    found = layers(result)
    bits = {name: int(note["format"].removeprefix("int")) for name, note in found.items()}
    assert bits["model.layers.0.mlp.down_proj"] > bits["model.layers.1.mlp.down_proj"]


def test_with_room_for_it_layers_stay_at_16_bits() -> None:
    program, result = mixed(module("Llama", num_hidden_layers=1), 16.0)
    assert not [n for n in program.used_weights() if "qweight" in n]
    assert any("by the budget" in reason for _, reason in result.declined)


def test_the_table_is_read_from_the_journal() -> None:
    model = module("Llama", num_hidden_layers=1)
    program, source = program_of(model), ModuleSource(model)
    groups = find_groups(program, find_linears(program, SPEC))
    options = CalibrationOptions(SPEC, SAMPLES, source)
    journal: dict[str, dict[str, Any]] = {}
    first = measure(program, groups, CANDIDATES, options, journal)
    assert len(journal) == len(groups)
    for fields in journal.values():
        fields["kl"] += 1
    again = measure(program, groups, CANDIDATES, options, journal)
    assert [e.kl for e in again] == pytest.approx([e.kl + 1 for e in first])


def test_a_budget_below_what_the_layers_take_is_refused() -> None:
    narrow = module("Llama", hidden_size=16, intermediate_size=16, num_attention_heads=2)
    with pytest.raises(UserError, match=r"take \d\.\d\d bits a weight at the least"):
        mixed(narrow, 2.75)
    with pytest.raises(UserError, match="needs calibration text"):
        QuantizeMixed().run(program_of(module("Llama")), MixedOptions())


def test_it_beats_uniform_int4_on_a_trained_model() -> None:
    folder = data_path("models/stories260K")
    model, text = checkpoint(folder), data_path("texts/tinystories_train.txt")
    samples = text_ids(folder, text, 12, 128)
    scored = text_ids(folder, data_path("texts/tinystories_valid.txt"), 4, 200)
    program, source = program_of(model), ModuleSource(model)
    reference = logits(program, source, scored)
    spec = QuantSpec("gptq", "int4", 128)
    QuantizeGptq().run(program, GptqOptions(spec, samples, source))
    uniform = score(logits(program, source, scored), reference, scored)
    program, _ = mixed(model, 4.5, samples)
    found = score(logits(program, source, scored), reference, scored)
    assert found.kl < 0.95 * uniform.kl
