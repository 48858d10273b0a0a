"""The sensitivity table: what quantizing one group of layers does to the model's own predictions.

One group at a time is rounded to a probe format and the graph is run on to its end, everything else
as it is: the divergence KL(original || changed) of the predicted tokens is that group's
sensitivity. For other formats it is scaled by their output error on the group's own inputs: a
perturbation of twice the energy costs, to second order, twice the divergence. So a table takes one
run of the rest of the graph a group, and not one for each format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smelt.passes.program import Program
from smelt.runtime.errors import SmeltError

from .awq_search import output_error
from .calibrate import CalibrationOptions, Journal, Statistics, observe, sampled_rows
from .formats import check_finite, fake_quantize
from .graph_run import GraphRun
from .groups import Group
from .spec import Scheme

PROBE = Scheme("int3", 64)
# Tokens of calibration text the table is measured on: whole samples, at least one.
TOKENS = 2048


@dataclass(frozen=True)
class Sensitivity:
    """kl: nats a token, of the probe. errors float64 [C]: output errors of the candidates on the
    group's inputs, relative to the probe's."""

    kl: float
    errors: torch.Tensor

    def costs(self) -> list[float]:
        """The divergence each candidate is expected to cost."""
        return [self.kl * float(error) for error in self.errors]


def measure(
    program: Program,
    groups: Sequence[Group],
    candidates: Sequence[Scheme],
    options: CalibrationOptions,
    journal: Journal | None = None,
) -> list[Sensitivity]:
    """The table, one entry a group, in graph order. Raises SmeltError for what is not finite."""
    assert options.source is not None
    samples = _some([sample[: program.facts.max_position] for sample in options.samples])
    keep = sampled_rows([len(sample) for sample in samples], options.max_rows, options.seed)
    run = GraphRun(program, options.source, groups, samples)
    report = options.progress or (lambda *_: None)
    original: list[torch.Tensor] = []
    table = []
    for i, (nodes, group) in enumerate(run.pieces()):
        assert isinstance(group, Group)
        run.advance(nodes)
        report(f"sensitivity of {group.name}", i, len(groups))
        if not original:
            original = _predictions(run, i, keep)
        kept = journal.get(_entry(group)) if journal is not None else None
        found = Sensitivity(**kept) if kept else _probe(run, i, original, keep, candidates)
        if journal is not None and kept is None:
            journal[_entry(group)] = dict(vars(found))
        table.append(found)
    return table


def _entry(group: Group) -> str:
    return f"sensitivity of {group.linears[0].weight}"


def _some(samples: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    taken: list[Sequence[int]] = []
    for sample in samples:
        if taken and sum(map(len, taken)) + len(sample) > TOKENS:
            break
        taken.append(sample)
    return taken


def _predictions(run: GraphRun, index: int, keep: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """log p of the kept tokens of each sample, float32 [rows, V], run on from group `index`."""
    branch = run.fork()
    for nodes in branch.rest(index):
        branch.advance(nodes)
    results = zip(branch.results(), keep, strict=True)
    return [logits[rows].float().log_softmax(-1) for logits, rows in results]


def _probe(
    run: GraphRun,
    index: int,
    original: Sequence[torch.Tensor],
    keep: Sequence[torch.Tensor],
    candidates: Sequence[Scheme],
) -> Sensitivity:
    group = run.stations[index]
    assert isinstance(group, Group)
    statistics = observe(run, group, keep, whole=False)
    weights = run.weights(group)
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    probed = 0.0
    branch = run.fork()
    for linear, weight in zip(group.linears, weights, strict=True):
        check_finite(weight, linear.layer)
        changed = fake_quantize(weight, PROBE)
        probed += _lost(statistics, changed - weight)
        branch.chosen[linear.node] = changed.to(weight.dtype)
        for c, scheme in enumerate(candidates):
            errors[c] += _lost(statistics, fake_quantize(weight, scheme) - weight)
    changed_to = _predictions(branch, index, keep)
    pairs = zip(original, changed_to, strict=True)
    total = sum(float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in pairs)
    kl = max(0.0, total / max(1, sum(len(p) for p in original)))
    if not torch.isfinite(errors).all() or kl != kl:
        raise SmeltError(
            f"{group.name}: its sensitivity is not finite; is the checkpoint whole, and does the "
            "model run in this dtype?"
        )
    return Sensitivity(kl, errors / max(probed, 1e-30))


def _lost(statistics: Statistics, difference: torch.Tensor) -> float:
    return float(output_error(statistics.rows, difference.float()).sum())
