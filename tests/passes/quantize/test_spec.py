"""One type describes every scheme; what does not work is refused with what does."""

from __future__ import annotations

import json

import pytest

from smelt.passes.quantize.spec import METHODS, QuantSpec, Scheme
from smelt.runtime.errors import UserError


def test_every_offered_combination_is_accepted_and_survives_json() -> None:
    for method, formats in METHODS.items():
        for form in formats:
            for group in (None, 0, -1, 32, 64, 128):
                spec = QuantSpec(method, form, group)
                again = QuantSpec.from_json(json.loads(json.dumps(spec.to_json())))
                assert again == spec
                assert spec.group_size is not None and spec.group_size >= 0


def test_default_group_is_the_formats_own() -> None:
    assert QuantSpec("awq").group_size == 128
    assert QuantSpec("rtn", "int8").group_size == 0
    assert QuantSpec("rtn", "int8").label() == "rtn-int8"
    assert QuantSpec("rtn", "int4", 64).label() == "rtn-int4-g64"
    assert QuantSpec().label() == "none"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("gptq", "int2"), "gptq with int3"),
        (("gptq", "int8"), "use rtn with int8"),
        (("smoothquant",), "nearest is rtn with format int8"),
        (("magic",), "none, rtn, awq, gptq exist"),
        (("rtn", "int7"), "int4, int3, int2, int8 exist"),
        (("awq", "int8"), "use rtn with int8"),
        (("rtn", "int4", 100), "the nearest is 96"),
        (("rtn", "int4", 4), "the nearest is 16"),
        (("rtn", "int4", -2), "the nearest is 16"),
        (("rtn", "int4", 32.0), "not a whole number"),
        (("rtn", "int4", 32, ("attention",)), "lm_head, router exist"),
    ],
)
def test_what_does_not_work_names_the_nearest_that_does(arguments: tuple, expected: str) -> None:
    with pytest.raises(UserError) as error:
        QuantSpec(*arguments)
    assert expected in str(error.value)


def test_a_field_of_a_newer_version_is_refused() -> None:
    with pytest.raises(UserError, match="newer"):
        QuantSpec.from_json({"method": "rtn", "sparsity": "2:4"})


def test_compressed_tensors_configuration() -> None:
    config = QuantSpec("awq", "int4", 64).compressed_tensors_config(("lm_head",))
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    assert (weights["num_bits"], weights["symmetric"], weights["strategy"]) == (4, False, "group")
    assert weights["group_size"] == 64
    rows = QuantSpec("rtn", "int8").compressed_tensors_config()
    weights = rows["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["strategy"]) == (8, True, "channel")
    assert weights["group_size"] is None
    assert QuantSpec().compressed_tensors_config() == {}


def test_compressed_tensors_reads_our_configuration() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for spec in (QuantSpec("awq", "int4", 64), QuantSpec("rtn", "int8")):
        parsed = quantization.QuantizationConfig.model_validate(spec.compressed_tensors_config())
        assert parsed.config_groups["group_0"].weights.symmetric is (spec.format == "int8")


def test_a_group_size_that_does_not_divide_is_one_group_a_row() -> None:
    scheme = Scheme("int4", 64)
    assert (scheme.groups(256), scheme.groups(172), scheme.fits(172)) == (4, 1, False)
    assert Scheme("int8", 0).groups(172) == 1 and Scheme("int8", 0).fits(172)
