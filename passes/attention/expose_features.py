"""Give the step a second output: what trained speculation heads read of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from smelt.runtime.batch import FEATURES

from ..base import Exact, Pass, PassResult
from ..program import Program, module_path
from ..rewrite import aten, shape

_NO_STREAM = "no single value leads from layer {n} to the one behind it"


@dataclass(frozen=True)
class FeatureOptions:
    """kind: "final" or "eagle3"."""

    kind: str = "final"


class ExposeFeatures(Pass):
    """The step gives features beside its logits, for drafts by Medusa or EAGLE-3 heads.

    Before                                      After (kind "final")
        n = smelt.rms_norm(r, w)  n: [1, R, K]      n = smelt.rms_norm(r, w)
        y = aten.linear(n, head)                    y = aten.linear(n, head)
        -> [R, V]                                   -> [R, V], aten.select(n, 0, 0)   [R, K]

                                                After (kind "eagle3")
                                                    f = aten.cat([x_a, x_b, x_c], -1)
                                                    -> [R, V], aten.select(f, 0, 0)   [T, 3 K]

    "final" is what enters the output layer, found upwards from the logits. "eagle3" are the
    residual streams behind the second, the middle and the third last layer (`stream_layers`), of
    all tokens: of each layer the one value of the model's width that others read, by module path.
    Legal always: nothing that was computed changes. It costs a copy of a few rows a step. With an
    output layer whose scales were folded into the last norm "final" would be another vector than
    the heads were trained on; smelt leaves output layers at 16 bits.
    """

    name = "expose-features"
    summary = "hidden rows for speculation heads become a second output"
    after = ("keep-logits-rows",)
    numerics = Exact()
    Options = FeatureOptions

    def expect(self, program: Program) -> int | None:
        return 1

    def run(self, program: Program, options: FeatureOptions) -> PassResult:
        result = PassResult()
        if options.kind not in FEATURES[1:]:
            raise ValueError(f"features are {' or '.join(FEATURES[1:])}, not {options.kind!r}")
        output = next(n for n in program.graph.nodes if n.op == "output")
        values = output.args[0] if isinstance(output.args[0], list | tuple) else [output.args[0]]
        if len(values) > 1:
            result.matched = 1
            return result
        head = output_layer(values[0])
        if head is None:
            result.decline(values[0], "no output layer found above the logits")
            return result
        (entered, *_), width = head.all_input_nodes, shape(head.all_input_nodes[0])[-1]
        layers: list[int] = []
        streams = [entered]
        if options.kind == "eagle3":
            prefixes = _layer_prefixes(program)
            if len(prefixes) < 2:
                result.decline(head, f"{len(prefixes)} layers have no three residual streams")
                return result
            layers = list(stream_layers(len(prefixes)))
            found = [_stream(program, prefixes, n, width) for n in layers]
            for n, stream in zip(layers, found, strict=True):
                if stream is None:
                    result.decline(head, _NO_STREAM.format(n=n))
                    return result
            streams = [stream for stream in found if stream is not None]
        with program.graph.inserting_before(output):
            joined = streams[0]
            if len(streams) > 1:
                joined = program.call(aten.cat.default, (streams, -1), like=streams[-1])
            while len(shape(joined)) > 2:
                joined = program.call(aten.select.int, (joined, 0, 0), like=joined)
        output.args = ((values[0], joined),)
        result.matched = result.rewritten = 1
        result.notes.append({"kind": options.kind, "layers": layers})
        return result


def stream_layers(count: int) -> tuple[int, int, int]:
    """Behind how many of `count` layers EAGLE-3 reads the stream: 2, count // 2 and count - 3
    (arXiv:2503.01840, section 4), moved apart where a small model has them coincide or cross."""
    middle = max(1, count // 2)
    return min(2, middle - 1), middle, max(count - 3, middle + 1)


def output_layer(logits: fx.Node) -> fx.Node | None:
    """The linear whose result the logits are, behind at most soft caps, scalings and views."""
    node = logits
    while node.op == "call_function":
        if "linear" in str(node.target):
            return node
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    return None


def _layer_prefixes(program: Program) -> list[str]:
    """ "model.layers.0." and so on, in graph order: of each attention's path, up to its number."""
    found: dict[str, None] = {}
    for node in program.calls(torch.ops.smelt.attention.default):
        parts = module_path(node).split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            found[".".join(parts[: at + 1]) + "."] = None
    return list(found)


def _stream(program: Program, prefixes: list[str], n: int, width: Any) -> fx.Node | None:
    """The residual stream behind the first n layers, None unless exactly one value is it."""

    def inside(node: fx.Node, layer: int) -> bool:
        return f"{module_path(node)}.".startswith(prefixes[layer])

    if n:
        found = [
            node
            for node in program.calls()
            if inside(node, n - 1) and any(not inside(user, n - 1) for user in node.users)
        ]
    else:
        found = [
            node
            for node in program.calls()
            if not inside(node, 0) and any(inside(user, 0) for user in node.users)
        ]
    wide = [node for node in found if _is_stream(node, width)]
    return wide[0] if len(wide) == 1 else None


def _is_stream(node: fx.Node, width: Any) -> bool:
    value = node.meta["val"]
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and value.shape[-1] == width
        and isinstance(value.shape[-2], torch.SymInt)
    )
