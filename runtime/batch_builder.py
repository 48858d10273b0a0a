"""Makes a step's tensors from the scheduler's chunks. On the hot path of every decode step.

Block tables are mirrored in one array a group, a row for each lane, of which only changed entries
are rewritten: their size is that of the whole context, not of the step.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from .batch import Batch, BatchLayout, CacheSpec, ContractError
from .sequence import Chunk


class BatchBuilder:
    """Builds batches within `layout`; checks its ranges on host integers, before any tensor."""

    def __init__(
        self, spec: CacheSpec, layout: BatchLayout, device: torch.device, lanes: int
    ) -> None:
        self.layout = layout
        self.device = device
        self.block_size = spec.block_size
        self._mirrors = [np.zeros((lanes, layout.max_blocks), np.int32) for _ in spec.groups]

    def build(self, chunks: list[Chunk]) -> Batch:
        """Raises `ContractError` where a step would leave the ranges the graph was made for."""
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.count)
        lengths = [chunk.start + chunk.count for chunk in chunks]
        rows = [
            row
            for chunk, end in zip(chunks, starts[1:], strict=True)
            for row in range(end - chunk.rows, end)
        ]
        width = -(-max(lengths) // self.block_size)
        self._check(starts[-1], len(chunks), width, len(rows), max(lengths))
        if starts[-1] == len(chunks):
            ids = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
            positions = [chunk.start for chunk in chunks]
        else:
            ids = list(
                chain.from_iterable(c.sequence.tokens[c.start : c.start + c.count] for c in chunks)
            )
            positions = list(chain.from_iterable(range(c.start, c.start + c.count) for c in chunks))
        groups = range(len(self._mirrors))
        return Batch(
            input_ids=self._tensor(ids, torch.int64),
            position_ids=self._tensor(positions, torch.int64),
            query_start=self._tensor(starts, torch.int32),
            seq_lens=self._tensor(lengths, torch.int32),
            slot_mapping=[self._tensor(self._slots(chunks, g), torch.int64) for g in groups],
            block_tables=[self._table(chunks, g, width) for g in groups],
            logits_rows=self._tensor(rows, torch.int64),
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

    def _tensor(self, values: list[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

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
        tensor = torch.from_numpy(np.ascontiguousarray(mirror[lanes, :width]))
        return tensor if self.device.type == "cpu" else tensor.to(self.device)
