"""Copies within the paged cache, between steps: a shared block before it is written, a branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .batch import CacheSpec
from .blocks import BlockTable, Copies


def copy_blocks(caches: Sequence[torch.Tensor], spec: CacheSpec, copies: Copies) -> None:
    """Copy whole blocks in every layer of their group, in order: a source may be a later target."""
    for group, source, target in copies:
        for layer in spec.groups[group].layers:
            caches[layer][target].copy_(caches[layer][source])


def move_slots(
    caches: Sequence[torch.Tensor],
    spec: CacheSpec,
    tables: Sequence[BlockTable],
    moves: Sequence[tuple[int, int]],
) -> None:
    """Copy keys and values from position to position of one sequence, all at once."""
    size = spec.block_size
    for group, table in zip(spec.groups, tables, strict=True):
        block, offset = (
            [torch.tensor([f(move[side]) for move in moves]) for side in (0, 1)]
            for f in (lambda at: table.blocks[at // size], lambda at: at % size)  # noqa: B023
        )
        for layer in group.layers:
            cache = caches[layer]
            cache[block[1], :, offset[1]] = cache[block[0], :, offset[0]]
