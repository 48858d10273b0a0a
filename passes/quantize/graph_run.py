"""The graph run piece by piece over several samples: one piece's weights in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from smelt.passes.program import Program, Role
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import SmeltError

from .experts import Experts
from .groups import Group

# What a linear goes on with: a weight, or a function of (x, bias) where the input is quantized too.
Replacement = torch.Tensor | Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
# Where the graph is cut: before linears over one input, and before a layer of experts, which goes
# on with two weights.
Station = Group | Experts


class GraphRun:
    """The live values of every sample while the graph runs.

    The graph is cut just before each station. `chosen`: what linears and experts that come next go
    on with in place of their weights.
    """

    def __init__(
        self,
        program: Program,
        source: TensorSource,
        stations: Sequence[Station],
        samples: Sequence[Sequence[int]],
    ) -> None:
        self.program = program
        self.source = source
        self.chosen: dict[fx.Node, Replacement | tuple[torch.Tensor, torch.Tensor]] = {}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.stations = sorted(stations, key=lambda station: self.order[station.node])
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

    def pieces(self) -> Iterable[tuple[list[fx.Node], Station]]:
        """(the calls up to a station, the station), in order; nothing after the last is run."""
        calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
        start = 0
        for station in self.stations:
            stop = calls.index(station.node)
            yield calls[start:stop], station
            start = stop

    def rest(self, index: int) -> Iterable[list[fx.Node]]:
        """The calls from station `index` to the end of the graph, cut as `pieces` cuts them."""
        calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
        cuts = [calls.index(station.node) for station in self.stations[index:]]
        for start, stop in zip(cuts, [*cuts[1:], len(calls)], strict=True):
            yield calls[start:stop]

    def fork(self) -> GraphRun:
        """A run of its own from here on: what it computes is not seen by this one."""
        other = copy.copy(self)
        other.chosen = dict(self.chosen)
        other.live = [dict(values) for values in self.live]
        return other

    def results(self) -> list[torch.Tensor]:
        """The graph's result of every sample, once all calls have run."""
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        (node,) = output.all_input_nodes
        return [values[node] for values in self.live]

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

    def _given(self, node: fx.Node) -> dict[Any, Any]:
        """What stands in for the weights of `node` that a method replaced."""
        chosen = self.chosen.get(node)
        if isinstance(chosen, tuple):
            return dict(zip(node.args[3:5], chosen, strict=True))
        return {} if chosen is None else {node.args[1]: chosen}

    def _weights_of(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, torch.Tensor]:
        """The weights `nodes` read, without those a method has replaced."""
        names: dict[str, list[fx.Node]] = {}
        for node in nodes:
            for used in node.all_input_nodes:
                name = self.program.weight_name(used)
                if name is not None and used not in self._given(node):
                    names.setdefault(name, []).append(used)
        made = self.program.weights.materialize(names, self.source)
        return {node: value for name, value in made for node in names[name]}

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], weights: dict[fx.Node, Any]) -> Any:
        given = self._given(node)

        def value(used: fx.Node) -> Any:
            if used in given:
                return given[used]
            return weights[used] if used in weights else values[used]

        with torch.no_grad():
            args: Any = fx.node.map_arg(node.args, value)
            kwargs: Any = fx.node.map_arg(node.kwargs, value)
            if given and not isinstance(args[1], torch.Tensor):
                return args[1](args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def weights(self, station: Station) -> list[torch.Tensor]:
        """Its weights as the plan makes them, [N, K] or [E, N, K] in the model's dtype."""
        made = dict(self.program.weights.materialize(station.weights, self.source))
        return [made[name] for name in station.weights]
