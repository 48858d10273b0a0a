"""PassManager and pipeline: order, limits, expectations, dumps, and passes that misbehave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.check_pass import logits_of
from helpers.tiny import Subject, Toy, program_of, tiny_program

from smelt.compiler.manager import Controls, PassError, PassManager, Stage
from smelt.compiler.numerics import NumericsCheck
from smelt.compiler.pipeline import (
    OPT_LEVELS,
    PipelineConfig,
    load_pass,
    pipeline,
    portable_stages,
)
from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.base import Close, Exact, Lossy, Pass, PassResult
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.canonical.rms_norm import CanonicalizeRmsNorm
from smelt.passes.program import Dialect, Program
from smelt.passes.rewrite import graph_text
from smelt.runtime.errors import UserError

aten = torch.ops.aten


class Sines(Toy):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.sin(x))


@pytest.fixture
def subject() -> Subject:
    return program_of(Sines())


class Quiet(Pass):
    """Does nothing. Each test class below changes one thing."""

    name = "quiet"
    summary = "nothing"
    requires = Dialect.ATEN

    def run(self, program: Program, options: Any) -> PassResult:
        return PassResult()


class SinToCos(Quiet):
    name = "sin-to-cos"

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls(aten.sin.default):
            with program.graph.inserting_before(node):
                new = program.call(aten.cos.default, node.args, like=node)
            program.replace(node, new)
            result.matched += 1
            result.rewritten += 1
        return result


def run(subject: Subject, *passes: Pass, **controls: Any) -> Program:
    stages = [Stage(p, p.options({})) for p in passes]
    return PassManager(stages, Controls(**controls)).run(subject.program)


def names(program: Program) -> list[str]:
    return [record["name"] for record in program.records]


def test_a_wrong_order_is_refused_before_anything_runs(subject: Subject) -> None:
    with pytest.raises(UserError, match="canonicalize-rms-norm must run after remove-noops"):
        run(subject, CanonicalizeRmsNorm(), RemoveNoops())
    assert subject.program.records == []


def test_the_same_pass_twice_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="pass quiet stands in it twice"):
        run(subject, Quiet(), Quiet())


@pytest.mark.parametrize(
    "controls", [{"skip": ("melt",)}, {"stop_after": "melt"}, {"allow_fewer": ("melt",)}]
)
def test_a_control_for_no_pass_is_refused(subject: Subject, controls: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no pass melt in this pipeline; it has quiet"):
        run(subject, Quiet(), **controls)


def test_a_pass_that_needs_a_later_dialect_says_what_was_missed(subject: Subject) -> None:
    class Late(Quiet):
        name = "late"
        requires = Dialect.CACHED

    with pytest.raises(PassError, match=r"late needs a CACHED program, this one is ATEN; was an"):
        run(subject, KeepLogitsRows(), InsertKvCache(), Late(), skip=("insert-kv-cache",))


def test_skip_stop_and_limit(subject: Subject) -> None:
    passes = (RemoveNoops(), Quiet(), SinToCos())
    program = run(subject, *passes, skip=("quiet",))
    assert program.records[1] == {"name": "quiet", "skipped": True}
    assert len(program.calls(aten.cos.default)) == 2
    program = run(program_of(Sines()), *passes, stop_after="quiet")
    assert names(program) == ["remove-noops", "quiet"]
    program = run(program_of(Sines()), *passes, pass_limit=1)
    assert names(program) == ["remove-noops"]
    program = run(program_of(Sines()), *passes, pass_limit=0)
    assert names(program) == [] and program.calls(aten.sin.default)


def test_a_run_goes_on_where_another_stopped(subject: Subject) -> None:
    stages = [Stage(p, p.options({})) for p in (RemoveNoops(), Quiet(), SinToCos())]
    manager = PassManager(stages)
    manager.run(subject.program, until=2)
    assert names(subject.program) == ["remove-noops", "quiet"]
    manager.run(subject.program, start=2)
    assert names(subject.program) == ["remove-noops", "quiet", "sin-to-cos"]


def test_the_record_of_a_pass(subject: Subject) -> None:
    (record,) = run(subject, SinToCos()).records
    assert record["changed"] and record["matched"] == record["rewritten"] == 2
    assert record["expected"] is None and record["declined"] == []
    assert record["nodes_before"] == record["nodes_after"]
    assert record["numerics"] == "exact" and record["ms"] >= 0
    assert len(record["source"]) == 16 and record["source"] != Quiet.source_hash()


def test_changed_is_seen_and_not_believed(subject: Subject) -> None:
    class Boasting(Quiet):
        name = "boasting"

        def run(self, program: Program, options: Any) -> PassResult:
            return PassResult(matched=5, rewritten=5)

    assert run(subject, Boasting()).records[0]["changed"] is False


def test_options_are_recorded(subject: Subject) -> None:
    @dataclass(frozen=True)
    class Many:
        size: int = 3
        names: tuple[str, ...] = ("a", "b")
        samples: tuple[int, ...] = tuple(range(40))
        source: object = None

    class WithOptions(Quiet):
        name = "with-options"
        Options = Many

    given = WithOptions.options({"size": 4, "source": object()})
    PassManager([Stage(WithOptions(), given)]).run(subject.program)
    assert subject.program.records[0]["options"] == {
        "size": 4,
        "names": ["a", "b"],
        "samples": "40 entries",
        "source": "object",
    }


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="quiet has no option 'speed'; it knows none"):
        Quiet.options({"speed": 1})
    with pytest.raises(
        UserError, match="insert-kv-cache has no option 'size'; it knows block_size"
    ):
        pipeline(PipelineConfig(options={"insert-kv-cache": {"size": 1}}))
    with pytest.raises(UserError, match="options for melt, which is not in this pipeline"):
        pipeline(PipelineConfig(options={"melt": {}}))


def test_dumps_are_numbered_and_have_a_diff(subject: Subject, tmp_path: Path) -> None:
    before = graph_text(subject.program.graph)
    run(subject, RemoveNoops(), Quiet(), SinToCos(), dump=tmp_path / "new", skip=("quiet",))
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == [
        "00_trace.txt",
        "01_remove-noops.diff",
        "01_remove-noops.txt",
        "03_sin-to-cos.diff",
        "03_sin-to-cos.txt",
    ]
    assert (tmp_path / "new" / "00_trace.txt").read_text() == before
    diff = (tmp_path / "new" / "03_sin-to-cos.diff").read_text().splitlines()
    assert sum(line.startswith("-%") and "aten.sin" in line for line in diff) == 2
    assert sum(line.startswith("+%") and "aten.cos" in line for line in diff) == 2
    last = (tmp_path / "new" / "03_sin-to-cos.txt").read_text()
    assert last == graph_text(subject.program.graph)


class Hopeful(Quiet):
    name = "hopeful"

    def expect(self, program: Program) -> int | None:
        return 3

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult(matched=1)
        for node in program.calls(aten.sin.default):
            result.decline(node, "it waves")
        return result


def test_fewer_matches_than_expected_are_an_error_with_the_near_misses(subject: Subject) -> None:
    with pytest.raises(PassError) as caught:
        run(subject, Hopeful())
    text = str(caught.value)
    assert "hopeful matched 1 of 3 places (sin: it waves; sin_1: it waves)" in text
    assert "--allow-fewer hopeful" in text
    record = run(program_of(Sines()), Hopeful(), allow_fewer=("hopeful",)).records[0]
    assert (record["matched"], record["expected"]) == (1, 3)
    assert record["declined"][0] == {"where": "sin", "reason": "it waves"}


class Raising(Quiet):
    name = "raising"

    def run(self, program: Program, options: Any) -> PassResult:
        raise ZeroDivisionError("first line\nsecond line")


class RaisingExpectation(Quiet):
    name = "raising"

    def expect(self, program: Program) -> int | None:
        raise ZeroDivisionError("first line\nsecond line")


@pytest.mark.parametrize("pass_", [Raising(), RaisingExpectation()])
def test_a_pass_that_raises_becomes_one_line(subject: Subject, pass_: Pass) -> None:
    with pytest.raises(PassError) as caught:
        run(subject, pass_)
    assert str(caught.value).splitlines() == [
        "pass raising failed (ZeroDivisionError: first line); "
        "compile with --skip raising, or with --debug for the traceback"
    ]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_pass_that_breaks_its_dialect_is_named(subject: Subject) -> None:
    class Breaking(Quiet):
        name = "breaking"

        def run(self, program: Program, options: Any) -> PassResult:
            (node, _) = program.calls(aten.sin.default)
            with program.graph.inserting_after(node):
                new = program.call(
                    torch.ops.smelt.rms_norm.default, (node, None, 1e-6, 0.0), like=node
                )
            next(u for u in node.users if u is not new).replace_input_with(node, new)
            return PassResult(1, 1)

    with pytest.raises(PassError, match="pass breaking broke the program: ATEN program: rms_norm"):
        run(subject, Breaking())


def checked(subject: Subject, *passes: Pass) -> Program:
    stages = [Stage(p, p.options({})) for p in passes]
    check = NumericsCheck(subject.program, subject.source)
    return PassManager(stages, Controls(check_numerics=True), check).run(subject.program)


@pytest.mark.parametrize("promise", [Exact(), Close(), Lossy(max_kl=1e-9)])
def test_check_numerics_catches_a_wrong_pass(subject: Subject, promise: Any) -> None:
    class Wrong(SinToCos):
        numerics = promise

    with pytest.raises(PassError, match=r"sin-to-cos promises .* and moved the logits: largest"):
        checked(subject, RemoveNoops(), Wrong())


def test_check_numerics_measures_every_pass_and_lets_a_lossy_one_lose(subject: Subject) -> None:
    class Lossily(SinToCos):
        numerics = Lossy(max_kl=100.0, min_top1=0.0)

    class Afterwards(Quiet):
        name = "afterwards"

    program = checked(subject, RemoveNoops(), Lossily(), Afterwards())
    first, second, third = (record["measured"] for record in program.records)
    assert first == {"max_abs": 0.0, "kl": 0.0, "top1": 1.0}
    assert second["max_abs"] > 0.01
    assert third["max_abs"] == 0.0, "what was lost on purpose is held against the next pass"


def test_check_numerics_over_the_whole_pipeline() -> None:
    subject = tiny_program("gemma2")
    stages = pipeline(PipelineConfig())
    check = NumericsCheck(subject.program, subject.source)
    PassManager(stages, Controls(check_numerics=True), check).run(subject.program)
    assert all(record["measured"]["max_abs"] < 1e-5 for record in subject.program.records)


THIRD_PARTY = '''
"""A pass of somebody else's: x + x becomes 2 * x."""

import torch
from smelt.passes.base import Exact, Pass, PassResult

aten = torch.ops.aten


class DoubleSum(Pass):
    """Before: aten.add(x, x). After: aten.mul(x, 2). Always legal."""

    name = "double-sum"
    summary = "x + x becomes 2 * x"
    numerics = Exact()

    def run(self, program, options):
        result = PassResult()
        for node in program.calls(aten.add.Tensor):
            if node.args[0] is not node.args[1]:
                continue
            result.matched += 1
            with program.graph.inserting_before(node):
                new = program.call(aten.mul.Tensor, (node.args[0], 2), like=node)
            program.replace(node, new)
            result.rewritten += 1
        return result
'''


def test_a_third_party_pass_from_a_file_runs_in_the_pipeline(tmp_path: Path) -> None:
    class Doubling(Toy):
        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            q = (x + x)[0].view(-1, 4, 4)
            return torch.ops.smelt.attention(q, q, q, 0.5, 0, 0.0, None).reshape(1, -1, 16)

    file = tmp_path / "double.py"
    file.write_text(THIRD_PARTY)
    assert len(THIRD_PARTY.splitlines()) < 40
    subject = program_of(Doubling(layers=1))
    before = logits_of(subject.program, subject.source, subject.ids)
    stages = pipeline(PipelineConfig(extra=(load_pass(f"{file}:DoubleSum"),)))
    order = [stage.pass_.name for stage in stages]
    assert order.index("fuse-linears") < order.index("double-sum") < order.index("insert-kv-cache")
    check = NumericsCheck(subject.program, subject.source)
    PassManager(stages, Controls(check_numerics=True), check).run(subject.program)
    record = next(r for r in subject.program.records if r["name"] == "double-sum")
    assert record["rewritten"] == 1
    assert len(subject.program.calls(aten.mul.Tensor)) == 1
    after = logits_of(subject.program, subject.source, subject.ids)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        (None, "nowhere.py:Class", "nowhere.py is no file"),
        (None, "Class", "expected FILE.py:Class, and Class is no file"),
        ("x = 1", "pass.py:Class", "has no subclass of smelt.Pass named Class"),
        ("class Class: pass", "pass.py:Class", "has no subclass of smelt.Pass named Class"),
        ("1 / 0", "pass.py:Class", "fails to load: division by zero"),
        ("def", "pass.py:Class", "fails to load: invalid syntax"),
    ],
)
def test_a_third_party_pass_that_is_not_there_is_one_line(
    tmp_path: Path, text: str | None, spec: str, message: str
) -> None:
    if text is not None:
        (tmp_path / "pass.py").write_text(text)
        spec = f"{tmp_path}/{spec}"
    with pytest.raises(UserError) as caught:
        load_pass(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("level", OPT_LEVELS)
def test_every_level_gives_eagers_logits(level: str) -> None:
    subject = tiny_program("llama")
    PassManager(pipeline(PipelineConfig(level))).run(subject.program)
    logits = logits_of(subject.program, subject.source, subject.ids)
    torch.testing.assert_close(logits, subject.logits, atol=1e-4, rtol=1e-4)
    ran = names(subject.program)
    assert ("fuse-linears" in ran) == (level == "O2")
    assert ("canonicalize-rms-norm" in ran) == (level != "O0")


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="no optimisation level 'O3'; known: O0, O1, O2"):
        pipeline(PipelineConfig("O3"))


def test_the_default_order_is_legal_and_splits_before_the_providers() -> None:
    stages = pipeline(PipelineConfig())
    PassManager(stages).check_order()
    portable, target = portable_stages(stages)
    fused = ["fuse-epilogues", "fuse-rope-write", "fuse-quantized-inputs"]
    assert [stage.pass_.name for stage in target] == ["choose-providers", *fused]
    assert portable[-1].pass_.name == "insert-rope-lengths"
