"""How much memory a calibration will need, from the program's shapes, before it begins.

Counted are tensors; the checkpoint's files are mapped and not copied. At any moment there are

- the values that later pieces read, of every sample (`GraphRun.live`),
- while a piece runs: what one sample needs on top, and the weights that the plan makes,
- at a group: its statistics, the search's own working memory, and what its linears go on with,
- what was found so far.

tests/passes/quantize/test_calibration_memory.py holds the plan to 15 % of what is really allocated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program, Role

from .drift import residual
from .experts import MATRICES, Experts
from .formats import packed_bytes, row_step
from .groups import Group
from .linears import Linear

# A search reads rows of activations [R, K] in about three copies and makes two outputs [R, n].
_INPUTS, _OUTPUTS = 3, 2
# Rows of an expert that go through it at a time.
EXPERT_ROWS = 512
# float32 copies of its input that an operator of ours makes on the way.
_WIDE = {"rms_norm": 3, "gated_activation": 1, "rope": 2}


class Needs(Protocol):
    """What a method's search works with, measured: float32 copies of a chunk of weights, and
    float32 matrices [K, K]. wide: whether linears go on with float32 weights. original: whether
    the original model runs beside."""

    copies: ClassVar[float]
    matrices: ClassVar[float]
    wide: ClassVar[bool]
    whole_gram: ClassVar[bool]
    original: ClassVar[bool]


@dataclass(frozen=True)
class Memory:
    """bytes: the most that is held at one moment. where: the group it comes to that at."""

    bytes: int
    where: str

    def __str__(self) -> str:
        return f"about {self.bytes / 1e9:.2g} GB beside the model's files"


def plan_memory(
    program: Program,
    stations: Sequence[Group | Experts],
    lengths: Sequence[int],
    method: Needs,
    max_rows: int,
) -> Memory:
    """The peak of a calibration on samples of `lengths` tokens."""
    values = _Values(program)
    rows = min(max_rows, sum(lengths))
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    peak, where, start, held = 0, "", 0, 0
    waiting = 0  # what the linears of the group before go on with
    quantized = {node for station in stations for node in _nodes(station)}
    for station in stations:
        stop = calls.index(station.node)
        piece = calls[start:stop]
        running = values.piece(piece, lengths) + waiting + _made(program, piece, quantized)
        kept = values.of_all(calls[stop], lengths)
        if method.original:
            first = running + (values.of_all(piece[0], lengths) if piece else 0)
            then = values.piece(piece, lengths) + kept + _made(program, piece, set())
            running, kept = max(first, then), 2 * kept
        weights = _made(program, _nodes(station), set())
        linears = _linears(station)
        searching = max(_search(program, linear, method, rows, max(lengths)) for linear in linears)
        searching += _drift(station) if method.original else 0
        waiting = sum(_goes_on(program, linear, method) for linear in linears)
        if isinstance(station, Experts):
            searching += waiting + _routed(station, sum(lengths))
        moments = (running, kept + weights + searching, kept + weights + waiting + _chunk(linears))
        if held + max(moments) > peak:
            peak, where = held + max(moments), station.name
        held += sum(_found(linear, method) for linear in linears)
        start = stop
    return Memory(peak, where)


class _Values:
    """Sizes and lifetimes of the graph's values; a view lives as long as what it looks into."""

    def __init__(self, program: Program) -> None:
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        weights = {n for n in program.placeholders() if program.inputs[n.name].role is Role.WEIGHT}
        self.root: dict[fx.Node, fx.Node] = {}
        self.last: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node in weights:
                continue
            viewed = _viewed(node)
            root = node if viewed is None else self.root.get(viewed, node)
            self.root[node] = root
            uses = [self.order[user] for user in node.users]
            self.last[root] = max([self.last.get(root, -1), *uses])
        self.sizes: dict[tuple[fx.Node, int], int] = {}
        self.roots = [n for n in self.nodes if self.root.get(n) is n and n.op != "output"]

    def before(self, node: fx.Node, length: int) -> int:
        """Bytes of one sample that live just before `node` runs."""
        at = self.order[node]
        alive = (r for r in self.roots if self.order[r] < at <= self.last[r])
        return sum(self._size(root, length) for root in alive)

    def _size(self, root: fx.Node, length: int) -> int:
        if (root, length) not in self.sizes:
            self.sizes[root, length] = _bytes(root, length)
        return self.sizes[root, length]

    def of_all(self, node: fx.Node, lengths: Sequence[int]) -> int:
        """`before` of all samples together."""
        return sum(n * self.before(node, length) for length, n in Counter(lengths).items())

    def piece(self, nodes: Sequence[fx.Node], lengths: Sequence[int]) -> int:
        """The most that is held while `nodes` run on one sample after the other."""
        if not nodes:
            return 0
        longest = max(lengths)
        after = self.nodes[self.order[nodes[-1]] + 1]
        start, end = self.of_all(nodes[0], lengths), self.of_all(after, lengths)
        most = 0
        for node in nodes:
            made = _bytes(node, longest) if self.root[node] is node else 0
            most = max(most, self.before(node, longest) + made + _working(node, longest))
        first = start - self.before(nodes[0], longest)
        last = end - self.before(after, longest)
        return max(first, last) + most


def _viewed(node: fx.Node) -> fx.Node | None:
    """The value whose memory `node` shares."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    is_item = getattr(node.target, "__name__", "") == "getitem"
    alias = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.all_input_nodes[0] if alias or is_item else None


def _bytes(node: fx.Node, tokens: int) -> int:
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return sum(_tensor_bytes(part, tokens) for part in parts if isinstance(part, torch.Tensor))


def _tensor_bytes(value: torch.Tensor, tokens: int) -> int:
    sizes = [size if isinstance(size, int) else _size(size, tokens) for size in value.shape]
    return math.prod(sizes) * value.dtype.itemsize


def _size(size: Any, tokens: int) -> int:
    """A symbolic size, which can only be made of the number of tokens."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, tokens)))


def _working(node: fx.Node, tokens: int) -> int:
    """Bytes an operator of ours takes and frees again: float32 copies, and attention's scores."""
    name = smelt_name(node)
    if name == "attention":
        heads = int(node.meta["val"].shape[1])
        return 3 * 4 * heads * tokens * tokens
    value = node.meta.get("val")
    if name not in _WIDE or not isinstance(value, torch.Tensor):
        return 0
    return _WIDE[name] * 4 * _bytes(node, tokens) // value.dtype.itemsize


def _made(program: Program, nodes: Iterable[fx.Node], chosen: set[fx.Node]) -> int:
    """Bytes of the weights `nodes` read that the plan makes, and does not only load.

    chosen: linears and layers of experts that go on with something else.
    """
    producers = program.weights.producers()
    names = {
        name
        for node in nodes
        for used in node.all_input_nodes
        if (name := program.weight_name(used)) is not None
        and not (node in chosen and used in (node.args[1], *node.args[3:5]))
    }
    made = [name for name in names if producers[name].op != "load"]
    return sum(program.weights.specs[name].nbytes for name in made)


def _nodes(station: Group | Experts) -> list[fx.Node]:
    if isinstance(station, Experts):
        return [station.node]
    return [linear.node for linear in station.linears]


def _linears(station: Group | Experts) -> list[Linear]:
    """The matrices of a station, searched one after the other."""
    if not isinstance(station, Experts):
        return list(station.linears)
    return [station.matrix(name, e) for e in range(station.count) for name in MATRICES]


def _routed(experts: Experts, tokens: int) -> int:
    """Bytes of a layer's tokens side by side, of those that one expert gets, and of what its first
    matrix makes of some of them. Few experts get more than twice their share."""
    x, index = experts.node.all_input_nodes[:2]
    together = _bytes(x, tokens) + _bytes(index, tokens)
    share = min(1.0, 2 * index.meta["val"].shape[-1] / experts.count)
    mine = int(share * tokens)
    return together + _bytes(x, mine) + 4 * min(mine, EXPERT_ROWS) * 6 * experts.width


def _drift(station: Group | Experts) -> int:
    """Bytes of what is kept of the way between the two models; experts are searched without."""
    if isinstance(station, Experts):
        return 0
    linear = station.linears[0]
    return 4 * linear.k * (linear.k + (linear.n if residual(station) is not None else 0))


def _search(program: Program, linear: Linear, method: Needs, rows: int, longest: int) -> int:
    """Bytes of one linear's statistics and of the search's own working memory."""
    k, groups = linear.k, linear.scheme.groups(linear.k)
    gram = 4 * k * (k if method.whole_gram else k // groups)
    observing = gram + 3 * 4 * longest * k
    n = min(row_step(k), linear.n)
    reading = 4 * rows * (_INPUTS * k + _OUTPUTS * n)
    matrix = 4 * k * k if method.matrices else 0
    searching = _chunk([linear], _copies(program, linear, method)) + reading + matrix
    inverting = int(method.matrices * matrix)
    return max(observing, gram + 4 * rows * k + max(inverting, searching))


def _copies(program: Program, linear: Linear, method: Needs) -> float:
    """float32 copies of a chunk; a model of another dtype needs one more."""
    return method.copies + (0 if _dtype(program, linear) is torch.float32 else 1.2)


def _dtype(program: Program, linear: Linear) -> torch.dtype:
    """Of the weight; an expert's, which no plan names, is its layer's."""
    value = linear.node.meta["val"]
    spec = program.weights.specs.get(linear.weight)
    dtype = spec.dtype if spec is not None else value.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _chunk(linears: Sequence[Linear], copies: float = 3.5) -> int:
    """Bytes of `copies` float32 copies of the largest chunk."""
    sizes = [min(row_step(linear.k), linear.n) * linear.k for linear in linears]
    return int(copies * 4 * max(sizes))


def _goes_on(program: Program, linear: Linear, method: Needs) -> int:
    size = _dtype(program, linear).itemsize
    wide = method.wide and linear.weight in program.weights.specs
    return linear.parameters * (4 if wide else size)


def _found(linear: Linear, method: Needs) -> int:
    """What is kept of a linear until the end: packed weights, where they are values."""
    return packed_bytes(linear.n, linear.k, linear.scheme) if method.matrices else 0
