"""Groups: a producer whose channels can be divided, and the linears that then multiply.

Found by walking the graph (`channels.py`), never by module names. A group is what AWQ and
SmoothQuant scale together: x / s comes out of the producer, and each linear holds W * s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program, module_path
from smelt.passes.rewrite import CASTS, VIEWS, is_call, skip

from .channels import Reach, follow
from .linears import Linear

aten = torch.ops.aten


@dataclass(frozen=True)
class Producer:
    """What a scale is folded into.

    node: the value whose last dimension holds the channels. weights: (planned name, offset) of each
    vector or matrix whose rows are divided; offset is 1 for a norm weight stored minus one. linear:
    the quantized linear it is, if it is one.
    """

    node: fx.Node
    weight: str
    offset: float = 0.0
    bias: str | None = None
    linear: Linear | None = None

    @property
    def channels(self) -> int:
        return int(self.node.meta["val"].shape[-1])

    @property
    def where(self) -> str:
        return self.linear.layer if self.linear else module_path(self.node) or self.node.name


@dataclass(frozen=True)
class Group:
    """Linears over one value. columns int64 [K]: the producer's channel of each of their columns.

    Without a producer, `reason` says why no scale can be folded; the linears then share statistics.
    """

    linears: tuple[Linear, ...]
    producer: Producer | None = None
    columns: torch.Tensor | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        return ", ".join(linear.layer for linear in self.linears)

    @property
    def node(self) -> fx.Node:
        return self.linears[0].node

    @property
    def weights(self) -> tuple[str, ...]:
        """Their planned names."""
        return tuple(linear.weight for linear in self.linears)


def find_groups(program: Program, linears: Sequence[Linear]) -> list[Group]:
    """Every linear that is quantized, in exactly one group; groups in graph order."""
    wanted = {linear.node: linear for linear in linears if linear.reason is None}
    groups: list[Group] = []
    claimed: set[fx.Node] = set()
    reasons: dict[fx.Node, str] = {}
    for producer in find_producers(program, linears):
        reach = follow(producer.node)
        readers = [node for node in reach.columns if node not in claimed]
        reason = _refusal(program, producer, reach, wanted)
        if reason is None and len(readers) == len(reach.columns):
            members = tuple(wanted[node] for node in readers)
            groups.append(Group(members, producer, reach.columns[readers[0]]))
            claimed.update(readers)
            continue
        for node in readers:
            reasons.setdefault(node, f"{producer.where}: {reason or 'another producer came first'}")
    groups += _without_producer([n for n in wanted if n not in claimed], wanted, reasons)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(groups, key=lambda group: order[group.linears[0].node])


def find_producers(program: Program, linears: Sequence[Linear]) -> list[Producer]:
    """Norms with a weight of their own, and linears, in graph order."""
    by_node = {linear.node: linear for linear in linears}
    found = []
    for node in program.calls():
        producer = _norm(program, node)
        if producer is None and node in by_node:
            linear = by_node[node]
            bias = program.weight_name(linear.bias)
            if linear.bias is None or bias is not None:
                producer = Producer(node, linear.weight, bias=bias, linear=linear)
        if producer is not None:
            found.append(producer)
    return found


def _norm(program: Program, node: fx.Node) -> Producer | None:
    name = smelt_name(node)
    if name == "rms_norm":
        weight = program.weight_name(node.args[1])
        offset = float(node.args[3])  # type: ignore[arg-type]
        return Producer(node, weight, offset) if weight else None
    if is_call(node, aten.layer_norm.default):
        args = [*node.args, *[None] * 5]
        weight, bias = program.weight_name(args[2]), program.weight_name(args[3])
        if weight is None or len(args[1]) != 1 or (args[3] is not None and bias is None):
            return None
        return Producer(node, weight, bias=bias)
    return None


def _refusal(
    program: Program, producer: Producer, reach: Reach, wanted: dict[fx.Node, Linear]
) -> str | None:
    """Why `producer` cannot be divided for the linears it reaches; None when it can."""
    if not reach.columns:
        return "no linear reads it directly"
    nodes = list(reach.columns)
    for node in nodes:
        for channel in reach.columns[node].unique().tolist():
            if channel in reach.blocked:
                return reach.blocked[channel]
    for node in nodes:
        if node not in wanted:
            return f"{module_path(node) or node.name} reads it too and stays at 16 bits"
    first = reach.columns[nodes[0]]
    if any(not torch.equal(first, reach.columns[node]) for node in nodes[1:]):
        return "its linears read different channels"
    if len({_value(node) for node in nodes}) > 1:
        return "its linears read different values made of it"
    for name in (producer.weight, producer.bias):
        if name is not None and len(program.weight(name).users) > 1:
            return f"its weight {name} has other readers"
    return None


def _value(linear: fx.Node) -> fx.Node:
    """What a linear reads, before casts and views."""
    found = skip(linear.args[0], CASTS | VIEWS)
    assert isinstance(found, fx.Node)
    return found


def _without_producer(
    nodes: list[fx.Node], wanted: dict[fx.Node, Linear], reasons: dict[fx.Node, str]
) -> list[Group]:
    """Linears no scale can be folded for, those with one input together."""
    families: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        families.setdefault(_value(node), []).append(node)
    return [
        Group(tuple(wanted[n] for n in family), reason=reasons.get(family[0]) or _default(value))
        for value, family in families.items()
    ]


def _default(value: fx.Node) -> str:
    made_by = getattr(value.target, "_schema", None)
    name = made_by.name if made_by is not None else str(value.target)
    return f"its input is made by {name}, and no scale passes through that to a norm or linear"
