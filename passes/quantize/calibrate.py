"""Calibration: run the graph over text, one group of linears or layer of experts at a time.

The graph is cut just before the first linear of each group, and before each layer of experts. All
samples go through one piece together, so that only the weights of that piece are in memory; what
later pieces read (the residual stream, mostly) is kept for every sample, everything else is
dropped. At a cut the inputs of the group's linears are streamed into `Statistics`, a `Method`
searches, and the linears go on with what they will be: dequantized weights, so that later layers
see the error of earlier ones. For a method that asks for it the original runs beside, and the
statistics tell how far the two have come apart (`drift.py`).

What is found goes into a journal as it is found. A calibration that is run again with the same
journal reads it there, and only runs the graph.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from smelt.passes.program import Program
from smelt.passes.rewrite import graph_text
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import SmeltError

from .calibration_memory import Memory, Needs, plan_memory
from .drift import Drift, observe_drift
from .experts import Experts
from .graph_run import GraphRun, Replacement
from .groups import Group
from .spec import QuantSpec

Progress = Callable[[str, int, int], None]
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
    drift: against the original model, where that ran beside.
    """

    total: torch.Tensor
    largest: torch.Tensor
    gram: torch.Tensor | None
    tokens: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)
    drift: Drift | None = None

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
    planned: told how much memory it will take, before it begins.
    min_expert_tokens: an expert that saw fewer is rounded; None: `expert_layers.least_tokens`.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    samples: Sequence[Sequence[int]] = ()
    source: TensorSource | None = None
    max_rows: int = 512
    seed: int = 0
    progress: Progress | None = None
    journal: OpenJournal | None = None
    planned: Callable[[Memory], None] | None = None
    min_expert_tokens: int | None = None


class Method(Needs, Protocol[Found]):
    """What a quantization method does with a group of linears over one input.

    found: its dataclass for one linear, whose fields are tensors, numbers, strings and None.
    whole_gram: whether its statistics hold the products of all features, [1, K, K]. original:
    whether the original model runs beside, for their drift. Its repr tells its settings.
    """

    @property
    def found(self) -> Callable[..., Found]: ...

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


# (group, weights, what looks at the inputs) -> (found, what the linears go on with).
Find = Callable[
    [Group, Sequence[torch.Tensor], Callable[[], Statistics]],
    tuple[Sequence[Any], Sequence[Replacement]],
]


class ExpertSearch(Protocol):
    """What a method does with layers of experts; `expert_layers.ExpertLayers`."""

    @property
    def found(self) -> Sequence[Experts]: ...

    def search(
        self,
        experts: Experts,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: Sequence[torch.Tensor],
        find: Find,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Search a layer's experts on their tokens; gate_up and down that it goes on with."""
        ...


def calibrate(
    program: Program,
    groups: Sequence[Group],
    method: Method[Found],
    options: CalibrationOptions,
    experts: ExpertSearch | None = None,
) -> dict[str, Found]:
    """Run the samples through the program, search at every group in order; found by weight name.

    experts: the layers of experts, each searched where it stands. Samples are cut at the model's
    context. Deterministic for given samples and seed. Raises SmeltError naming the group for
    activations that are NaN or infinite.
    """
    assert options.source is not None
    limit = program.facts.max_position
    samples = [sample[:limit] for sample in options.samples]
    keep = sampled_rows([len(sample) for sample in samples], options.max_rows, options.seed)
    layers = [e for e in experts.found if e.reason is None] if experts is not None else []
    run = GraphRun(program, options.source, [*groups, *layers], samples)
    original = run.fork() if method.original else None
    if options.planned is not None and run.stations:
        lengths = [len(sample) for sample in samples]
        options.planned(plan_memory(program, run.stations, lengths, method, options.max_rows))
    report = options.progress or (lambda *_: None)
    journal = options.journal(digest(program, repr(method), options)) if options.journal else None
    everything: dict[str, Found] = {}

    def find(
        group: Group, weights: Sequence[torch.Tensor], look: Callable[[], Statistics]
    ) -> tuple[Sequence[Found], Sequence[Replacement]]:
        found = _recalled(group, method, journal)
        if found is None:
            found = method.search(group, weights, look())
            _note(group, found, journal)
        everything.update(zip(group.weights, found, strict=True))
        return found, method.go_on(group, weights, found)

    for i, (nodes, station) in enumerate(run.pieces()):
        run.advance(nodes)
        if original is not None:
            original.advance(nodes)
        report(station.name, i, len(run.stations))
        weights = run.weights(station)
        if isinstance(station, Experts):
            assert experts is not None
            x, index = (
                torch.cat([values[arg] for values in run.live])  # type: ignore[index]
                for arg in station.node.args[:2]
            )
            run.chosen[station.node] = experts.search(station, x, index, weights, find)
            del x, index, weights
            continue
        look = partial(observe, run, station, keep, method.whole_gram, original)
        _, go_on = find(station, weights, look)
        nodes_of = [linear.node for linear in station.linears]
        run.chosen.update(zip(nodes_of, go_on, strict=True))
        del weights, go_on
    report("calibrated", len(run.stations), len(run.stations))
    return everything


def digest(program: Program, settings: str, options: CalibrationOptions) -> str:
    """sha256 over all that the results of a calibration depend on, but for the checkpoint."""
    h = hashlib.sha256(graph_text(program.graph).encode())
    h.update(program.weights.digest().encode())
    others = [settings, options.spec.to_json(), options.max_rows, options.seed]
    others.append(options.min_expert_tokens)
    h.update(json.dumps([*others, [list(sample) for sample in options.samples]]).encode())
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


def sampled_rows(lengths: Sequence[int], limit: int, seed: int) -> list[torch.Tensor]:
    """For each sample the tokens to keep: `limit` of all, chosen once."""
    everything = [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    if len(everything) > limit:
        everything = sorted(random.Random(seed).sample(everything, limit))
    kept: list[list[int]] = [[] for _ in lengths]
    for i, t in everything:
        kept[i].append(t)
    return [torch.tensor(tokens, dtype=torch.int64) for tokens in kept]


def observe(
    run: GraphRun,
    group: Group,
    keep: Sequence[torch.Tensor],
    whole: bool,
    original: GraphRun | None = None,
) -> Statistics:
    """What streams into a group now. keep: the tokens of each sample that are kept as rows.
    original: the unquantized model, run to the same place."""
    first = group.linears[0]
    statistics = Statistics.empty(first.k, first.scheme.groups(first.k), whole)
    source = group.node.args[0]
    for values, rows in zip(run.live, keep, strict=True):
        statistics.update(values[source], rows)  # type: ignore[index]
    if not torch.isfinite(statistics.total).all():
        raise SmeltError(
            f"{group.name}: calibration activations are NaN or infinite; "
            "is the checkpoint whole, and does the model run in this dtype?"
        )
    if original is not None:
        statistics.drift = observe_drift(run, original, group)
    return statistics
