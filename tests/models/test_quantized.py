"""What a quantization_config says is read, or refused with what is wrong in it."""

from __future__ import annotations

from typing import Any

import pytest

from smelt.models.quantized import Inputs, Quantization, WeightForm, describe
from smelt.runtime.errors import UserError


def read(**config: Any) -> Quantization:
    found = describe({"quantization_config": config}, "here")
    assert found is not None
    return found


def compressed(group: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
    groups = {"group_0": group or {"targets": ["Linear"], "weights": weights}}
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**base, "config_groups": groups, **config}


def test_an_ordinary_model_has_none() -> None:
    assert describe({"model_type": "llama"}, "here") is None
    assert describe({"quantization_config": None}, "here") is None


def test_awq_and_its_older_names() -> None:
    new = read(quant_method="awq", bits=4, group_size=64, version="gemm", zero_point=True)
    old = read(quant_method="awq", w_bit=4, q_group_size=64, version="GEMM")
    assert new == old and new.form("model.layers.0.mlp.up_proj") == WeightForm("awq", 4, group=64)


def test_gptq_versions_differ_by_the_offset_of_zero_points() -> None:
    forms = [
        read(quant_method="gptq", bits=4, group_size=-1, checkpoint_format=v).form("x")
        for v in ("gptq", "gptq_v2")
    ]
    assert [(f.zero_offset, f.group) for f in forms if f] == [(1, 0), (0, 0)]


def test_modules_left_alone() -> None:
    found = read(quant_method="awq", modules_to_not_convert=["lm_head", "layers.0.mlp"])
    assert found.form("lm_head") is None and found.form("model.layers.0.mlp.up_proj") is None
    assert found.form("model.layers.10.mlp.up_proj") is not None
    found = read(**compressed(ignore=["re:.*gate$", "lm_head"]))
    assert found.form("model.layers.1.mlp.gate") is None
    assert found.form("model.layers.1.mlp.gate_proj") is not None


def test_groups_of_compressed_tensors_by_name_before_class() -> None:
    eight = {"num_bits": 8, "type": "int", "strategy": "channel"}
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": four},
        "group_1": {"targets": ["re:.*down_proj"], "weights": eight},
    }
    found = read(**compressed(config_groups=groups))
    down, up = found.form("model.layers.0.mlp.down_proj"), found.form("model.layers.0.mlp.up_proj")
    assert down and up and (down.bits, down.group, up.bits, up.group) == (8, 0, 4, 32)
    assert found.to_json()["mixed"] and not found.is_what("compressed-tensors", "int4", 32, "none")


def test_what_is_asked_may_be_what_it_is() -> None:
    found = read(quant_method="awq", bits=4, group_size=64)
    assert found.is_what("awq", "int4", 64, "none")
    assert not found.is_what("awq", "int4", 128, "none")
    assert not found.is_what("rtn", "int4", 64, "none")
    found = read(quant_method="fp8", weight_block_size=[128, 128])
    assert found.is_what("fp8", "fp8", 128, "dynamic")
    assert not found.is_what("fp8", "fp8", 128, "static")
    assert not found.is_what("fp8", "fp8", 0, "dynamic")


def test_how_inputs_are_rounded() -> None:
    def inputs(**given: Any) -> Inputs | None:
        form = read(**given).form("model.layers.0.mlp.up_proj")
        assert form is not None
        return form.inputs

    block = [128, 128]
    assert inputs(quant_method="awq", bits=4) is None
    by_group = inputs(quant_method="fp8", weight_block_size=block)
    assert by_group == Inputs("float", 8, True, "group", 128)
    assert inputs(quant_method="fp8") == Inputs("float", 8, True, "token")
    static = inputs(quant_method="fp8", activation_scheme="static")
    assert static == Inputs("float", 8, False, "tensor")
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    group["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
    given = compressed(group, format="int-quantized")
    assert inputs(**given) == Inputs("int", 8, True, "token")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes"}, "quantized with bitsandbytes; smelt reads awq, gptq"),
    ({"quant_method": "awq", "version": "gemv"}, "AWQ layout gemv; smelt reads gemm"),
    ({"quant_method": "awq", "bits": 3}, "3 bits; smelt reads 4 bits here"),
    ({"quant_method": "awq", "zero_point": False}, "AWQ without zero points"),
    ({"quant_method": "gptq", "bits": 2}, "2 bits; smelt reads 4 and 8 bits here"),
    ({"quant_method": "gptq", "bits": "four"}, "bits is 'four', expected a whole number"),
    ({"quant_method": "gptq", "group_size": -3}, "group_size is -3"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ layout marlin"),
    ({"quant_method": "awq", "modules_to_not_convert": "lm_head"}, "expected a list of module"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "float8 e5m2; smelt reads e4m3"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight block \\[128\\], expected two"),
    (compressed(config_groups={}), "no config_groups, so no weight has a scheme"),
    (compressed(format="marlin-24"), "format marlin-24; smelt reads pack-quantized"),
    (compressed(ignore=["re:("]), "re:\\( is not a pattern"),
    (compressed(quantization_status="frozen"), "not stored compressed"),
    (compressed(transform_config={"config_groups": {}}), "transform_config is not supported yet"),
    (compressed({"targets": ["Linear"], "weights": {"num_bits": 3}}), "3 bits; smelt reads 4 and"),
    (compressed({"targets": ["Linear"], "weights": 4}), "config_groups.group_0.weights is no JSON"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_is_not_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"here.*{message}"):
        describe({"quantization_config": config}, "here")
    with pytest.raises(UserError, match="no JSON object"):
        describe({"quantization_config": "awq"}, "here")
