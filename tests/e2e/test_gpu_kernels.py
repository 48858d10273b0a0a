"""The Triton kernels in a whole artifact: compiled, opened and run by Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized import module
from helpers.steps import Opened, Stepper

import smelt

EVERYWHERE = {
    "int4": {"quant": "rtn", "format": "int4", "group_size": 32},
    "w8a8": {"quant": "smoothquant", "alpha": 0.0},
    "fp8": {"quant": "fp8"},
}
OPERATORS = ("linear_int4", "linear_w8a8", "linear_fp8", "rms_norm", "gated_activation")
ATTENTION = {"auto": "cached_attention", "int8": "cached_attention_quantized"}


def logits(folder: Path) -> torch.Tensor:
    """Of a prompt in two chunks beside another sequence, then of two steps of decoding."""
    ids = [torch.arange(3, 43) * 5 % 128, torch.arange(5, 20) * 3 % 128]
    stepper = Stepper(Opened(folder), {}, ids)
    rows: list[torch.Tensor] = []
    for counts in ({0: 20}, {0: 17, 1: 9}, {0: 1, 1: 1}, {0: 1, 1: 1}):
        found = stepper.step(counts)
        rows += [found[sequence] for sequence in counts]
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [("int4", "auto"), ("w8a8", "int8"), pytest.param("fp8", "auto", marks=pytest.mark.slow)],
)
def test_an_artifact_of_triton_kernels_computes_what_the_reference_does(
    name: str, kv_cache: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**EVERYWHERE[name], "kv_cache": kv_cache, "backend": "eager"}
    operators = [o for o in (*OPERATORS, ATTENTION[kv_cache]) if o != "linear"]
    found = {}
    for provider in ("triton", "reference"):
        chosen = tuple((operator, provider) for operator in operators)
        made = smelt.compile(
            module("Llama", num_hidden_layers=2), tmp_path / provider, providers=chosen, **options
        )
        used = {p["provider"] for p in made.manifest.providers if p["operator"] in operators}
        assert used == {provider}
        found[provider] = logits(tmp_path / provider)
    torch.testing.assert_close(found["triton"], found["reference"], atol=2e-2, rtol=2e-2)
