"""`smelt passes`: the resolved pipeline, or one pass's page."""

from __future__ import annotations

import inspect as python_inspect
from dataclasses import MISSING, fields
from typing import Annotated, Any, Optional

import typer

from smelt.runtime.errors import UserError

Name = Annotated[
    Optional[str],  # noqa: UP045  (typer evaluates annotations on Python 3.10)
    typer.Argument(metavar="NAME", help="One pass."),
]


def command(
    name: Name = None,
    opt: Annotated[str, typer.Option(help="O0, O1 or O2.")] = "O2",
    quant: Annotated[str, typer.Option(help="none, rtn, awq, gptq, smoothquant or fp8.")] = "none",
    kv_cache: Annotated[str, typer.Option("--kv-cache", help="auto, fp8, int8 or int4.")] = "auto",
    features: Annotated[str, typer.Option(help="none, final or eagle3.")] = "none",
) -> None:
    """The resolved pass pipeline, or one pass's page."""
    from smelt.compiler.manager import Stage
    from smelt.compiler.pipeline import PipelineConfig, pipeline
    from smelt.compiler.quantization import METHODS
    from smelt.passes.attention.expose_features import ExposeFeatures
    from smelt.passes.attention.quantize_kv_cache import QuantizeKvCache
    from smelt.passes.quantize import KeepQuantized
    from smelt.runtime.batch import FEATURES

    if quant != "none" and quant not in METHODS:
        raise UserError(f"--quant {quant}: expected one of none, {', '.join(METHODS)}")
    quantizers = {key: Stage(cls(), cls.Options()) for key, cls in METHODS.items()}
    if features not in FEATURES:
        raise UserError(f"--features {features}: expected one of {', '.join(FEATURES)}")
    config = PipelineConfig(opt, quantizers.get(quant), kv_cache=kv_cache, features=features)
    stages = pipeline(config)
    if name is None:
        _print_pipeline(stages)
        return
    every = [
        *(s.pass_ for s in [*stages, *quantizers.values()]),
        QuantizeKvCache(),
        ExposeFeatures(),
        KeepQuantized(),
    ]
    known = {pass_.name: pass_ for pass_ in every}
    if name not in known:
        raise UserError(f"no pass {name}; there are {', '.join(known)}")
    _print_page(known[name])


def _print_pipeline(stages: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "pass", "dialect", "numerics", "what it does", box=None)
    for i, stage in enumerate(stages, 1):
        pass_ = stage.pass_
        dialect = pass_.requires.name
        if pass_.produces is not None:
            dialect += f" -> {pass_.produces.name}"
        table.add_row(str(i), pass_.name, dialect, pass_.numerics.kind, pass_.summary)
    Console().print(table)


def _print_page(pass_: Any) -> None:
    print(f"{pass_.name}: {pass_.summary}\n")
    print(python_inspect.getdoc(type(pass_)) or "")
    print(f"\nrequires {pass_.requires.name}", end="")
    print(f", produces {pass_.produces.name}" if pass_.produces is not None else "", end="")
    print(f", after {', '.join(pass_.after)}" if pass_.after else "")
    print(f"numerics {pass_.numerics}")
    for field in fields(pass_.Options):
        default = "" if field.default is MISSING else f" = {field.default}"
        print(f"option {field.name}{default}")


def print_passes(records: list[dict[str, Any]]) -> None:
    """What each pass of a compilation did, one row a pass."""
    from rich.console import Console
    from rich.table import Table

    table = Table("pass", "matched", "expected", "rewritten", "declined", "nodes", "ms", box=None)
    for r in records:
        if r.get("skipped"):
            table.add_row(r["name"], "skipped", "", "", "", "", "")
            continue
        expected = "any" if r["expected"] is None else str(r["expected"])
        nodes = f"{r['nodes_before']} -> {r['nodes_after']}"
        row = (r["matched"], expected, r["rewritten"], len(r["declined"]), nodes, f"{r['ms']:.0f}")
        table.add_row(r["name"], *(str(cell) for cell in row))
    print()
    Console().print(table)
