"""`PassManager`: runs a list of passes and holds each of them to what it says.

Per pass: dialect required, run inside torch's GraphTransformObserver, dead code and lint, verify,
expectation, numerics when asked, dump and diff, record.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from smelt.passes.base import Pass
from smelt.passes.dialect import DialectError, verify
from smelt.passes.program import Program
from smelt.passes.rewrite import graph_text
from smelt.runtime.errors import SmeltError, UserError


class PassError(SmeltError):
    """A pass raised, broke its dialect, matched too little or left its numerics promise."""


@dataclass(frozen=True)
class Stage:
    """A pass and the options it runs with."""

    pass_: Pass
    options: Any


@dataclass(frozen=True)
class Controls:
    """What a user may turn on or off around a pipeline; every field has a command-line flag."""

    skip: tuple[str, ...] = ()
    stop_after: str | None = None
    pass_limit: int | None = None
    allow_fewer: tuple[str, ...] = ()
    dump: Path | None = None
    check_numerics: bool = False


NumericCheck = Callable[[Program, Pass], dict[str, float]]
Progress = Callable[[str, int, int], None]


@dataclass
class PassManager:
    """stages in order; `run` transforms a program in place and returns it."""

    stages: Sequence[Stage]
    controls: Controls = field(default_factory=Controls)
    numeric_check: NumericCheck | None = None
    progress: Progress | None = None

    def check_order(self) -> None:
        """Raise UserError where a pass is named twice, comes before one it must follow, or a
        control names no pass of this pipeline."""
        names = [stage.pass_.name for stage in self.stages]
        for i, stage in enumerate(self.stages):
            if stage.pass_.name in names[:i]:
                raise UserError(f"pipeline: pass {stage.pass_.name} stands in it twice")
            for earlier in stage.pass_.after:
                if earlier in names[i:]:
                    raise UserError(f"pipeline: {stage.pass_.name} must run after {earlier}")
        asked = [*self.controls.skip, *self.controls.allow_fewer]
        if self.controls.stop_after:
            asked.append(self.controls.stop_after)
        for name in asked:
            if name not in names:
                raise UserError(f"no pass {name} in this pipeline; it has {', '.join(names)}")

    def run(self, program: Program, start: int = 0, until: int | None = None) -> Program:
        """Run stages[start:until]. Raises PassError naming the pass that failed."""
        self.check_order()
        if self.controls.dump and start == 0:
            self.controls.dump.mkdir(parents=True, exist_ok=True)
            self._dump(0, "trace", "", program)
        for i, stage in list(enumerate(self.stages))[start:until]:
            if self._stopped(program):
                break
            if self.controls.pass_limit is not None and i >= self.controls.pass_limit:
                break
            if self.progress:
                self.progress(stage.pass_.name, i, len(self.stages))
            if stage.pass_.name in self.controls.skip:
                program.records.append({"name": stage.pass_.name, "skipped": True})
                continue
            self._run_one(i + 1, stage, program)
        return program

    def _stopped(self, program: Program) -> bool:
        last = program.records[-1]["name"] if program.records else None
        return last is not None and last == self.controls.stop_after

    def _run_one(self, number: int, stage: Stage, program: Program) -> None:
        pass_ = stage.pass_
        if program.dialect < pass_.requires and not self._reached(program, pass_):
            raise PassError(
                f"pass {pass_.name} needs a {pass_.requires.name} program, "
                f"this one is {program.dialect.name}; was an earlier pass skipped?"
            )
        before = graph_text(program.graph)
        nodes_before = len(program.graph.nodes)
        started = time.perf_counter()
        try:
            expected = pass_.expect(program)
            with GraphTransformObserver(program.module, pass_.name):
                result = pass_.run(program, stage.options)
            if pass_.produces is not None:
                program.dialect = pass_.produces
            program.clean()
            verify(program)
        except DialectError as error:
            raise PassError(f"pass {pass_.name} broke the program: {error}") from error
        except (SmeltError, KeyboardInterrupt):
            raise
        except Exception as error:
            line = str(error).strip().split("\n")[0]
            raise PassError(
                f"pass {pass_.name} failed ({type(error).__name__}: {line}); "
                f"compile with --skip {pass_.name}, or with --debug for the traceback"
            ) from error
        after = graph_text(program.graph)
        record: dict[str, Any] = {
            "name": pass_.name,
            "options": _jsonable(stage.options),
            "source": pass_.source_hash(),
            "changed": before != after,
            "matched": result.matched,
            "expected": expected,
            "rewritten": result.rewritten,
            "declined": [{"where": w, "reason": r} for w, r in result.declined],
            "notes": result.notes,
            "numerics": pass_.numerics.kind,
            "ms": round(1000 * (time.perf_counter() - started), 3),
            "nodes_before": nodes_before,
            "nodes_after": len(program.graph.nodes),
        }
        if expected is not None and result.matched < expected:
            self._too_few(pass_, record)
        if self.controls.check_numerics and self.numeric_check is not None:
            record["measured"] = self.numeric_check(program, pass_)
        if self.controls.dump:
            self._dump(number, pass_.name, before, program)
        program.records.append(record)

    def _reached(self, program: Program, pass_: Pass) -> bool:
        """Whether a dialect no pass of this pipeline produces separates the two: unquantized
        programs go straight from SEMANTIC to CACHED."""
        produced = {s.pass_.produces for s in self.stages}
        between = [d for d in type(program.dialect) if program.dialect < d <= pass_.requires]
        return not any(d in produced for d in between)

    def _too_few(self, pass_: Pass, record: dict[str, Any]) -> None:
        if pass_.name in self.controls.allow_fewer:
            return
        near = "; ".join(f"{d['where']}: {d['reason']}" for d in record["declined"][:3])
        raise PassError(
            f"pass {pass_.name} matched {record['matched']} of {record['expected']} places"
            f"{f' ({near})' if near else ''}; "
            f"compile with --allow-fewer {pass_.name} to go on without them"
        )

    def _dump(self, number: int, name: str, before: str, program: Program) -> None:
        assert self.controls.dump is not None
        text = graph_text(program.graph)
        stem = self.controls.dump / f"{number:02d}_{name}"
        stem.with_suffix(".txt").write_text(text)
        if before:
            diff = difflib.unified_diff(
                before.splitlines(True), text.splitlines(True), "before", "after", n=2
            )
            stem.with_suffix(".diff").write_text("".join(diff))


def _jsonable(options: Any) -> dict[str, Any]:
    """Options as the record shows them: data by value, anything larger by its type."""
    out: dict[str, Any] = {}
    for name, value in vars(options).items():
        if isinstance(value, str | int | float | bool | type(None)):
            out[name] = value
        elif hasattr(value, "to_json"):
            out[name] = value.to_json()
        elif isinstance(value, tuple) and all(isinstance(v, str | int | tuple) for v in value):
            out[name] = list(value) if len(value) <= 16 else f"{len(value)} entries"
        else:
            out[name] = type(value).__name__
    return out
