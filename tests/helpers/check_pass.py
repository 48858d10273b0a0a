"""`check_pass`: the one harness that holds a pass to everything the pipeline promises of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import Subject, clone_program, program_of
from torch import fx, nn

from smelt.compiler.manager import Controls, PassManager, Stage
from smelt.compiler.numerics import compare, step_values
from smelt.passes.base import Close, Exact, Lossy, Pass
from smelt.passes.dialect import verify
from smelt.passes.program import Program, module_path
from smelt.passes.rewrite import graph_text
from smelt.passes.weights import Step, TensorSource, WeightPlan

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


@dataclass(frozen=True)
class Checked:
    """What the pass left behind, for assertions of the test's own."""

    program: Program
    record: dict[str, Any]
    logits: torch.Tensor


def check_pass(
    subject: Subject | nn.Module,
    pass_: Pass,
    *,
    before: Mapping[str, int],
    after: Mapping[str, int],
    matched: int | None = None,
    rewritten: int | None = None,
    declined: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    golden: str | None = None,
    fewer: bool = False,
    tolerance: float | None = None,
) -> Checked:
    """Run `pass_` once through the PassManager and check the outcome from every side.

    before, after: calls by operator ("aten.mul", "smelt.rope"; 0 for none). matched: the count; it
    must also be what the pass expects, unless `fewer`. declined: a piece of each declined reason,
    in order. golden: name of the text under tests/goldens the resulting graph must equal.
    tolerance: replaces the numeric promise where the program is not float32.
    """
    given = subject if isinstance(subject, Subject) else program_of(subject)
    program, source, ids = clone_program(given.program), given.source, given.ids
    # A toy starts at the level the pass wants; the pipeline's own order is tested as a whole.
    program.dialect = max(program.dialect, pass_.requires)
    assert _counts(program, before) == dict(before), "operators before"
    text = graph_text(program.graph)
    paths = {node.name: module_path(node) for node in program.calls()}
    reference = logits_of(program, source, ids)

    chosen = pass_.options(options or {})
    controls = Controls(allow_fewer=(pass_.name,) if fewer else ())
    PassManager([Stage(pass_, chosen)], controls).run(program)
    record = program.records[-1]

    assert _counts(program, after) == dict(after), "operators after"
    _check_counts(record, matched, rewritten, declined, fewer)
    assert record["changed"] == (graph_text(program.graph) != text)
    assert record["changed"] == (record["rewritten"] > 0), "changed a graph and counted no rewrite"
    verify(program)
    check_metadata(program, paths)
    logits = logits_of(program, source, ids)
    _check_numerics(pass_, logits, reference, tolerance)
    check_replay(program, source)
    check_idempotent(program, pass_, chosen)
    if golden is not None:
        check_golden(golden, graph_text(program.graph))
    return Checked(program, record, logits)


def operator_name(node: fx.Node) -> str:
    """ "aten.mul" for aten.mul.Tensor; a plain function's own name."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def operators(program: Program) -> Counter[str]:
    return Counter(operator_name(node) for node in program.calls())


def _counts(program: Program, asked: Mapping[str, int]) -> dict[str, int]:
    found = operators(program)
    return {name: found[name] for name in asked}


def _check_counts(
    record: Mapping[str, Any],
    matched: int | None,
    rewritten: int | None,
    declined: Sequence[str],
    fewer: bool,
) -> None:
    if matched is not None:
        assert record["matched"] == matched, "matched"
    if record["expected"] is not None and not fewer:
        assert record["matched"] == record["expected"], "matched and expected differ"
    if rewritten is not None:
        assert record["rewritten"] == rewritten, "rewritten"
    reasons = [entry["reason"] for entry in record["declined"]]
    assert len(reasons) == len(declined), f"declined: {reasons}"
    for reason, piece in zip(reasons, declined, strict=True):
        assert piece in reason, f"{piece!r} is not in {reason!r}"


def check_metadata(program: Program, paths: Mapping[str, str]) -> None:
    """Every call has a true fake value, and a place in the model where it had one or is new."""
    known = any(paths.values())
    for node in program.calls():
        assert "val" in node.meta, f"{node.name} lost its value"
        assert _like(node.meta["val"]) == _like(_recomputed(program, node)), f"{node.name} is stale"
        if paths.get(node.name):
            assert module_path(node) == paths[node.name], f"{node.name} moved to another module"
        elif known and node.name not in paths:
            assert "nn_module_stack" in node.meta, f"{node.name} has no place in the model"


def _recomputed(program: Program, node: fx.Node) -> Any:
    return program._value(node.target, node.args, node.kwargs)  # type: ignore[arg-type]


def _like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), [str(size) for size in value.shape]
    if isinstance(value, tuple | list):
        return [_like(v) for v in value]
    return str(value)


@contextmanager
def _reference_attention(program: Program) -> Iterator[None]:
    """A pass promises numerics of the operator's reference. Another test may have loaded the
    kernels into this process, which then answer for the operator and sum in another order."""
    ops = torch.ops.smelt
    references = {
        ops.cached_attention.default: ops.cached_attention_reference.default,
        ops.cached_attention_quantized.default: ops.cached_attention_quantized_reference.default,
    }
    nodes = {node: node.target for node in program.calls(*references)}
    for node, target in nodes.items():
        node.target = references[target]
    program.module.recompile()
    try:
        yield
    finally:
        for node, target in nodes.items():
            node.target = target
        program.module.recompile()


def logits_of(program: Program, source: TensorSource, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one whole sequence, whatever the program's dialect; the real weights."""
    weights = dict(program.weights.materialize(program.used_weights(), source))
    with _reference_attention(program):
        output = program.run(step_values(program, ids), weights)
    logits: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return logits


def _check_numerics(
    pass_: Pass, logits: torch.Tensor, reference: torch.Tensor, tolerance: float | None
) -> None:
    assert logits.shape == reference.shape and logits.dtype == reference.dtype
    assert torch.isfinite(logits).all()
    promise = pass_.numerics
    if tolerance is not None:
        torch.testing.assert_close(logits, reference, atol=tolerance, rtol=tolerance)
    elif isinstance(promise, Exact):
        assert torch.equal(logits, reference), "an exact pass changed the logits"
    elif isinstance(promise, Close):
        torch.testing.assert_close(logits, reference, atol=promise.atol, rtol=promise.rtol)
    else:
        assert isinstance(promise, Lossy)
        measured = compare(logits.float(), reference.float())
        assert measured["kl"] <= promise.max_kl and measured["top1"] >= promise.min_top1


def check_replay(program: Program, source: TensorSource) -> None:
    """The weight plan, written as JSON and read back, gives the same tensors."""
    plan = program.weights
    steps = [
        Step(s["op"], tuple(s["outputs"]), tuple(s["inputs"]), s["args"])
        for s in json.loads(json.dumps(plan.to_json()))
    ]
    again = WeightPlan(steps, dict(plan.specs), dict(plan.computed))
    assert again.digest() == plan.digest()
    names = program.used_weights()
    first, second = dict(plan.materialize(names, source)), dict(again.materialize(names, source))
    assert set(first) == set(names)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs when the plan is replayed"


def check_idempotent(program: Program, pass_: Pass, options: Any) -> None:
    """A second run finds nothing left to do, in the graph and in the weight plan."""
    again = clone_program(program)
    result = pass_.run(again, options)
    again.clean()
    assert result.rewritten == 0, "a second run rewrote something"
    assert graph_text(again.graph) == graph_text(program.graph), "a second run changed the graph"
    assert again.weights.digest() == program.weights.digest(), "a second run changed the plan"


def check_golden(name: str, text: str) -> None:
    """Compare with tests/goldens/<name>.txt; SMELT_REGENERATE_GOLDENS=1 writes it anew."""
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("SMELT_REGENERATE_GOLDENS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"no {path.name}: write it with make goldens, and read it"
    assert text == path.read_text(), f"{path.name} differs: make goldens, and read the diff"
