"""The gate of a gated feed-forward layer: act(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import operator

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The named activation, elementwise. Raises ValueError for a name outside ACTIVATIONS."""
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "relu":
        return F.relu(x)
    raise ValueError(f"unknown activation {kind!r}, known: {', '.join(ACTIVATIONS)}")


def _same(gate: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@operator("gated_activation(Tensor gate, Tensor up, str kind) -> Tensor", _same)
def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """gate and up [..., I] -> act(gate) * up, [..., I], same dtype."""
    return activate(gate, kind) * up
