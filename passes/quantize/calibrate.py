"""Calibration: run the graph over text, one group of linears at a time.

The graph is cut just before the first linear of each group. All samples go through one piece
together, so that only the weights of that piece are in memory; what later pieces read (the residual
stream, mostly) is kept for every sample, everything else is dropped. At a cut the inputs of the
group's linears are streamed into `Statistics`, a `Method` searches, and the linears go on with what
they will be: dequantized weights, so that later layers see the error of earlier ones.

What is found goes into a journal as it is found. A calibration that is run again with the same
journal reads it there, and only runs the graph.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import fx

from smelt.passes.program import Program, Role
from smelt.passes.rewrite import graph_text
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import SmeltError

from .groups import Group
from .spec import QuantSpec

Progress = Callable[[str, int, int], None]
# What a linear goes on with: a weight, or a function of (x, bias) where the input is quantized too.
Replacement = torch.Tensor | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
# What was found for a linear: its weight's planned name -> the fields of the method's dataclass.
Journal = MutableMapping[str, dict[str, Any]]
# The journal of a calibration, by a digest of the program, the samples and the method's settings.
OpenJournal = Callable[[str], Journal]
Found = TypeVar("Found")

# Widest group whose products are summed: a whole row of a large model would be gigabytes.
MAX_GRAM = 2048


@dataclass
class Statistics:
    """What is kept of the inputs of a group's linears: never the inputs themselves.

    total [K] float64: sum of |x| over tokens. largest [K]: max |x|. gram [G, g, g]: sum of x x^T
    over all tokens within each of the G quantization groups of K (None where g is too wide). rows
    [R, K] float32: a fixed random sample of tokens, R bounded, the same tokens for every group.
    """

    total: torch.Tensor
    largest: torch.Tensor
    gram: torch.Tensor | None
    tokens: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, k: int, groups: int, whole: bool = False) -> Statistics:
        """whole: keep the products of all features with each other, as one group however wide."""
        if whole:
            return cls(torch.zeros(k, dtype=torch.float64), torch.zeros(k), torch.zeros(1, k, k))
        width = k // groups
        gram = torch.zeros(groups, width, width) if width <= MAX_GRAM else None
        return cls(torch.zeros(k, dtype=torch.float64), torch.zeros(k), gram)

    def update(self, x: torch.Tensor, keep: torch.Tensor) -> None:
        """Add one sample's tokens. x [..., K]; keep int64: which of them go into `rows`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.abs()
        self.total += size.sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.tokens += rows.shape[0]
        if self.gram is not None:
            blocks = rows.unflatten(1, (self.gram.shape[0], -1)).transpose(0, 1)
            self.gram += blocks.transpose(1, 2) @ blocks
        self.kept.append(rows[keep].clone())

    @property
    def mean(self) -> torch.Tensor:
        """Mean |x| of each feature, float32 [K]."""
        return (self.total / max(self.tokens, 1)).float()

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self.kept)


@dataclass(frozen=True)
class CalibrationOptions:
    """What every calibrated method is given.

    spec: what to quantize; samples: token ids of calibration sequences; source: the checkpoint.
    max_rows: tokens on which searches measure output errors. progress(name, done, total). journal:
    where results are kept as they are found, and read when the same calibration runs again.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    samples: Sequence[Sequence[int]] = ()
    source: TensorSource | None = None
    max_rows: int = 512
    seed: int = 0
    progress: Progress | None = None
    journal: OpenJournal | None = None


class Method(Protocol[Found]):
    """What a quantization method does with a group of linears over one input.

    found: its dataclass for one linear, whose fields are tensors, numbers, strings and None.
    whole_gram: whether its statistics hold the products of all features, [1, K, K]. Its repr tells
    its settings.
    """

    @property
    def found(self) -> Callable[..., Found]: ...

    @property
    def whole_gram(self) -> bool: ...

    def search(
        self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
    ) -> Sequence[Found]:
        """Look for the best there is, one a linear. weights: [N, K] in the model's dtype."""
        ...

    def go_on(
        self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[Found]
    ) -> Sequence[Replacement]:
        """What the group's linears compute with from then on."""
        ...


def calibrate(
    program: Program,
    groups: Sequence[Group],
    method: Method[Found],
    options: CalibrationOptions,
) -> dict[str, Found]:
    """Run the samples through the program, search at every group in order; found by weight name.

    Samples are cut at the model's context. Deterministic for given samples and seed. Raises
    SmeltError naming the group for activations that are NaN or infinite.
    """
    assert options.source is not None
    limit = program.facts.max_position
    samples = [sample[:limit] for sample in options.samples]
    keep = _sampled_rows([len(sample) for sample in samples], options.max_rows, options.seed)
    run = _Run(program, options.source, groups, samples)
    report = options.progress or (lambda *_: None)
    journal = options.journal(_digest(program, method, options)) if options.journal else None
    everything: dict[str, Found] = {}
    for i, (nodes, group) in enumerate(run.pieces()):
        run.advance(nodes)
        report(group.name, i, len(groups))
        found = _recalled(group, method, journal)
        weights = run.weights(group)
        if found is None:
            statistics = run.observe(group, keep, method.whole_gram)
            found = method.search(group, weights, statistics)
            del statistics
            _note(group, found, journal)
        names = [linear.weight for linear in group.linears]
        everything.update(zip(names, found, strict=True))
        nodes_of = [linear.node for linear in group.linears]
        run.chosen.update(zip(nodes_of, method.go_on(group, weights, found), strict=True))
        del weights
    report("calibrated", len(groups), len(groups))
    return everything


def _digest(program: Program, method: Method[Found], options: CalibrationOptions) -> str:
    """sha256 over all that the results of a calibration depend on, but for the checkpoint."""
    h = hashlib.sha256(graph_text(program.graph).encode())
    h.update(program.weights.digest().encode())
    settings = [repr(method), options.spec.to_json(), options.max_rows, options.seed]
    h.update(json.dumps([*settings, [list(sample) for sample in options.samples]]).encode())
    return h.hexdigest()


def _recalled(
    group: Group, method: Method[Found], journal: Journal | None
) -> Sequence[Found] | None:
    """What the journal holds of a group; None unless it has all of it."""
    if journal is None:
        return None
    kept = [journal.get(linear.weight) for linear in group.linears]
    if any(fields is None for fields in kept):
        return None
    return [method.found(**fields) for fields in kept if fields is not None]


def _note(group: Group, found: Sequence[Any], journal: Journal | None) -> None:
    if journal is not None:
        for linear, each in zip(group.linears, found, strict=True):
            journal[linear.weight] = dict(vars(each))


def _sampled_rows(lengths: Sequence[int], limit: int, seed: int) -> list[torch.Tensor]:
    """For each sample the tokens to keep: `limit` of all, chosen once."""
    everything = [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    if len(everything) > limit:
        everything = sorted(random.Random(seed).sample(everything, limit))
    kept: list[list[int]] = [[] for _ in lengths]
    for i, t in everything:
        kept[i].append(t)
    return [torch.tensor(tokens, dtype=torch.int64) for tokens in kept]


class _Run:
    """The live values of every sample while the graph runs piece by piece."""

    def __init__(
        self,
        program: Program,
        source: TensorSource,
        groups: Sequence[Group],
        samples: Sequence[Sequence[int]],
    ) -> None:
        self.program = program
        self.source = source
        self.groups = groups
        self.chosen: dict[fx.Node, Replacement] = {}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.last_use = {
            node: max((self.order[user] for user in node.users), default=-1) for node in self.order
        }
        self.live: list[dict[fx.Node, Any]] = [self._inputs(sample) for sample in samples]

    def _inputs(self, sample: Sequence[int]) -> dict[fx.Node, Any]:
        ids = torch.tensor(sample, dtype=torch.int64)
        given = {"input_ids": ids, "position_ids": torch.arange(len(ids))}
        values: dict[fx.Node, Any] = {}
        for node in self.program.placeholders():
            entry = self.program.inputs[node.name]
            if entry.role is Role.WEIGHT:
                continue
            if entry.name not in given:
                raise SmeltError(
                    f"calibration runs whole sequences, and this program also wants {entry.name}; "
                    "quantize before the cache and the logits rows go in"
                )
            values[node] = given[entry.name]
        return values

    def pieces(self) -> Iterable[tuple[list[fx.Node], Group]]:
        """(the calls up to a group, the group), in graph order; nothing after the last is run."""
        calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
        start = 0
        for group in self.groups:
            stop = calls.index(group.linears[0].node)
            yield calls[start:stop], group
            start = stop

    def advance(self, nodes: Sequence[fx.Node]) -> None:
        """Run `nodes` on every sample, then drop what nothing later reads."""
        if not nodes:
            return
        weights = self._weights_of(nodes)
        for values in self.live:
            for node in nodes:
                values[node] = self._call(node, values, weights)
                for used in {node, *node.all_input_nodes}:
                    if self.last_use[used] <= self.order[node]:
                        values.pop(used, None)
        for node in nodes:
            self.chosen.pop(node, None)

    def _weights_of(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, torch.Tensor]:
        """The weights `nodes` read, without those a method has replaced."""
        names: dict[str, list[fx.Node]] = {}
        for node in nodes:
            for used in node.all_input_nodes:
                name = self.program.weight_name(used)
                if name is not None and not (node in self.chosen and used is node.args[1]):
                    names.setdefault(name, []).append(used)
        made = self.program.weights.materialize(names, self.source)
        return {node: value for name, value in made for node in names[name]}

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], weights: dict[fx.Node, Any]) -> Any:
        chosen = self.chosen.get(node)

        def value(used: fx.Node) -> Any:
            if chosen is not None and used is node.args[1]:
                return chosen
            return weights[used] if used in weights else values[used]

        with torch.no_grad():
            args: Any = fx.node.map_arg(node.args, value)
            kwargs: Any = fx.node.map_arg(node.kwargs, value)
            if chosen is not None and not isinstance(chosen, torch.Tensor):
                return chosen(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def observe(self, group: Group, keep: Sequence[torch.Tensor], whole: bool) -> Statistics:
        first = group.linears[0]
        statistics = Statistics.empty(first.k, first.scheme.groups(first.k), whole)
        source = group.linears[0].node.args[0]
        for values, rows in zip(self.live, keep, strict=True):
            statistics.update(values[source], rows)  # type: ignore[index]
        if not torch.isfinite(statistics.total).all():
            raise SmeltError(
                f"{group.name}: calibration activations are NaN or infinite; "
                "is the checkpoint whole, and does the model run in this dtype?"
            )
        return statistics

    def weights(self, group: Group) -> list[torch.Tensor]:
        """The group's weights as the plan makes them, [N, K] in the model's dtype."""
        names = [linear.weight for linear in group.linears]
        made = dict(self.program.weights.materialize(names, self.source))
        return [made[name] for name in names]
