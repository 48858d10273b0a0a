"""The quality gate: what it measures, what it keeps aside, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from smelt.compiler.api import compile_model
from smelt.compiler.gate import Gate, hold
from smelt.compiler.options import CompileOptions
from smelt.models.folder import read_json
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.evaluation import Evaluation

MODEL = Path(__file__).parents[2] / "models" / "demo" / "smelt-demo-draft"
HELDOUT = MODEL.parent / "heldout.txt"
FAST: dict[str, Any] = {"backend": "eager", "quant": "rtn", "group_size": 32}


def test_limits_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    for given, expected in (
        ({"max_kl": 0.0}, "--max-kl 0"),
        ({"max_kl": float("nan")}, "--max-kl nan"),
        ({"max_ppl_ratio": 0.9}, "--max-ppl-ratio 0.9"),
        ({"gate_text": HELDOUT}, "needs --max-kl or --max-ppl-ratio"),
        ({"max_kl": 0.1, "gate_text": tmp_path / "none.txt"}, "no such file"),
        ({"max_kl": 0.1, "stop_after": "fuse-linears"}, "cut short"),
    ):
        with pytest.raises(UserError, match=expected):
            CompileOptions(**given)


def test_limits() -> None:
    found = Evaluation(100, 11.0, 1.0, "", kl=0.2, top1_agreement=0.9, perplexity_original=10.0)
    assert Gate(max_kl=0.2, max_ppl_ratio=1.1).missed(found) is None
    assert "0.2, above 0.1" in (Gate(max_kl=0.1).missed(found) or "")
    assert "1.1 times" in (Gate(max_ppl_ratio=1.05).missed(found) or "")
    nothing = Evaluation(100, float("nan"), 1.0, "", kl=float("nan"), perplexity_original=10.0)
    assert Gate(max_kl=0.1).missed(nothing) and Gate(max_ppl_ratio=2.0).missed(nothing)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gate") / "out"
    compile_model(MODEL, out, **FAST, format="int8", max_kl=0.05, gate_text=HELDOUT)
    return out


def test_an_artifact_that_holds_is_written_with_its_figures(made: Path) -> None:
    figures = read_json(made / "manifest.json")["quality"]["gate"]
    assert 0 < figures["kl"] < 0.05 and figures["tokens"] > 1000
    assert figures["perplexity"] / figures["perplexity_original"] < 1.05


def test_one_that_misses_is_kept_aside_and_the_old_one_stays(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made, tmp_path / "out")
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(SmeltError, match=r"above 0\.001.*kept in .*out\.rejected") as error:
        compile_model(
            MODEL, out, **FAST, format="int2", max_kl=0.001, gate_text=HELDOUT, force=True
        )
    assert error.value.exit_code == 1
    assert (out / "manifest.json").read_bytes() == before
    rejected = read_json(tmp_path / "out.rejected" / "manifest.json")
    assert rejected["quant"]["format"] == "int2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.rejected"]


def test_a_second_rejected_one_replaces_the_first(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out.rejected").mkdir()
    (tmp_path / "out.rejected" / "old").touch()
    again = shutil.copytree(made, tmp_path / "scratch")
    with pytest.raises(SmeltError, match="kept in"):
        hold(Gate(max_kl=1e-9, text=HELDOUT), again, MODEL, tmp_path / "out", False)
    assert (tmp_path / "out.rejected" / "manifest.json").is_file()
    assert not (tmp_path / "out.rejected" / "old").exists() and not again.exists()


@pytest.mark.parametrize("model", [None, Path(__file__).parent])
def test_without_a_model_folder_and_tokenizer_it_says_so(model: Path | None) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        hold(Gate(max_kl=1.0), Path("made"), model, Path("out"), False)
