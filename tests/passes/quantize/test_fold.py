"""Folding a scale into its producer changes nothing but the weights."""

from __future__ import annotations

import pytest
import torch
from helpers.quantized import logits, random_ids, traced

from smelt.passes.quantize.awq_search import Scale
from smelt.passes.quantize.fold import fold
from smelt.passes.quantize.groups import find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.passes.quantize.spec import QuantSpec

ARCHITECTURES = {
    "Llama": 8,
    "Gemma2": 8,
    "Qwen2": 8,
    "Phi3": 8,
    "GPT2": 6,
    "GPTNeoX": 6,
    "Cohere2": 6,
    "StableLm": 8,
    "OPT": 8,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_alone_leave_the_logits(name: str) -> None:
    program, source = traced(name)
    ids = random_ids(2, 19)
    before = logits(program, source, ids)
    linears = find_linears(program, QuantSpec("rtn", "int4", 32))
    groups = find_groups(program, linears)
    generator = torch.Generator().manual_seed(0)
    scaled = []
    for group in groups:
        if group.producer is not None and group.columns is not None:
            factor = torch.ones(group.producer.channels)
            used = group.columns.unique()
            factor[used] = torch.rand(len(used), generator=generator) * 4 + 0.25
            scaled.append((group, Scale(0.5, factor)))
    assert len(scaled) == ARCHITECTURES[name]
    applied = fold(program, scaled)
    for linear in linears:
        for kind, operation in (("rows", "divide_rows"), ("columns", "multiply_columns")):
            factor_name = applied.get(linear.weight, {}).get(kind)
            if factor_name is None:
                continue
            node = linear.node.args[1]
            current = program.weight_name(node)
            assert current is not None
            (new,) = program.weights.add(operation, [linear.weight], [current, factor_name])
            program.point_weight(node, new)  # type: ignore[arg-type]
    program.clean()
    after = logits(program, source, ids)
    for old, new_logits in zip(before, after, strict=True):
        assert (old - new_logits).abs().max() < 1e-4 * max(1.0, float(old.abs().max()))
