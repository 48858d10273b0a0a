"""A layer of routed experts: each token goes through the few experts its router chose."""

from __future__ import annotations

import torch

from .gated_activation import activate
from .library import operator


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


@operator(
    "experts(Tensor x, Tensor index, Tensor weight, Tensor gate_up, Tensor down, str kind) "
    "-> Tensor",
    _same,
)
def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """x [T, K]; index int64 and weight [T, top_k]; gate_up [E, 2I, K]; down [E, K, I] -> [T, K].

    The first I rows of gate_up are the gate, the others up. Tokens are grouped by expert, so an
    expert nobody chose costs nothing.
    """
    out = torch.zeros_like(x)
    for e in index.unique().tolist():
        token, choice = torch.where(index == e)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, -1)
        hidden = (activate(gate, kind) * up) @ down[e].T
        out.index_add_(0, token, (hidden * weight[token, choice, None]).to(x.dtype))
    return out
