"""Makes a step's tensors from the scheduler's chunks. On the hot path of every decode step.

They lie on the host: the program brings them to its device, all in one copy. Block tables are
mirrored in one array a group, a row for each lane, of which only changed entries are rewritten:
their size is that of the whole context, not of the step.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from .batch import Batch, BatchLayout, CacheSpec, ContractError, no_tree
from .sequence import Chunk


class BatchBuilder:
    """Builds batches within `layout`; checks its ranges on host integers, before any tensor.

    padded: give every step this many tokens and rows, so that a row's sums are made in the same
    order whatever else the step holds; the added tokens are written nowhere and belong to nobody.
    """

    def __init__(
        self,
        spec: CacheSpec,
        layout: BatchLayout,
        lanes: int,
        padded: int = 0,
    ) -> None:
        self.layout = layout
        self.padded = padded
        self.block_size = spec.block_size
        self.rope = spec.rope
        self._mirrors = [np.zeros((lanes, layout.max_blocks), np.int32) for _ in spec.groups]

    def build(self, chunks: list[Chunk], ahead: int = 0, chosen: bool = True) -> Batch:
        """Raises `ContractError` where a step would leave the ranges the graph was made for.

        ahead: tokens behind each chunk whose blocks the tables are to hold already. chosen: False
        where each chunk is one token that is not chosen yet; `input_ids` are then to be replaced.
        """
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.count)
        lengths = [chunk.start + chunk.count for chunk in chunks]
        rows = [
            row
            for chunk, end in zip(chunks, starts[1:], strict=True)
            for row in range(end - chunk.rows, end)
        ]
        width = -(-(max(lengths) + ahead) // self.block_size)
        self._check(starts[-1], len(chunks), width, len(rows), max(lengths))
        if starts[-1] == len(chunks):
            ids = [chunk.sequence.tokens[chunk.start] if chosen else 0 for chunk in chunks]
            positions = [chunk.start for chunk in chunks]
        else:
            ids = list(chain.from_iterable(_ids(chunk) for chunk in chunks))
            positions = list(chain.from_iterable(_positions(chunk) for chunk in chunks))
        rope_lens = self._rope_lens(chunks, starts, positions) if self.rope else None
        slots = [self._slots(chunks, group) for group in range(len(self._mirrors))]
        mask = _tree_mask(chunks, starts) if any(chunk.parents for chunk in chunks) else None
        if self.padded:
            missing = self.padded - len(ids)
            ids += [0] * missing
            positions += [0] * missing
            if rope_lens is not None:
                rope_lens += [1] * missing
            slots = [each + [-1] * missing for each in slots]
            rows += [0] * (self.padded - len(rows))
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 0, 0, missing))
        return Batch(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            position_ids=torch.tensor(positions, dtype=torch.int64),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            slot_mapping=[torch.tensor(each, dtype=torch.int64) for each in slots],
            block_tables=[self._table(chunks, g, width) for g in range(len(slots))],
            logits_rows=torch.tensor(rows, dtype=torch.int64),
            tree_mask=no_tree(len(ids)) if mask is None else mask,
            rope_lens=None if rope_lens is None else torch.tensor(rope_lens, dtype=torch.int64),
            # Padded steps are all to run in the same package.
            max_query=self.padded or max(chunk.count for chunk in chunks),
        )

    def _check(self, tokens: int, sequences: int, width: int, rows: int, length: int) -> None:
        layout = self.layout
        if (
            tokens <= layout.max_tokens
            and sequences <= layout.max_sequences
            and width <= layout.max_blocks
            and rows <= layout.max_rows
            and length <= layout.max_position
        ):
            return
        raise ContractError(
            f"a step of {tokens} tokens, {sequences} sequences, {width} blocks a sequence, "
            f"{rows} logit rows and positions below {length} exceeds the graph's {layout}"
        )

    def _rope_lens(self, chunks: list[Chunk], starts: list[int], positions: list[int]) -> list[int]:
        assert self.rope is not None
        found: list[int] = []
        for chunk, start in zip(chunks, starts, strict=False):
            own, at = chunk.sequence, positions[start : start + chunk.count]
            found += self.rope.lengths(len(own.tokens), own.prompt_length, at)
        return found

    def _slots(self, chunks: list[Chunk], group: int) -> list[int]:
        size = self.block_size
        slots: list[int] = []
        for chunk in chunks:
            blocks = chunk.sequence.tables[group].blocks
            position, end = chunk.start, chunk.start + chunk.count
            while position < end:
                index, offset = divmod(position, size)
                count = min(size - offset, end - position)
                first = blocks[index] * size + offset
                slots.extend(range(first, first + count))
                position += count
        return slots

    def _table(self, chunks: list[Chunk], group: int, width: int) -> torch.Tensor:
        """int32 [B, width]; entries past a sequence's own blocks are stale and never read."""
        mirror = self._mirrors[group]
        lanes = []
        for chunk in chunks:
            lane, table = chunk.sequence.lane, chunk.sequence.tables[group]
            lanes.append(lane)
            if table.changed_from < len(table.blocks):
                mirror[lane, table.changed_from : len(table.blocks)] = table.blocks[
                    table.changed_from :
                ]
                table.changed_from = len(table.blocks)
        # Rows are gathered into a new array: graphs are compiled for contiguous tables.
        return torch.from_numpy(np.ascontiguousarray(mirror[lanes, :width]))


def _ids(chunk: Chunk) -> list[int]:
    return chunk.sequence.tokens[chunk.start : chunk.start + chunk.known] + chunk.draft


def _positions(chunk: Chunk) -> list[int]:
    """A drafted token stands one behind its parent, wherever in the cache its slot is."""
    end = chunk.start + chunk.known
    positions = list(range(chunk.start, end))
    if not chunk.parents:
        return positions + list(range(end, end + len(chunk.draft)))
    for parent in chunk.parents:
        positions.append(positions[chunk.known + parent] + 1)
    return positions


def _tree_mask(chunks: list[Chunk], starts: list[int]) -> torch.Tensor:
    """bool [T, W]: what each token sees of its own sequence's tokens in this step."""
    wide = max(chunk.count for chunk in chunks)
    mask = np.zeros((starts[-1], wide), np.bool_)
    for chunk, start in zip(chunks, starts, strict=False):
        rows = mask[start : start + chunk.count, : chunk.count]
        rows[:] = np.tri(chunk.count, dtype=np.bool_)
        for i, parent in enumerate(chunk.parents or ()):
            row = chunk.known + i
            rows[row, chunk.known :] = False
            if parent >= 0:
                rows[row] |= rows[chunk.known + parent]
            rows[row, row] = True
    return torch.from_numpy(mask)
