"""keep-quantized over the programs of real layouts: the integers stay, and so do the logits."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import foreign
from helpers.check_pass import check_pass
from helpers.quantized import module
from helpers.tiny import Subject, clone_program
from safetensors.torch import load_file, save_file

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.stored import read_stored
from smelt.compiler.trace import export, program_from_export
from smelt.compiler.weights import bind, checkpoint_specs
from smelt.models.checkpoint import Checkpoint
from smelt.passes.program import Program
from smelt.passes.quantize import KeepQuantized, PrequantizedOptions, QuantSpec
from smelt.passes.rewrite import shape
from smelt.runtime.errors import SmeltError

IDS = torch.arange(3, 27) * 5 % 128
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"smelt.linear_int4": 8}
INT8 = {"smelt.linear_int8": 8}
PLAIN = {"aten.linear": 9}


@functools.cache
def traced() -> tuple[Any, Program]:
    model = module("Llama")
    return model, program_from_export(export(model), model, model.config)


def bound(folder: Path, model: Any = None) -> Subject:
    """The program of a quantized folder just before its quantization stage."""
    if model is None:
        model, plain = traced()
    else:
        plain = program_from_export(export(model), model, model.config)
    checkpoint = Checkpoint(folder)
    stored = checkpoint_specs(checkpoint)
    quantized = read_stored(folder, checkpoint, QuantSpec())
    assert quantized is not None
    program = clone_program(plain)
    bind(program.weights, stored, model, "here", quantized)
    stages = pipeline(PipelineConfig())
    names = [stage.pass_.name for stage in stages]
    PassManager(stages[: names.index("keep-logits-rows")]).run(program)
    return Subject(program, checkpoint, IDS)


def expected(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0]


def kept(folder: Path, reference: torch.nn.Module, **after: int) -> list[dict[str, Any]]:
    """Run the pass on a folder; the logits must be the reference's. Returns the verdicts."""
    subject = bound(folder)
    counts = {"smelt.linear_int4": 0, "smelt.linear_int8": 0, "aten.linear": 1, **after}
    checked = check_pass(
        subject,
        KeepQuantized(),
        before={"aten.linear": 9, "smelt.linear_int4": 0},
        after=counts,
        options={"source": subject.source},
        declined=[""] * counts["aten.linear"],
    )
    torch.testing.assert_close(checked.logits, expected(reference), atol=1e-4, rtol=1e-4)
    return [note for note in checked.record["notes"] if "layer" in note]


def weights_of(subject: Subject) -> dict[str, torch.Tensor]:
    names = subject.program.used_weights()
    return dict(subject.program.weights.materialize(names, subject.source))


def test_awq(tmp_path: Path) -> None:
    first = kept(tmp_path, foreign.awq(tmp_path), **INT4)[0]
    assert first["layer"] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert (first["method"], first["format"], first["group_size"]) == ("awq", "int4", 32)
    assert first["scale_change"] == 0 and "reason" not in first


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq(tmp_path: Path, v2: bool, symmetric: bool) -> None:
    kept(tmp_path, foreign.gptq(tmp_path, v2=v2, symmetric=symmetric), **INT4)


def test_gptq_features_out_of_order_are_selected_in_the_graph(tmp_path: Path) -> None:
    after = {**INT4, "aten.index_select": 8}
    kept(tmp_path, foreign.gptq(tmp_path, order="features"), **after)


def test_gptq_whole_groups_out_of_order_cost_nothing(tmp_path: Path) -> None:
    after = {**INT4, "aten.index_select": 0}
    kept(tmp_path, foreign.gptq(tmp_path, order="groups"), **after)


def test_gptq_of_whole_rows(tmp_path: Path) -> None:
    first = kept(tmp_path, foreign.gptq(tmp_path, group=-1), **INT4)[0]
    assert first["group_size"] == 0


def test_gptq_groups_of_different_sizes_are_dequantized(tmp_path: Path) -> None:
    # 96 features of the down projection in groups of 64.
    after = {"smelt.linear_int4": 6, "aten.linear": 3}
    found = kept(tmp_path, foreign.gptq(tmp_path, group=64), **after)
    reasons = {v["layer"]: v.get("reason") for v in found}
    assert reasons["model.layers.0.mlp.down_proj"] == (
        "its groups have different sizes: dequantized to float32"
    )


def test_gptq_with_8_bits(tmp_path: Path) -> None:
    kept(tmp_path, foreign.gptq(tmp_path, bits=8, symmetric=True), **INT8)


def test_gptq_with_8_bits_and_zero_points_is_dequantized(tmp_path: Path) -> None:
    first = kept(tmp_path, foreign.gptq(tmp_path, bits=8), **PLAIN)[0]
    assert first["reason"] == "no operator yet for 8 bits with zero points: dequantized to float32"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors_w4a16(tmp_path: Path, strategy: str, symmetric: bool) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        weights["group_size"] = 32
    kept(tmp_path, foreign.compressed(tmp_path, weights=weights), **INT4)


def test_compressed_tensors_packed_8_bits(tmp_path: Path) -> None:
    weights = {**CHANNEL, "strategy": "group", "group_size": 32}
    kept(tmp_path, foreign.compressed(tmp_path, weights=weights), **INT8)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors_w8a8_keeps_its_weights(tmp_path: Path, strategy: str) -> None:
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    weights = {**CHANNEL, "strategy": strategy}
    reference = foreign.compressed(tmp_path, weights=weights, activations=inputs)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    first = kept(tmp_path, reference, **INT8)[0]
    assert first["reason"] == (
        "its activations (int8, dynamic per token) stay as they are: no operator yet"
    )


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_compressed_tensors_fp8_is_dequantized(tmp_path: Path, strategy: str) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [16, 32]
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    reference = foreign.compressed(tmp_path, weights=weights, activations=inputs)
    first = kept(tmp_path, reference, **PLAIN)[0]
    assert first["reason"].startswith("no operator yet for float8 weights (activations float8")


def test_compressed_tensors_out_of_order(tmp_path: Path) -> None:
    after = {**INT4, "aten.index_select": 8}
    kept(tmp_path, foreign.compressed_out_of_order(tmp_path), **after)


@pytest.mark.parametrize("sizes", [(16, 32), (128, 128), None])
def test_fp8_is_dequantized(tmp_path: Path, sizes: tuple[int, int] | None) -> None:
    first = kept(tmp_path, foreign.fp8(tmp_path, sizes), **PLAIN)[0]
    assert first["reason"] == (
        "no operator yet for float8 weights (activations float8, dynamic): dequantized to float32"
    )


def test_integers_and_zero_points_are_kept_and_only_the_scale_is_rounded(tmp_path: Path) -> None:
    packed: dict[str, foreign.Integers] = {}
    foreign.awq(tmp_path, scale=torch.float16, made=packed)
    subject = bound(tmp_path)
    result = KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    weights = weights_of(subject)
    layer = "model.layers.1.mlp.down_proj"
    mine = packed[layer]
    both = weights[f"{layer}.weight.qweight"]
    q = torch.stack((both & 15, both >> 4), -1).flatten(1).numpy()
    assert np.array_equal(q, mine.q)
    assert np.array_equal(weights[f"{layer}.weight.zeros"].numpy(), mine.zeros)
    assert torch.equal(weights[f"{layer}.weight.scales"], mine.scales.bfloat16())
    verdict = next(note for note in result.notes if note.get("layer") == layer)
    wide = mine.scales.double()
    assert verdict["scale_change"] == pytest.approx(
        float(((wide.bfloat16() - wide) / wide).abs().max())
    )
    assert 0 < verdict["scale_change"] <= 2**-8
    assert verdict["reason"].startswith("scales rounded to bfloat16, by at most 0.")


def test_a_module_left_alone_stays_and_its_siblings_do_not_join_it(tmp_path: Path) -> None:
    reference = foreign.awq(tmp_path, only=lambda name: not name.endswith("k_proj"))
    subject = bound(tmp_path)
    fused = next(r for r in subject.program.records if r["name"] == "fuse-linears")
    assert "different quantized forms" in fused["declined"][0]["reason"]
    result = KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    left = [shape(n.args[1]) for n in subject.program.calls(torch.ops.aten.linear.default)]
    assert left == [(32, 64), (32, 64), (128, 64)]
    reasons = {note["layer"]: note.get("reason") for note in result.notes if "layer" in note}
    assert reasons["model.layers.0.self_attn.k_proj"] == "the checkpoint holds it at 16 bit"
    values = {"input_ids": IDS, "position_ids": torch.arange(len(IDS))}
    found = subject.program.run(values, weights_of(subject))[0]
    torch.testing.assert_close(found, expected(reference), atol=1e-4, rtol=1e-4)


def test_experts_of_a_quantized_mixture_are_dequantized(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = module("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    model.save_pretrained(plain)
    state = load_file(plain / "model.safetensors")
    stored = dict(state)
    experts = [name for name in state if ".experts." in name]
    assert len(experts) == 2 * 4 * 3  # the checkpoint holds them one by one
    for name in experts:
        made = foreign.integers(stored.pop(name), group=32)
        path = name.removesuffix(".weight")
        stored |= {f"{path}.{leaf}": t for leaf, t in foreign.awq_tensors(made).items()}
        state[name] = made.weight()
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(stored, packed / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (packed / "config.json").write_text(json.dumps(config))
    subject = bound(packed, model)
    result = KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    reason = "dequantized: the integers of a checkpoint's experts are not kept"
    notes = {note["layer"]: note for note in result.notes if "layer" in note}
    for layer in range(2):
        note = notes[f"model.layers.{layer}.mlp.experts"]
        assert (note["format"], note["reason"]) == ("16 bit", reason)
    assert f"experts ({reason})" in result.notes[-1]["summary"]
    found = subject.program.run(
        {"input_ids": IDS, "position_ids": torch.arange(len(IDS))}, weights_of(subject)
    )[0]
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    torch.testing.assert_close(found, expected(reference), atol=1e-4, rtol=1e-4)


def test_a_scale_that_is_not_finite_stops_with_the_layer(tmp_path: Path) -> None:
    def broken(name: str, tensors: dict[str, torch.Tensor]) -> None:
        if name.endswith("layers.1.self_attn.o_proj"):
            tensors["scales"][0, 3] = float("nan")

    foreign.awq(tmp_path, change=broken)
    subject = bound(tmp_path)
    KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    with pytest.raises(SmeltError, match=r"model.layers.1.self_attn.o_proj: 1 of its"):
        weights_of(subject)
