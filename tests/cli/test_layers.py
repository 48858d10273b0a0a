"""The table of layers: verdicts and kernels meet by weight, and like layers share a line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from smelt.cli.layers import by_kind, joined, table


def kernel(weight: str, operator: str, **more: str) -> dict[str, str]:
    note = {"where": "somewhere", "operator": operator, "provider": "reference", "weight": weight}
    return {**note, "reason": "because", **more}


def manifest() -> Any:
    verdicts = [
        {"layer": f"model.layers.{i}.mlp.up_proj", "weight": f"layers.{i}.up.weight"}
        | {"method": "awq", "format": "int4", "group_size": 32, "alpha": i / 10}
        | {"error_rtn": 0.2 + i, "error": 0.1 + i}
        for i in range(2)
    ]
    head = {
        "layer": "model.embed_tokens",
        "weight": "embed.weight",
        "method": "none",
        "format": "16 bit",
    }
    head["reason"] = "lm_head (tied)"
    chosen = [kernel(f"layers.{i}.up.weight@1.qweight", "linear_int4") for i in range(2)]
    chosen[0]["weight"] = "layers.0.up.weight.qweight"
    chosen.append({**kernel("embed.weight", "linear", limit="slow"), "where": "lm_head"})
    chosen.append({"where": "x", "operator": "rope", "provider": "inductor", "reason": "fused"})
    passes = [{"name": "quantize-awq", "notes": [*verdicts, head, {"summary": "all"}]}]
    return SimpleNamespace(passes=passes, providers=chosen)


def test_each_linear_has_its_verdict_and_its_kernel() -> None:
    first, second, head = joined(manifest())
    assert first == {
        **{"layer": "model.layers.0.mlp.up_proj", "method": "awq", "format": "int4"},
        **{"group_size": 32, "alpha": 0.0, "error_rtn": 0.2, "error": 0.1},
        **{"operator": "linear_int4", "provider": "reference", "reason": "because"},
    }
    assert second["layer"] == "model.layers.1.mlp.up_proj" and second["error"] == 1.1
    assert (head["layer"], head["note"], head["limit"]) == ("lm_head", "lm_head (tied)", "slow")


def test_without_a_verdict_the_place_is_named() -> None:
    given = manifest()
    given.passes = []
    assert {row["layer"] for row in joined(given)} == {"somewhere", "lm_head"}
    given.providers = [{k: v for k, v in n.items() if k != "weight"} for n in given.providers]
    assert joined(given) == []  # made before kernels named their weights


def test_layers_of_experts_are_told_too() -> None:
    given = manifest()
    where = "model.layers.0.mlp.experts"
    given.providers = [
        {"where": where, "operator": "experts_quantized", "provider": "cpu", "reason": "because"}
    ]
    verdict = {"layer": where, "method": "gptq", "format": "int4", "group_size": 32, "error": 0.1}
    given.passes = [{"name": "quantize-gptq", "notes": [verdict]}]
    (row,) = joined(given)
    assert (row["layer"], row["operator"], row["error"]) == (where, "experts_quantized", 0.1)


def test_like_layers_share_a_line_with_the_largest_error() -> None:
    up, head = by_kind(joined(manifest()))
    assert (up["layers"], up["count"]) == ("model.layers.*.mlp.up_proj", 2)
    assert (up["error_rtn"], up["error"]) == (1.2, 1.1) and "alpha" not in up
    assert (head["layers"], head["count"]) == ("lm_head", 1)


def test_the_table_says_format_error_kernel_and_why() -> None:
    made = table(by_kind(joined(manifest())))
    cells = [list(column.cells) for column in made.columns]
    assert [column.header for column in made.columns] == [
        *("layer", "format", "error", "kernel", "why")
    ]
    assert [row[0] for row in cells] == [
        *("model.layers.*.mlp.up_proj (2)", "int4 g32", "1.2 -> 1.1", "linear_int4, reference", "")
    ]
    assert [row[1] for row in cells][3:] == ["linear, reference", "lm_head (tied); slow"]
