"""`smelt trace`: does a model's class export and match eager, in a minute, without weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from smelt.runtime.errors import UserError

from .compile import Model


def command(
    model: Model,
    check: Annotated[
        bool, typer.Option("--check", help="Compare a small random model with eager.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code of the model folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Whether a model class exports and matches eager, quickly."""
    if not check:
        raise UserError("smelt trace MODEL --check: there is nothing else to do yet")
    import torch

    from smelt.compiler.manager import PassManager
    from smelt.compiler.pipeline import PipelineConfig, pipeline
    from smelt.compiler.trace import check_against_eager
    from smelt.models.config import load_config
    from smelt.models.folder import resolve

    config = load_config(resolve(model), trust_remote_code)
    program, difference = check_against_eager(config, trust_remote_code)
    nodes = len(program.graph.nodes)
    attention = len(program.calls(torch.ops.smelt.attention.default))
    linear = program.facts.module_counts.get("linear", 0)
    PassManager(pipeline(PipelineConfig())).run(program)
    found = {record["name"]: record["matched"] for record in program.records}
    norms = found["canonicalize-rms-norm"] + found["canonicalize-layer-norm"]
    result = {
        "model_class": program.facts.model_class,
        "exports": True,
        "max_difference": difference,
        "nodes": nodes,
        "attention": attention,
        "norms": norms,
        "linears": linear,
        "layers_traced": program.facts.hidden_layers,
        "layers": config.num_hidden_layers,
        "passes": found,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"{program.facts.model_class} exports; logits differ from eager by {difference:.2g}")
    print(
        f"{nodes} nodes over {program.facts.hidden_layers} of {config.num_hidden_layers} layers: "
        f"{attention} attention, {norms} norms, {linear} linears"
    )
    print("every pass matched what it must: " + ", ".join(f"{k} {v}" for k, v in found.items()))
