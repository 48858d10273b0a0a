"""smelt tune: what it times, what it keeps, and that the kept is chosen."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.quantized import module

import smelt
from smelt.compiler.tune import GAIN, MODULES, TABLES, Sizes, tune
from smelt.runtime.errors import UserError
from smelt.runtime.kernels.gpu import operators as _  # noqa: F401 - registers them
from smelt.runtime.kernels.gpu import quantize, tuning

OPERATORS = ("linear_int4", "cached_attention")
SIZES = Sizes(many=24, context=32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's tables are in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache" / "smelt" / "tuned"
    tuning.forget()


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of what a module proposes: in the interpreter each run takes long."""
    for name in {MODULES.get(kernel, kernel) for kernels in TABLES.values() for kernel in kernels}:
        module = importlib.import_module(f"smelt.runtime.kernels.gpu.{name}")
        all_ = module.candidates
        monkeypatch.setattr(
            *(module, "candidates"), lambda *args, all_=all_, **named: all_(*args, **named)[:2]
        )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    smelt.compile(
        module("Llama", num_hidden_layers=1),
        out,
        backend="eager",
        quant="rtn",
        format="int4",
        group_size=32,
        providers=tuple((operator, "triton") for operator in OPERATORS),
    )
    return out


def faster_each_time(factor: float) -> Callable[[Callable[[], object]], float]:
    """Milliseconds that fall by `factor` with every call that is timed."""
    now = [1000.0]

    def measure(call: Callable[[], object]) -> float:
        now[0] *= factor
        return now[0]

    return measure


def test_the_fastest_is_kept_and_chosen(artifact: Path, cache: Path) -> None:
    found = tune(artifact, measure=faster_each_time(0.5), sizes=SIZES)
    kernels = {each.kernel for each in found}
    assert {"linear_int4", "kv_write", "attention_decode", "attention_prefill"} <= kernels
    assert all(each.after < each.before for each in found if each.tried)
    for each in found:
        table = json.loads((cache / f"{each.kernel}.json").read_text())
        kept = tuning.choose(each.kernel, [each.shape], 0)
        assert table["0"][each.shape] == kept.to_json()


def test_a_gain_within_the_noise_changes_nothing(artifact: Path, cache: Path) -> None:
    found = tune(artifact, measure=lambda call: 1.0, sizes=SIZES)
    assert found and all(each.after == each.before for each in found)
    assert not cache.exists() and GAIN > 0


def test_an_artifact_without_triton_kernels_is_refused(tmp_path: Path) -> None:
    smelt.compile(module("Llama", num_hidden_layers=1), tmp_path / "out", backend="eager")
    with pytest.raises(UserError, match="built for cpu and has no Triton kernels to tune"):
        tune(tmp_path / "out")


def test_a_damaged_table_says_what_to_do(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "kv_write.json").write_text('{"90": {"any": {"constants": 3}}}')
    with pytest.raises(tuning.TuningError, match=r"no tuning table.*run smelt tune again"):
        tuning.choose("kv_write", ["any"], 90)


def test_every_table_of_an_operator_has_a_module_that_proposes_for_it() -> None:
    """For each shipped shape class of each capability, and rows of features of any number."""
    for kernel in {kernel for kernels in TABLES.values() for kernel in kernels}:
        name = MODULES.get(kernel, kernel)
        module = importlib.import_module(f"smelt.runtime.kernels.gpu.{name}")
        more = (kernel,) if name == "attention" else ()
        for found, entries in tuning.tables()[kernel].items():
            for shape in {*entries} - {"add"}:
                assert module.candidates(shape, found, *more), (kernel, found, shape)
    assert quantize.candidates("2048", 90) == quantize.candidates("middle", 90)


def test_operators_that_are_tuned_exist() -> None:
    assert all(hasattr(torch.ops.smelt, operator) for operator in TABLES)


def test_a_capability_without_entries_takes_the_nearest_lower_one() -> None:
    tables = tuning.tables()["linear_w8a8"]
    assert 89 not in tables and 86 in tables
    assert tuning.choose("linear_w8a8", ["few"], 89) == tables[86]["few"]
    with pytest.raises(tuning.TuningError, match="nothing for no such shape on capability 90"):
        tuning.choose("linear_w8a8", ["no such shape"], 90)
