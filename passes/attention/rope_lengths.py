"""Rotary factors by length read the lengths of the batch's own sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from smelt.runtime.batch import ROPE_INPUT, LengthScaling

from ..base import Exact, Pass, PassResult
from ..program import Program, Role


class InsertRopeLengths(Pass):
    """The length of the one traced sequence becomes an input with one length a token.

    Before                                          After
        l = smelt.sequence_length(position_ids,         l = rope_lens      int64 [T]
                                  kind, limit)

    Dynamic NTK and longrope turn a token by factors that depend on its sequence's length. In a
    packed step the largest position says nothing: other sequences are longer, and of a long prompt
    a chunk may be there. Which length a token counts for is the engine's to say (`LengthScaling`);
    the kind and the limit go into the cache's specification, because cached keys are turned
    already. Legal where all rotary modules switch alike, which the trace has checked. Exact: for
    one whole sequence the lengths are the same. Models without such scaling have no such node, and
    their contract stays as it is.
    """

    name = "insert-rope-lengths"
    summary = "rotary factors that depend on the length take it from the batch, token by token"
    after = ("insert-kv-cache",)
    numerics = Exact()

    def expect(self, program: Program) -> int | None:
        wanted = program.facts.module_counts.get("rotary_by_length", 0)
        # What has the input needs it no more.
        return 0 if program.caches is not None and program.caches.rope else wanted

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        nodes = program.calls(torch.ops.smelt.sequence_length.default)
        if not nodes or program.caches is None:
            return result
        scaling = program.caches.rope
        if scaling is None:
            scaling = _scaling(nodes[0])
            program.caches = replace(program.caches, rope=scaling)
            with program.fake_mode:
                value = torch.empty_like(program.input("position_ids").meta["val"])
            program.add_input(ROPE_INPUT, Role.BATCH, value)
        lengths = program.input(ROPE_INPUT)
        for node in nodes:
            result.matched += 1
            if _scaling(node) != scaling:
                result.decline(node, f"expected {scaling}, found {_scaling(node)}")
                continue
            program.replace(node, lengths)
            program.graph.erase_node(node)
            result.rewritten += 1
        return result


def _scaling(node: fx.Node) -> LengthScaling:
    _, kind, limit = node.args
    return LengthScaling(str(kind), int(limit))  # type: ignore[arg-type]
