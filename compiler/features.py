"""What the manifest says of a step's second output."""

from __future__ import annotations

from typing import Any

import torch

from smelt.passes.attention.expose_features import ExposeFeatures, output_layer
from smelt.passes.program import Program
from smelt.runtime.batch import Features

_PLAIN = (torch.ops.aten.linear.default, torch.ops.smelt.linear.default)


def step_features(program: Program) -> dict[str, Any]:
    """{"features": `Features` as JSON} of a lowered program that has them, otherwise {}."""
    notes = [
        note
        for record in program.records
        if record["name"] == ExposeFeatures.name
        for note in record.get("notes", [])
    ]
    if not notes:
        return {}
    output = next(n for n in program.graph.nodes if n.op == "output")
    logits, features = output.args[0]
    found = Features(
        notes[0]["kind"],
        int(features.meta["val"].shape[-1]),
        tuple(notes[0]["layers"]),
        _embedding(program),
        _head(program, logits),
    )
    return {"features": found.to_json()}


def _embedding(program: Program) -> str | None:
    """The table whose rows the token ids pick."""
    ids = {program.input("input_ids")}
    for node in program.calls():  # in graph order: views of the ids are met before their readers
        if node.target is torch.ops.aten.embedding.default and node.args[1] in ids:
            return program.weight_name(node.args[0])
        if len(node.all_input_nodes) == 1 and node.all_input_nodes[0] in ids:
            ids.add(node)
    return None


def _head(program: Program, logits: torch.fx.Node) -> str | None:
    """The output layer's weight, where a plain linear without a bias reads it."""
    head = output_layer(logits)
    if head is None or head.target not in _PLAIN or any(head.args[2:]):
        return None
    return program.weight_name(head.args[1])
