"""A layer of routed experts: each token goes through the few experts its router chose."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .gated_activation import activate
from .library import operator


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def routed(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    kind: str,
    gate_up: Callable[[int], torch.Tensor],
    down: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """x [T, K]; index int64 and weight [T, top_k]; gate_up(e) [2I, K]; down(e) [K, I] -> [T, K].

    Tokens are grouped by expert, so an expert nobody chose costs nothing.
    """
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for e in index.unique().tolist():
        token, choice = torch.where(index == e)
        gate, up = (x[token] @ gate_up(e).T).chunk(2, -1)
        hidden = (activate(gate, kind) * up) @ down(e).T
        out.index_add_(0, token, (hidden * weight[token, choice, None]).to(x.dtype))
    return out


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

    The first I rows of gate_up are the gate, the others up.
    """
    return routed(x, index, weight, kind, gate_up.__getitem__, down.__getitem__)


@operator(
    "experts_dense(Tensor x, Tensor index, Tensor weight, Tensor gate_up, Tensor down, str kind) "
    "-> Tensor",
    _same,
)
def experts_dense(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    """`experts`, named so that a kernel can stand in for it and the reference stays reachable."""
    return experts(x, index, weight, gate_up, down, kind)
