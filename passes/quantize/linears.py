"""The linear layers of a program: which are quantized, which are left alone and why.

What a linear is for is read off the graph: the one whose output reaches the logits without passing
another weight is the head, the one that reaches an expert layer's choice of experts is a router.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program, module_path
from smelt.passes.rewrite import is_call

from . import formats as _formats  # noqa: F401 - registers the plan operations
from .spec import FORMATS, QuantSpec, Scheme

aten = torch.ops.aten
smelt = torch.ops.smelt
LINEAR = aten.linear.default
EXPERTS = ("experts", "experts_quantized")


@dataclass(frozen=True)
class Linear:
    """One aten.linear of the graph. weight: its planned name. sources: checkpoint names behind it.

    reason: why it is left at 16 bits; None when it is quantized by `scheme`.
    """

    node: fx.Node
    layer: str
    weight: str
    sources: tuple[str, ...]
    n: int
    k: int
    scheme: Scheme
    reason: str | None = None

    @property
    def parameters(self) -> int:
        return self.n * self.k

    @property
    def bias(self) -> fx.Node | None:
        args = self.node.args
        bias = args[2] if len(args) > 2 else self.node.kwargs.get("bias")
        return bias if isinstance(bias, fx.Node) else None


def find_linears(program: Program, spec: QuantSpec) -> list[Linear]:
    """Every linear over a planned weight, in graph order, with the decision about it."""
    found = []
    for node in program.calls(LINEAR):
        name = program.weight_name(node.args[1])
        if name is None:
            continue
        n, k = program.weights.specs[name].shape
        sources = tuple(checkpoint_names(program, name))
        layer = layer_name(sources) or module_path(node) or node.name
        reason = _reason_to_leave(program, node, spec, int(n), int(k))
        found.append(Linear(node, layer, name, sources, int(n), int(k), spec.scheme(layer), reason))
    return found


def checkpoint_names(program: Program, name: str) -> list[str]:
    """The checkpoint tensors that a planned weight is made from."""
    return [
        str(step.args["source"]) for step in program.weights.needed([name]) if step.op == "load"
    ]


def layer_name(sources: Iterable[str]) -> str:
    """ "model.layers.0.self_attn.q_proj+k_proj+v_proj" for the three weights of a fused linear."""
    paths = [name.removesuffix(".weight") for name in sources]
    if not paths:
        return ""
    parents = [path.split(".")[:-1] for path in paths]
    shared = 0
    while all(shared < len(p) and p[shared] == parents[0][shared] for p in parents):
        shared += 1
    prefix = "".join(part + "." for part in parents[0][:shared])
    return prefix + "+".join(path.removeprefix(prefix) for path in paths)


def _reason_to_leave(
    program: Program, node: fx.Node, spec: QuantSpec, n: int, k: int
) -> str | None:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    role = linear_role(node)
    tied = any(is_call(user, aten.embedding.default) for user in weight.users)
    if role in spec.keep:
        return f"{role} (tied)" if tied else role
    if tied:
        return "its weight is the embedding table"
    if len(weight.users) > 1:
        return f"its weight is read in {len(weight.users)} places"
    if min(n, k) < spec.min_features:
        return f"too small ({n} x {k})"
    if not program.weights.specs[str(program.weight_name(weight))].dtype.is_floating_point:
        return "its weight is not floating point"
    return None


def linear_role(node: fx.Node) -> str | None:
    """ "lm_head", "router" or None, by where the output goes without passing another weight."""
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.op == "output":
                return "lm_head"
            name = smelt_name(user)
            if name in EXPERTS and current in user.args[1:3]:
                return "router"
            if name in (*EXPERTS, "attention") or is_call(user, LINEAR) or user in seen:
                continue
            seen.add(user)
            stack.append(user)
    return None


def to_quantized(
    program: Program,
    linear: Linear,
    columns: str | None = None,
    rows: str | None = None,
    clip: str | None = None,
) -> fx.Node:
    """Replace `linear` by its quantized operator; the plan gains one quantize step.

    columns, rows, clip: planned names of what is applied to the weight first (`formats.py`).
    """
    extras = [(kind, name) for kind, name in (("columns", columns), ("rows", rows), ("clip", clip))]
    given = [(kind, name) for kind, name in extras if name is not None]
    fields = ["qweight", "scales"] + ([] if FORMATS[linear.scheme.format].symmetric else ["zeros"])
    names = program.weights.add(
        f"quantize_{linear.scheme.format}",
        [f"{linear.weight}.{field}" for field in fields],
        [linear.weight, *(name for _, name in given)],
        groups=linear.scheme.groups(linear.k),
        kinds=[kind for kind, _ in given],
        layer=linear.layer,
    )
    return replace_linear(program, linear, names)


def replace_linear(program: Program, linear: Linear, names: Sequence[str]) -> fx.Node:
    """Replace `linear` by the operator of its format over the planned weights `names`."""
    target = getattr(smelt, f"linear_{linear.scheme.format}").default
    packed = [program.weight(name) for name in names]
    with program.graph.inserting_before(linear.node):
        node = program.call(
            target,
            (linear.node.args[0], *packed, linear.bias),
            like=linear.node,
        )
    program.replace(linear.node, node)
    return node
