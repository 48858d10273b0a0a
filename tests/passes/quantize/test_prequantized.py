"""keep-quantized over the programs of real layouts: the integers stay, and so do the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import foreign
from helpers.check_pass import check_pass
from helpers.kept import IDS, bound, expected, weights_of
from safetensors.torch import load_file, save_file

from smelt.passes.quantize import KeepQuantized, PrequantizedOptions
from smelt.passes.rewrite import shape
from smelt.runtime.errors import SmeltError

# Sums in another order move values to a neighbour when a layer's input is rounded.
ROUNDING = 2e-3
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"smelt.linear_int4": 8}
INT8 = {"smelt.linear_int8": 8}
W8A8 = {"smelt.linear_w8a8": 8}
FP8 = {"smelt.linear_fp8": 8}
PLAIN = {"aten.linear": 9}
FUSED = "model.layers.0.self_attn.q_proj+k_proj+v_proj"


def kept(
    folder: Path, reference: torch.nn.Module, atol: float = 1e-4, **after: int
) -> list[dict[str, Any]]:
    """Run the pass on a folder; the logits must be the reference's. Returns the verdicts."""
    subject = bound(folder)
    names = (*INT4, *INT8, *W8A8, *FP8)
    counts = dict.fromkeys(names, 0) | {"aten.linear": 1, **after}
    linears = sum(counts[name] for name in (*names, "aten.linear"))
    checked = check_pass(
        subject,
        KeepQuantized(),
        before={"aten.linear": linears, "smelt.linear_int4": 0},
        after=counts,
        options={"source": subject.source},
        declined=[""] * counts["aten.linear"],
    )
    torch.testing.assert_close(checked.logits, expected(reference), atol=atol, rtol=1e-4)
    return [note for note in checked.record["notes"] if "layer" in note]


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


def scheme(kind: str, dynamic: bool = True, per: str = "token", **more: Any) -> dict[str, Any]:
    """Quantization arguments of a layer's input."""
    return {"num_bits": 8, "type": kind, "dynamic": dynamic, "strategy": per, **more}


def scale_of(name: str) -> float:
    """A static input scale, the same for what one module's siblings read."""
    return 0.03 if "self_attn" in name else 0.035


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("static", [False, True])
def test_compressed_tensors_w8a8(tmp_path: Path, strategy: str, static: bool) -> None:
    inputs = scheme("int", not static, "tensor" if static else "token")
    scale = scale_of if static else None
    weights = {**CHANNEL, "strategy": strategy}
    reference = foreign.compressed(
        tmp_path, weights=weights, activations=inputs, exact=False, input_scale=scale
    )
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    rounded = foreign.rounding_inputs(reference, "int8", scale=scale)
    first = kept(tmp_path, rounded, ROUNDING, **W8A8)[0]
    assert (first["layer"], first["format"], first["group_size"]) == (FUSED, "int8", 0)
    assert first["activations"] == ("int8, one scale" if static else "int8, a scale a token")
    assert "reason" not in first and first["scale_change"] == 0


@pytest.mark.parametrize(
    "inputs",
    [
        scheme("int", per="tensor"),
        scheme("int", symmetric=False),
        scheme("float"),
    ],
)
def test_inputs_that_no_operator_rounds_so_stay(tmp_path: Path, inputs: dict[str, Any]) -> None:
    reference = foreign.compressed(tmp_path, weights=CHANNEL, activations=inputs)
    first = kept(tmp_path, reference, **INT8)[0]
    assert first["reason"].startswith(f"its activations ({inputs['type']}8, dynamic per ")
    assert first["reason"].endswith("stay as they are: no operator rounds them so")


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("inputs", ["none", "dynamic", "static"])
def test_compressed_tensors_fp8(tmp_path: Path, strategy: str, inputs: str) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    given, scale = None, scale_of if inputs == "static" else None
    if inputs != "none":
        given = scheme("float", scale is None, "token" if scale is None else "tensor")
    reference = foreign.compressed(
        tmp_path, weights=weights, activations=given, exact=False, input_scale=scale
    )
    if given is not None:
        foreign.rounding_inputs(reference, "float8", scale=scale)
    first = kept(tmp_path, reference, ROUNDING if given else 1e-4, **FP8)[0]
    assert (first["format"], first["group_size"]) == ("fp8", 0) and "reason" not in first
    labels = {"dynamic": "e4m3, a scale a token", "static": "e4m3, one scale", "none": None}
    assert first.get("activations") == labels[inputs]


def test_static_scales_that_differ_keep_siblings_apart(tmp_path: Path) -> None:
    def scale(name: str) -> float:
        return 0.02 if name.endswith("k_proj") else 0.03

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    inputs = scheme("float", False, "tensor")
    reference = foreign.compressed(tmp_path, weights=weights, activations=inputs, input_scale=scale)
    foreign.rounding_inputs(reference, "float8", scale=scale)
    # q, k and v apart, gate and up still together.
    kept(tmp_path, reference, ROUNDING, **{"smelt.linear_fp8": 12})


def test_blocks_that_are_no_squares_are_dequantized(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block"}
    weights["block_structure"] = [16, 32]
    reference = foreign.compressed(tmp_path, weights=weights)
    first = kept(tmp_path, reference, **PLAIN)[0]
    assert first["reason"] == (
        "no operator yet for float8 with scales of 16 x 32 weights: dequantized to float32"
    )


def test_compressed_tensors_out_of_order(tmp_path: Path) -> None:
    after = {**INT4, "aten.index_select": 8}
    kept(tmp_path, foreign.compressed_out_of_order(tmp_path), **after)


@pytest.mark.parametrize(("size", "linears"), [(16, 8), (32, 8), (128, 14)])
def test_fp8_in_blocks(tmp_path: Path, size: int, linears: int) -> None:
    # 128 rows are more than q, k and v have: their blocks cannot be joined. 96 features of the
    # down projection leave the last block of 128 partly empty.
    reference = foreign.rounding_inputs(foreign.fp8(tmp_path, (size, size)), "float8", size)
    first = kept(tmp_path, reference, ROUNDING, **{"smelt.linear_fp8": linears})[0]
    assert first["group_size"] == size and "reason" not in first
    assert first["activations"] == f"e4m3, a scale for {size} features of a token"


@pytest.mark.parametrize("scale", [None, 0.02])
def test_fp8_with_one_scale_a_tensor(tmp_path: Path, scale: float | None) -> None:
    given = None if scale is None else lambda name: scale
    reference = foreign.fp8(tmp_path, None, scale)
    kept(tmp_path, foreign.rounding_inputs(reference, "float8", scale=given), ROUNDING, **FP8)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_bytes_and_scales_are_kept_as_they_are(tmp_path: Path, kind: str) -> None:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor"}
    foreign.compressed(tmp_path, weights=weights, activations=scheme(kind), exact=False)
    subject = bound(tmp_path)
    KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    mine, stored = weights_of(subject), load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_k_v_proj.weight"
    parts = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    bytes_ = torch.cat([stored[f"{p}.weight"].view(torch.uint8) for p in parts])
    assert torch.equal(mine[f"{name}.qweight"].view(torch.uint8), bytes_)
    rows = torch.cat(
        [stored[f"{p}.weight_scale"].expand(len(stored[f"{p}.weight"])) for p in parts]
    )
    assert torch.equal(mine[f"{name}.scales"].flatten(), rows)
    assert len(rows.unique()) == 3  # each of q, k and v has a scale of its own


def test_a_float8_weight_that_is_nan_stops_with_the_layer(tmp_path: Path) -> None:
    foreign.fp8(tmp_path, (32, 32))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, tmp_path / "model.safetensors")
    subject = bound(tmp_path)
    KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    with pytest.raises(SmeltError, match=r"model.layers.1.mlp.up_proj: some of its float8"):
        weights_of(subject)


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


def test_a_scale_that_is_not_finite_stops_with_the_layer(tmp_path: Path) -> None:
    def broken(name: str, tensors: dict[str, torch.Tensor]) -> None:
        if name.endswith("layers.1.self_attn.o_proj"):
            tensors["scales"][0, 3] = float("nan")

    foreign.awq(tmp_path, change=broken)
    subject = bound(tmp_path)
    KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    with pytest.raises(SmeltError, match=r"model.layers.1.self_attn.o_proj: 1 of its"):
        weights_of(subject)
