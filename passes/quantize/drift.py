"""How far a quantized model has moved from the original, where a group of linears stands.

Both run over the same samples side by side. Rounding a layer for the inputs that it will get, but
towards the outputs that it had in the original, makes up for part of what the layers before it
lost: the asymmetric calibration of GPTAQ (Li et al. 2025, arXiv:2504.02692). Where a linear adds to
a residual stream, what that stream has lost counts as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from smelt.passes.rewrite import is_call, only_user, shape

from .graph_run import GraphRun
from .groups import Group

aten = torch.ops.aten


@dataclass
class Drift:
    """x: inputs of a group's linears, r: the residual stream, in the original model; x', r': now.

    inputs float32 [K, K]: sum of (x - x') x'^T over all tokens. residual float32 [N, K]: sum of
    (r - r') x'^T; None where the group does not add to a residual stream.
    """

    inputs: torch.Tensor
    residual: torch.Tensor | None = None

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """sum (y - y') x'^T of the outputs `rows`: weight float32 [n, K] -> [n, K].

        y: what the original has after them; y': what there would be with the same weight now.
        """
        missing = weight @ self.inputs
        return missing if self.residual is None else missing.add_(self.residual[rows])


def observe_drift(run: GraphRun, original: GraphRun, group: Group) -> Drift:
    """What is missing where both runs stand just before `group`."""
    source = group.node.args[0]
    assert isinstance(source, fx.Node)
    stream = residual(group)
    k, n = group.linears[0].k, group.linears[0].n
    found = Drift(torch.zeros(k, k))
    if stream is not None and all(stream in values for values in run.live):
        found.residual = torch.zeros(n, k)
    for now, before in zip(run.live, original.live, strict=True):
        x = _rows(now[source])
        found.inputs.addmm_((_rows(before[source]) - x).T, x)
        if stream is not None and found.residual is not None:
            found.residual.addmm_((_rows(before[stream]) - _rows(now[stream])).T, x)
    return found


def residual(group: Group) -> fx.Node | None:
    """The value that a group's only linear is added to as it is; None where there is none."""
    node = group.node
    user = only_user(node)
    if len(group.linears) > 1 or user is None:
        return None
    if not is_call(user, aten.add.Tensor) or len(user.args) != 2 or user.kwargs:
        return None
    others = [arg for arg in user.args if arg is not node]
    other = others[0] if len(others) == 1 else None
    return other if isinstance(other, fx.Node) and shape(other) == shape(node) else None


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1]).float()
