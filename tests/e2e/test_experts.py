"""Mixtures with quantized experts, compiled by AOTInductor, and on the way out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized import module
from helpers.steps import Opened, Stepper

import smelt
from smelt.runtime.errors import UserError

SIZES = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
}
FORMATS = [("int4", 32), ("int3", 16), ("int8", None), ("fp8", None)]


def model(family: str) -> torch.nn.Module:
    return module(family, **SIZES, **FAMILIES[family])


def generated(folder: Path, length: int = 12) -> tuple[list[int], torch.Tensor]:
    """Tokens after a prompt, and the logits they were taken from: of one step the best, of the next
    the second, of the third the third, because the best of a random model hardly changes."""
    ids = torch.cat([torch.arange(3, 24) * 5 % 128, torch.zeros(length, dtype=torch.int64)])
    stepper = Stepper(Opened(folder), {}, [ids])
    rows = [stepper.step({0: 21})[0][-1]]
    for at in range(21, 21 + length):
        ids[at] = rows[-1].topk(3).indices[at % 3]
        rows.append(stepper.step({0: 1})[0][-1])
    return ids[21:].tolist(), torch.stack(rows)


@pytest.mark.slow  # two compilations each
@pytest.mark.parametrize(
    ("family", "format", "group"),
    [(family, *form) for family in FAMILIES for form in FORMATS],
)
def test_both_backends_generate_the_same(
    family: str, format: str, group: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quant": "rtn", "format": format, "group_size": group}
    made = {
        "aoti": smelt.compile(model(family), tmp_path / "aoti", **options),
        "eager": smelt.compile(
            model(family),
            tmp_path / "eager",
            backend="eager",
            providers=(("experts_quantized", "reference"),),
            **options,
        ),
    }
    for name, provider in (("aoti", "cpu"), ("eager", "reference")):
        providers = made[name].manifest.providers
        found = {p["provider"] for p in providers if p["operator"] == "experts_quantized"}
        assert found == {provider}
    (tokens, logits), (want, expected) = (generated(tmp_path / name) for name in made)
    assert tokens == want and len(set(tokens)) > 3
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("format", "group"), [("int8", None), ("int8", 16), ("fp8", None)])
def test_experts_of_8_bits_are_exported_one_by_one(
    family: str, format: str, group: int | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"quant": "rtn", "format": format, "group_size": group}
    smelt.compile(model(family), tmp_path / "out", backend="eager", **options)
    done = smelt.export(tmp_path / "out", tmp_path / "ct")
    assert (done.quantized, done.notes) == (2 * (4 + 3 * 4), ())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
    ids = torch.arange(3, 24) * 5 % 128
    want = Stepper(Opened(tmp_path / "out"), {}, [ids]).step({0: 21})[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids[None]).logits[0], want, atol=1e-3, rtol=1e-3)


def test_experts_in_blocks_of_scales_are_exported_dequantized(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # gate_up has 192 rows: an expert's second block is not full.
    options: dict[str, Any] = {"quant": "fp8", "group_size": 128}
    sizes = {**SIZES, "num_hidden_layers": 1, "num_local_experts": 4, "hidden_size": 128}
    original = module("Mixtral", **sizes)
    smelt.compile(original, tmp_path / "out", backend="eager", **options)
    done = smelt.export(tmp_path / "out", tmp_path / "ct")
    listed = [note for note in done.notes if "one scale a row only, in float8" in note]
    assert len(listed) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
    # Logits say little here: inputs are rounded differently, and a router's choice may flip.
    ours, theirs = (m.model.layers[0].mlp.experts for m in (original, loaded))
    for name in ("gate_up_proj", "down_proj"):
        wanted, found = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(found, wanted.float(), rtol=0.07, atol=2e-3)
        assert not torch.equal(found, wanted.float())


@pytest.mark.parametrize(("format", "group"), [("int4", 32), ("int3", 16)])
def test_experts_are_exported_dequantized(format: str, group: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"quant": "rtn", "format": format, "group_size": group}
    smelt.compile(model("Mixtral"), tmp_path / "out", backend="eager", **options)
    smelt.export(tmp_path / "out", tmp_path / "hf", format="hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.arange(3, 24) * 5 % 128
    want = Stepper(Opened(tmp_path / "out"), {}, [ids]).step({0: 21})[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids[None]).logits[0], want, atol=1e-3, rtol=1e-3)

    if format == "int3":
        with pytest.raises(UserError, match="has 3 bits, and only 4 and 8 are written packed"):
            smelt.export(tmp_path / "out", tmp_path / "ct")
        return
    done = smelt.export(tmp_path / "out", tmp_path / "ct")
    assert done.quantized == 2 * 4  # the layers' attention
    listed = [note for note in done.notes if "loads experts without zero points only" in note]
    assert len(listed) == 4
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
        torch.testing.assert_close(again(ids[None]).logits[0], want, atol=1e-2, rtol=1e-2)
