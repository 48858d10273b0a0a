"""Calibration: run the graph over text, one group of linears at a time.

The graph is cut just before the first linear of each group. All samples go through one piece
together, so that only the weights of that piece are in memory; what later pieces read (the residual
stream, mostly) is kept for every sample, everything else is dropped. At a cut the inputs of the
group's linears are streamed into `Statistics` and a method chooses the weights to go on with:
dequantized ones, so that later layers see the error of earlier ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from smelt.passes.program import Program, Role
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import SmeltError

from .groups import Group

Progress = Callable[[str, int, int], None]
# What a linear goes on with: a weight, or a function of (x, bias) where the input is quantized too.
Replacement = torch.Tensor | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Choose = Callable[[Group, list[torch.Tensor], "Statistics"], Sequence[Replacement]]


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


def calibrate(
    program: Program,
    groups: Sequence[Group],
    samples: Sequence[Sequence[int]],
    source: TensorSource,
    choose: Choose,
    max_rows: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
    whole_gram: bool = False,
) -> None:
    """Run `samples` (token ids) through the program and call `choose` at every group, in order.

    choose(group, weights [N, K] of its linears, statistics) returns what their linears go on with.
    whole_gram: the statistics hold the products of all features, [1, K, K]. Samples are cut at the
    model's context. Deterministic for given samples and seed. Raises SmeltError naming the group
    for activations that are NaN or infinite.
    """
    limit = program.facts.max_position
    samples = [sample[:limit] for sample in samples]
    keep = _sampled_rows([len(sample) for sample in samples], max_rows, seed)
    run = _Run(program, source, groups, samples)
    for i, (nodes, group) in enumerate(run.pieces()):
        run.advance(nodes)
        if progress is not None:
            progress(group.name, i, len(groups))
        statistics = run.observe(group, keep, whole_gram)
        weights = run.weights(group)
        run.chosen.update(
            (linear.node, weight)
            for linear, weight in zip(
                group.linears, choose(group, weights, statistics), strict=True
            )
        )
    if progress is not None:
        progress("calibrated", len(groups), len(groups))


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
