"""From a module to an artifact and back through the eager backend: no compiler runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized import module
from helpers.steps import Opened, Stepper
from helpers.tiny import Subject, tiny_program

from smelt.compiler.api import Stopped, compile_model
from smelt.compiler.numerics import compare
from smelt.runtime.errors import UserError


def compiled(subject: Subject, out: Path, **options: Any) -> Opened:
    assert compile_model(subject.model, out, backend="eager", **options) is not None
    return Opened(out)


@pytest.mark.parametrize(
    ("family", "options"),
    [("gemma2", {}), ("mixtral", {}), ("llama", {"skip": ("choose-providers",)})],
)
def test_an_artifact_gives_eagers_logits(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    subject = tiny_program(family)
    assert subject.logits is not None
    stepper = Stepper(compiled(subject, tmp_path / "OUT", **options), {}, [subject.ids])  # type: ignore[arg-type]
    found = [stepper.step({0: n})[0] for n in (12, 1, 16)]
    torch.testing.assert_close(torch.cat(found), subject.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("quant", "bits"), [({}, 32), ({"quant": "rtn", "format": "int8"}, 8)])
def test_a_token_reads_its_own_experts(tmp_path: Path, quant: dict[str, Any], bits: int) -> None:
    """Two of four: half the bytes of the experts beside everything but the embedding."""
    model = module("Mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)
    memory = compile_model(model, tmp_path / "out", backend="eager", **quant).manifest.memory
    experts = 4 * 3 * 64 * 96 * bits // 8
    scales = 4 * (2 * 96 + 64) * 2 if quant else 0
    embedding = 128 * 64 * 4
    assert memory["weight_bytes_per_token"] == (
        memory["weights_bytes"] - embedding - (experts + scales) // 2
    )


def test_without_a_cache_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without the pass insert-kv-cache there is no step"):
        compiled(tiny_program("llama"), tmp_path / "OUT", skip=("insert-kv-cache",))
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_cache_without_a_cache_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    options = {"kv_cache": "int8", "skip": ("insert-kv-cache",)}
    with pytest.raises(UserError, match="--kv-cache int8 and --skip insert-kv-cache"):
        compile_model(tmp_path / "no-such-model", tmp_path / "OUT", **options)
    with pytest.raises(UserError, match="--kv-cache int3: expected one of auto, fp8, int8, int4"):
        compile_model(tmp_path / "no-such-model", tmp_path / "OUT", kv_cache="int3")
    assert list(tmp_path.iterdir()) == []


def test_numerics_are_not_checked_where_kernels_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check with --device cpu"):
        compile_model("nowhere", tmp_path / "OUT", device="cuda", check_numerics=True)


def test_an_artifact_with_a_quantized_cache(tmp_path: Path) -> None:
    """Through the saved step, in pieces and with the numerics of every pass checked."""
    subject = tiny_program("gemma2")
    assert subject.logits is not None
    options = {"kv_cache": "int8", "check_numerics": True}
    opened = compiled(subject, tmp_path / "OUT", **options)
    assert opened.caches.format == "int8"
    stepper = Stepper(opened, {}, [subject.ids])  # type: ignore[arg-type]
    found = torch.cat([stepper.step({0: n})[0] for n in (12, 1, 16)])
    assert 0 < compare(found, subject.logits)["kl"] < 1e-5


def test_a_pipeline_cut_short_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_program("llama").model
    out = compile_model(model, tmp_path / "OUT", stop_after="fuse-linears", dump=tmp_path / "dump")
    assert isinstance(out, Stopped)
    assert out.passes[-1]["name"] == "fuse-linears"
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]
    assert any(path.name.endswith("fuse-linears.txt") for path in (tmp_path / "dump").iterdir())
