"""How a method quantizes layers of experts: by formula, or by the text that each expert sees.

In calibration a layer of experts is a place of its own. Its tokens are handed out to the experts as
the router chose, and one expert after the other is searched on those it got: first gate_up, then
down on what the quantized gate_up makes of them. Beside the layer itself, the statistics of one
matrix of one expert are all that is in memory.
"""

from __future__ import annotations

import statistics as numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx

from smelt.passes.program import Program
from smelt.runtime.errors import SmeltError
from smelt.runtime.ops.gated_activation import activate

from .calibrate import CalibrationOptions, Find, Statistics
from .calibration_memory import EXPERT_ROWS
from .experts import MATRICES, Experts, round_matrix, to_quantized
from .formats import check_finite
from .groups import Group
from .linears import Linear
from .verdict import Verdict


def least_tokens(k: int) -> int:
    """Tokens under which an expert is rounded: a quarter of the width K of its input, at least 32.

    The statistics of n tokens have rank n at most. From a quarter of the width on, what they say of
    the directions seen outweighs what has to be guessed of the others; with fewer, a search mostly
    fits the few tokens there were.
    """
    return max(32, k // 4)


class ExpertMethod(Protocol):
    """What a calibrated method adds for experts to what it does with a linear."""

    @property
    def whole_gram(self) -> bool: ...

    def expert_groups(self, gate_up: Linear, down: Linear) -> tuple[Group, Group]:
        """An expert's matrices as groups of one linear, with what a scale could be folded into."""
        ...

    def rounded(self, linear: Linear, weight: torch.Tensor) -> Any:
        """What is found for a matrix that is only rounded to nearest."""
        ...

    def put_experts(
        self, program: Program, experts: Experts, found: Mapping[str, Sequence[Any]]
    ) -> fx.Node:
        """Replace the layer by its operator over what was found, by matrix for each expert."""
        ...


@dataclass
class _Layer:
    """What calibration said of a layer. found: by matrix, of each expert."""

    tokens: list[int]
    least: int
    rounded: list[int] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    found: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in MATRICES})


class ExpertLayers:
    """The layers of experts of a program and one method's run over them.

    name: the method's, for the verdicts. method: how one expert is searched; None rounds every
    expert. remark: part of each verdict.
    """

    def __init__(
        self,
        program: Program,
        found: Sequence[Experts],
        name: str,
        method: ExpertMethod | None = None,
        options: CalibrationOptions | None = None,
        remark: str | None = None,
    ) -> None:
        self.found, self._name = found, name
        self._program, self._method = program, method
        self._options = options or CalibrationOptions()
        self._remark = remark
        self._layers: dict[str, _Layer] = {}

    def search(
        self,
        experts: Experts,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: Sequence[torch.Tensor],
        find: Find,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize a layer on its calibration tokens; gate_up and down that it goes on with.

        x [T, K] and index [T, top_k] of all samples; weights [E, 2I, K] and [E, K, I]. Raises
        SmeltError naming layer and expert for activations, weights or scales that are not finite.
        """
        if not torch.isfinite(x).all():
            raise SmeltError(
                f"{experts.layer}: calibration activations are NaN or infinite; "
                "is the checkpoint whole, and does the model run in this dtype?"
            )
        tokens = torch.bincount(index.flatten(), minlength=experts.count).tolist()
        asked = self._options.min_expert_tokens
        layer = _Layer(tokens, least_tokens(experts.k) if asked is None else max(1, asked))
        self._layers[experts.layer] = layer
        going_on = torch.empty_like(weights[0]), torch.empty_like(weights[1])
        for e in range(experts.count):
            linears = [experts.matrix(name, e) for name in MATRICES]
            mine = [weight[e] for weight in weights]
            for linear, weight in zip(linears, mine, strict=True):
                check_finite(weight, linear.layer)
            rows = x[(index == e).any(1)]
            dense = self._expert(layer, e, linears, mine, rows, experts.kind, find)
            for value, to in zip(dense, going_on, strict=True):
                to[e] = value
        return going_on

    def _expert(
        self,
        layer: _Layer,
        e: int,
        linears: Sequence[Linear],
        weights: Sequence[torch.Tensor],
        rows: torch.Tensor,
        kind: str,
        find: Find,
    ) -> list[torch.Tensor]:
        """Search one expert or round it; its weights as the runtime will have them."""
        if self._method is None:
            return [round_matrix(linear, w) for linear, w in zip(linears, weights, strict=True)]
        if layer.tokens[e] < layer.least:
            layer.rounded.append(e)
            for name, linear, weight in zip(MATRICES, linears, weights, strict=True):
                layer.found[name].append(self._method.rounded(linear, weight))
            return [round_matrix(linear, w) for linear, w in zip(linears, weights, strict=True)]
        dense: list[torch.Tensor] = []
        groups = self._method.expert_groups(linears[0], linears[1])
        for name, group, weight in zip(MATRICES, groups, weights, strict=True):
            through = partial(_hidden, dense[0].float(), kind) if dense else None
            look = partial(self._look, group.linears[0], rows, through)
            (found,), (value,) = find(group, [weight], look)
            assert isinstance(value, torch.Tensor)
            _check(value, group.linears[0])
            dense.append(value)
            layer.found[name].append(found)
            layer.errors.append((found.error_rtn, found.error))
        return dense

    def _look(
        self,
        linear: Linear,
        rows: torch.Tensor,
        through: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> Statistics:
        """Of what a matrix reads: an expert's rows, or what its other matrix makes of them."""
        assert self._method is not None
        groups = linear.scheme.groups(linear.k)
        found = Statistics.empty(linear.k, groups, self._method.whole_gram)
        generator = torch.Generator().manual_seed(self._options.seed)
        kept = torch.randperm(len(rows), generator=generator)[: self._options.max_rows]
        for start in range(0, len(rows), EXPERT_ROWS):
            part = rows[start : start + EXPERT_ROWS].float()
            here = kept[(kept >= start) & (kept < start + EXPERT_ROWS)] - start
            found.update(part if through is None else through(part), here.sort().values)
        return found

    def rewrite(self, experts: Experts) -> Verdict:
        """Replace a layer by its quantized operator; what to report of it."""
        layer = self._layers.pop(experts.layer, None)
        if layer is not None and self._method is not None:
            self._method.put_experts(self._program, experts, layer.found)
        else:
            to_quantized(self._program, experts)
        return self._verdict(experts, layer)

    def _verdict(self, experts: Experts, layer: _Layer | None) -> Verdict:
        errors = layer.errors if layer is not None else []
        notes = [self._remark, _group_note(experts)]
        if layer is not None and layer.rounded:
            listed = ", ".join(map(str, layer.rounded))
            notes.append(
                f"experts {listed} saw fewer than {layer.least} tokens: rounded to nearest"
            )
        fits = experts.scheme.format == "fp8" or experts.scheme.fits(experts.k)
        return Verdict(
            experts.layer,
            self._name,
            experts.scheme.format,
            experts.scheme.group_size if fits else 0,
            experts.parameters,
            error_rtn=numbers.fmean(before for before, _ in errors) if errors else None,
            error=numbers.fmean(after for _, after in errors) if errors else None,
            reason="; ".join(note for note in notes if note) or None,
            tokens_per_expert=layer.tokens if layer is not None else None,
            experts_rounded=(layer.rounded or None) if layer is not None else None,
        )


def _hidden(gate_up: torch.Tensor, kind: str, rows: torch.Tensor) -> torch.Tensor:
    """What down reads: gate_up [2I, K], rows [R, K] -> [R, I]."""
    gate, up = (rows @ gate_up.T).chunk(2, -1)
    return activate(gate, kind) * up


def _check(dense: torch.Tensor, linear: Linear) -> None:
    if not torch.isfinite(dense).all():
        raise SmeltError(
            f"{linear.layer}: a scale found for it is NaN or infinite; "
            "is the calibration text like what the model is meant for?"
        )


def _group_note(experts: Experts) -> str | None:
    """The reason to record when the group size does not divide a matrix's features."""
    if experts.scheme.format == "fp8":
        return None
    sizes = {"gate_up": experts.k, "down": experts.width}
    odd = [f"{n} has K = {k}" for n, k in sizes.items() if not experts.scheme.fits(k)]
    if not odd:
        return None
    return f"{', '.join(odd)}, not divisible by {experts.scheme.group_size}: one group a row"
