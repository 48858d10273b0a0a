"""One type describes every scheme; what does not work is refused with what does."""

from __future__ import annotations

import json

import pytest

from smelt.passes.quantize.spec import FORMATS, METHODS, QuantSpec, Scheme
from smelt.runtime.errors import UserError


def test_every_offered_combination_is_accepted_and_survives_json() -> None:
    for method, formats in METHODS.items():
        for form in formats:
            own = (None, 0, -1)
            rows_only = {"smoothquant": own, "mixed": own, "fp8": (None, 0, -1, 128)}
            if form == "fp8":
                rows_only["rtn"] = own
            for group in rows_only.get(method, (None, 0, -1, 32, 64, 128)):
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
        (("magic",), f"{', '.join(METHODS)} exist"),
        (("rtn", "int7"), f"{', '.join(FORMATS)} exist"),
        (("smoothquant", "int4"), "use rtn for int4"),
        (("smoothquant", "int8", 64), "use rtn with int8 for groups"),
        (("fp8", "int8"), "multiplies fp8 weights by fp8 inputs"),
        (("fp8", "fp8", 64), "blocks of 128 x 128"),
        (("rtn", "fp8", 128), "--quant fp8 --group-size 128"),
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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "rtn", "activations": "dynamic"}, "leaves the inputs of layers as they are"),
        ({"method": "none", "activations": "static"}, "smoothquant (int8) and fp8 quantize"),
        ({"method": "fp8", "activations": "token"}, "fp8 has dynamic, static"),
        ({"method": "fp8", "group_size": 128, "activations": "static"}, "--activations dynamic"),
        ({"method": "smoothquant", "alpha": -0.1}, "from 0"),
        ({"method": "smoothquant", "alpha": 1.1}, "to 1"),
        ({"method": "fp8", "alpha": 0.5}, "fp8 has none"),
    ],
)
def test_activations_and_alpha_are_checked(fields: dict, expected: str) -> None:
    with pytest.raises(UserError) as error:
        QuantSpec(**fields)
    assert expected in str(error.value)


def test_methods_choose_their_own_format_and_activations() -> None:
    assert (QuantSpec("smoothquant").format, QuantSpec("fp8").format) == ("int8", "fp8")
    assert (QuantSpec("awq").format, QuantSpec().format) == ("int4", "int4")
    assert QuantSpec("smoothquant").activations == QuantSpec("fp8").activations == "dynamic"
    assert QuantSpec("rtn", "fp8").activations == "none"
    assert QuantSpec("smoothquant", activations="static").scheme("x") == Scheme("int8", 0, "static")
    labels = {
        QuantSpec("smoothquant").label(): "smoothquant-int8",
        QuantSpec("smoothquant", alpha=0.5, activations="static").label(): (
            "smoothquant-int8-a0.5-static"
        ),
        QuantSpec("fp8", group_size=128).label(): "fp8-g128",
        QuantSpec("rtn", "fp8").label(): "rtn-fp8",
    }
    assert all(found == expected for found, expected in labels.items())


def test_mixed_has_a_budget_and_nothing_else_to_choose() -> None:
    spec = QuantSpec("mixed")
    assert (spec.bits, spec.label(), spec.needs_calibration) == (4.5, "mixed-4.5", True)
    assert QuantSpec.from_json(spec.to_json()) == spec
    assert QuantSpec("mixed", bits=3.5).label() == "mixed-3.5"
    for fields, expected in (
        ({"method": "mixed", "format": "int4"}, "leave --format out, or use gptq for int4"),
        ({"method": "mixed", "group_size": 64}, "leave --group-size out"),
        ({"method": "mixed", "bits": 2.0}, "from 2.75 bits a weight"),
        ({"method": "mixed", "bits": 17.0}, "to 16"),
        ({"method": "awq", "bits": 4.5}, "awq takes --format"),
        ({"method": "gptq", "format": "mixed"}, "no weight format 'mixed'"),
    ):
        with pytest.raises(UserError) as error:
            QuantSpec(**fields)  # type: ignore[arg-type]
        assert expected in str(error.value)


def test_text_is_needed_where_activations_are_measured() -> None:
    needy = [
        QuantSpec("awq"),
        QuantSpec("mixed", bits=3.0),
        QuantSpec("smoothquant"),
        QuantSpec("smoothquant", alpha=0.5),
        QuantSpec("smoothquant", alpha=0.0, activations="static"),
        QuantSpec("fp8", activations="static"),
    ]
    assert all(spec.needs_calibration for spec in needy)
    content = [QuantSpec(), QuantSpec("rtn", "fp8"), QuantSpec("fp8"), QuantSpec("fp8", "fp8", 128)]
    content.append(QuantSpec("smoothquant", alpha=0.0))
    assert not any(spec.needs_calibration for spec in content)


def test_a_field_of_a_newer_version_is_refused() -> None:
    with pytest.raises(UserError, match="newer"):
        QuantSpec.from_json({"method": "rtn", "sparsity": "2:4"})


def test_a_group_size_that_does_not_divide_is_one_group_a_row() -> None:
    scheme = Scheme("int4", 64)
    assert (scheme.groups(256), scheme.groups(172), scheme.fits(172)) == (4, 1, False)
    assert Scheme("int8", 0).groups(172) == 1 and Scheme("int8", 0).fits(172)
