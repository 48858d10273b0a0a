"""keep-quantized over mixtures: every expert's integers stay, and so do the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import foreign
from helpers.kept import IDS, bound, expected, weights_of
from helpers.mixtures import EXPERTS, SIZES, expert_path, mixture
from safetensors.torch import load_file, save_file

from smelt.passes.quantize import KeepQuantized, PrequantizedOptions
from smelt.passes.weights import OPERATIONS
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.ops.experts_quantized import dequantize_rows
from smelt.runtime.ops.packing import unpack

smelt = torch.ops.smelt
LAYER = "model.layers.0.mlp.experts"
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT = {**CHANNEL, "type": "float"}
BLOCKS = {**FLOAT, "strategy": "block", "block_structure": [32, 32]}
Writer = Callable[[Path, Any], torch.nn.Module]
# How each is written; what the operator is given, and the block of its scales.
KEPT: dict[str, tuple[Writer, str, int]] = {
    "awq": (lambda f, m: foreign.awq(f, m), "int4", 0),
    "gptq": (lambda f, m: foreign.gptq(f, model=m), "int4", 0),
    "gptq-v2-sym": (lambda f, m: foreign.gptq(f, model=m, v2=True, symmetric=True), "int4", 0),
    "gptq-rows": (lambda f, m: foreign.gptq(f, model=m, group=-1), "int4", 0),
    "gptq-groups": (lambda f, m: foreign.gptq(f, model=m, order="groups"), "int4", 0),
    "gptq-desc-act": (lambda f, m: foreign.gptq(f, model=m, order="features"), "int4", 0),
    "gptq-8": (lambda f, m: foreign.gptq(f, model=m, bits=8, symmetric=True), "int8", 0),
    "w4a16": (lambda f, m: foreign.compressed(f, model=m, weights=PACKED), "int4", 0),
    "w4a16-zeros": (
        lambda f, m: foreign.compressed(f, model=m, weights={**PACKED, "symmetric": False}),
        *("int4", 0),
    ),
    "w8a16": (
        lambda f, m: foreign.compressed(f, model=m, weights={**PACKED, "num_bits": 8}),
        *("int8", 0),
    ),
    "int8": (lambda f, m: foreign.compressed(f, model=m, weights=CHANNEL), "int8", 0),
    "float8": (lambda f, m: foreign.compressed(f, model=m, weights=FLOAT, exact=False), "fp8", 0),
    "float8-blocks": (lambda f, m: foreign.compressed(f, model=m, weights=BLOCKS), "fp8", 32),
}


def kept(folder: Path, model: Any, reference: torch.nn.Module, **options: Any) -> dict[str, Any]:
    """Run the pass; the logits must be the reference's. The verdict about the experts."""
    subject = bound(folder, model)
    result = KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    values = {"input_ids": IDS, "position_ids": torch.arange(len(IDS))}
    found = subject.program.run(values, weights_of(subject))[0]
    torch.testing.assert_close(found, expected(reference), atol=1e-4, rtol=1e-4, **options)
    note = next(note for note in result.notes if note.get("layer") == LAYER)
    done = subject.program.calls(smelt.experts_quantized.default)
    assert bool(done) == (note["format"] != "16 bit")
    assert result.notes[-1]["experts_quantized"] == len(done)
    return {**note, "operator": done[0].args[10:] if done else None}


@pytest.mark.parametrize("name", list(KEPT))
@pytest.mark.parametrize("family", list(SIZES))
def test_formats_that_are_kept(family: str, name: str, tmp_path: Path) -> None:
    write, format_, block = KEPT[name]
    model = mixture(family)
    note = kept(tmp_path, model, write(tmp_path, model))
    assert note["operator"] == (format_, EXPERTS, block)
    assert note["format"] == format_ and note["scale_change"] == 0 and "reason" not in note


def layer_of(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """The stacked weights of the only layer of experts, by matrix and field."""
    subject = bound(folder, model)
    KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    weights = weights_of(subject)
    return {name[len(LAYER) + 1 :]: w for name, w in weights.items() if name.startswith(LAYER)}


def rows(found: dict[str, torch.Tensor], e: int, part: str, field: str) -> torch.Tensor:
    """One field of an expert's gate, up or down."""
    matrix = "down_proj" if part == "down" else "gate_up_proj"
    mine = found[f"{matrix}.{field}"].chunk(EXPERTS)[e]
    return mine if part == "down" else mine.chunk(2)[part == "up"]


@pytest.mark.parametrize("family", list(SIZES))
def test_values_scales_and_zero_points_are_the_stored_ones(family: str, tmp_path: Path) -> None:
    model, made = mixture(family), dict[str, foreign.Integers]()
    foreign.awq(tmp_path, model, made=made)
    found = layer_of(tmp_path, model)
    for e in range(EXPERTS):
        for part in ("gate", "up", "down"):
            stored = made[expert_path(model, 0, e, part)]
            q = unpack(rows(found, e, part, "qweight"), 4, stored.q.shape[1]).numpy()
            assert np.array_equal(q, stored.q)
            assert np.array_equal(rows(found, e, part, "zeros").numpy(), stored.zeros)
            assert torch.equal(rows(found, e, part, "scales"), stored.scales)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_bytes_are_the_stored_ones(kind: str, strategy: str, tmp_path: Path) -> None:
    model = mixture()
    weights = {**CHANNEL, "type": kind, "strategy": strategy}
    inputs = {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token"}
    foreign.compressed(tmp_path, model=model, weights=weights, activations=inputs)
    found, stored = layer_of(tmp_path, model), load_file(tmp_path / "model.safetensors")
    for e in range(EXPERTS):
        for part in ("gate", "up", "down"):
            path = expert_path(model, 0, e, part)
            q = rows(found, e, part, "qweight").view(torch.uint8)
            assert torch.equal(q, stored[f"{path}.weight"].view(torch.uint8))
            scales = rows(found, e, part, "scales").float().flatten()
            assert torch.equal(scales, stored[f"{path}.weight_scale"].flatten().expand(len(q)))


@pytest.mark.parametrize(("size", "block"), [(32, 32), (128, 32), (64, 32), (16, 16)])
def test_blocks_are_cut_where_an_expert_ends_inside_one(
    size: int, block: int, tmp_path: Path
) -> None:
    model = mixture()  # 96 and 64 rows
    reference = foreign.fp8(tmp_path, (size, size), model=model)
    found = layer_of(tmp_path, model)
    for e in range(EXPERTS):
        for part in ("gate", "up", "down"):
            q, scales = (rows(found, e, part, field) for field in ("qweight", "scales"))
            mine = dequantize_rows(q, scales, None, "fp8", q.shape[1], block)
            experts = reference.model.layers[0].mlp.experts
            whole = experts.down_proj if part == "down" else experts.gate_up_proj
            want = whole[e] if part == "down" else whole[e].chunk(2)[part == "up"]
            assert torch.equal(mine, want), (e, part)


def test_blocks_too_small_for_the_kernel_are_dequantized(tmp_path: Path) -> None:
    model = mixture(intermediate_size=72)
    write = {**BLOCKS, "block_structure": [16, 16]}
    reference = foreign.compressed(tmp_path, model=model, weights=write)
    note = kept(tmp_path, model, reference)
    assert note["reason"] == (
        "a block of 16 scales reaches into the next expert: dequantized to float32"
    )


@pytest.mark.parametrize("kind", ["int", "float"])
def test_rounding_of_inputs_is_left_out_and_said(kind: str, tmp_path: Path) -> None:
    model = mixture()
    weights = {**CHANNEL, "type": kind}
    inputs = {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token"}
    foreign.compressed(tmp_path, model=model, weights=weights, activations=inputs)
    subject = bound(tmp_path, model)
    result = KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    note = next(note for note in result.notes if note.get("layer") == LAYER)
    assert note["reason"] == (
        f"its activations ({kind}8, dynamic per token) stay as they are: "
        "the operator of experts rounds none"
    )
    assert note["format"] == ("int8" if kind == "int" else "fp8")
    assert "activations" not in note


def test_scales_that_bfloat16_cannot_hold_are_rounded_and_said(tmp_path: Path) -> None:
    model = mixture()
    foreign.awq(tmp_path, model, scale=torch.float16)
    subject = bound(tmp_path, model)
    result = KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    note = next(note for note in result.notes if note.get("layer") == LAYER)
    assert 0 < note["scale_change"] <= 2**-8
    assert note["reason"].startswith("scales rounded to bfloat16, by at most 0.")


def test_no_more_than_a_linear_is_ever_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture()
    foreign.awq(tmp_path, model)
    subject = bound(tmp_path, model)
    KeepQuantized().run(subject.program, PrequantizedOptions(subject.source))
    plan = subject.program.weights
    names = [name for name in subject.program.used_weights() if name.startswith(LAYER)]
    steps = plan.needed(names)
    assert "dequantize_stored" not in {step.op for step in steps}
    alive, most = 0, 0

    def counted(run: Any, sign: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal alive, most
            alive += sign
            most = max(most, alive)
            return run(*args, **kwargs)

        return call

    monkeypatch.setitem(OPERATIONS, "unpack_awq", counted(OPERATIONS["unpack_awq"], 1))
    monkeypatch.setitem(OPERATIONS, "keep_int4", counted(OPERATIONS["keep_int4"], -1))
    made = dict(plan.materialize(names, subject.source))
    assert len(made) == 6 and (alive, most) == (0, 1)


def test_experts_that_order_their_inputs_differently_are_dequantized(tmp_path: Path) -> None:
    model = mixture()
    note = kept(tmp_path, model, foreign.gptq(tmp_path, model=model, order="experts"))
    first, second = (expert_path(model, 0, e, "gate") for e in (0, 1))
    assert note["reason"] == (
        f"{first} and {second} read their input's features in different orders (desc_act): "
        "dequantized to float32"
    )


def test_groups_of_different_sizes_are_dequantized(tmp_path: Path) -> None:
    model = mixture()
    note = kept(tmp_path, model, foreign.gptq(tmp_path, model=model, group=64))
    path = expert_path(model, 0, 0, "down")
    assert note["reason"] == f"{path}: its groups have different sizes: dequantized to float32"


def test_zero_points_of_8_bits_are_dequantized(tmp_path: Path) -> None:
    model = mixture()
    note = kept(tmp_path, model, foreign.gptq(tmp_path, model=model, bits=8))
    path = expert_path(model, 0, 0, "gate")
    assert note["reason"] == (
        f"{path}: no operator yet for 8 bits with zero points: dequantized to float32"
    )


@pytest.mark.parametrize(("e", "part"), [(0, "gate"), (2, "down")])
def test_an_expert_left_at_16_bits_is_named(e: int, part: str, tmp_path: Path) -> None:
    model = mixture()
    path = expert_path(model, 0, e, part)
    note = kept(tmp_path, model, foreign.awq(tmp_path, model, only=lambda name: name != path))
    assert note["reason"] == f"the checkpoint holds {path} at 16 bit: dequantized to float32"


def test_a_whole_layer_at_16_bits_is_left(tmp_path: Path) -> None:
    model = mixture()
    reference = foreign.awq(tmp_path, model, only=lambda name: ".experts." not in name)
    assert kept(tmp_path, model, reference)["reason"] == "the checkpoint holds them at 16 bit"


def test_gate_and_up_with_groups_of_different_sizes_are_named(tmp_path: Path) -> None:
    model = mixture()
    gate, up = (expert_path(model, 0, 3, part) for part in ("gate", "up"))

    def quantizer(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        x = foreign.integers(w, group=16 if name == up else 32)
        return foreign.gptq_tensors(x), x.weight()

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*": {}}}
    note = kept(tmp_path, model, foreign.write(tmp_path, model, config, quantizer))
    first = expert_path(model, 0, 0, "gate")
    assert gate != first and note["reason"] == (
        f"{first} has groups of 32 features, and {up} of 16: dequantized to float32"
    )


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_an_expert_without_scales_is_named(tmp_path: Path) -> None:
    model = mixture()
    foreign.awq(tmp_path, model)
    path = expert_path(model, 0, 2, "up")
    damage(tmp_path, lambda tensors: tensors.pop(f"{path}.scales"))
    with pytest.raises(UserError, match=rf"{path}\.scales is missing"):
        bound(tmp_path, model)


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    model = mixture()
    foreign.awq(tmp_path, model)
    path = expert_path(model, 0, 2, "up")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(path)]:
            tensors.pop(name)

    damage(tmp_path, drop)
    with pytest.raises(UserError, match=rf"{LAYER}.gate_up_proj do not fit together"):
        bound(tmp_path, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_stops_with_the_expert(value: float, tmp_path: Path) -> None:
    model = mixture()
    foreign.awq(tmp_path, model)
    path = expert_path(model, 0, 1, "down")
    damage(tmp_path, lambda tensors: tensors[f"{path}.scales"].fill_(value))
    with pytest.raises(SmeltError, match=rf"{path}: \d+ of its \d+ scales are NaN or infinite"):
        layer_of(tmp_path, model)
