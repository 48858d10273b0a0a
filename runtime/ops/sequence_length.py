"""The length of each token's sequence, for rotary factors that depend on it."""

from __future__ import annotations

import torch

from .library import operator


def _same(position_ids: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(position_ids)


@operator("sequence_length(Tensor position_ids, str kind, int limit) -> Tensor", _same)
def sequence_length(position_ids: torch.Tensor, kind: str, limit: int) -> torch.Tensor:
    """position_ids int64 [T] of one whole sequence -> its length at every token, int64 [T].

    kind, limit: the `LengthScaling` of the module that asks, for `insert-rope-lengths`, which puts
    the batch's own lengths here: a packed step holds several sequences, and parts of them.
    """
    return (position_ids.max() + 1).expand_as(position_ids).clone()
