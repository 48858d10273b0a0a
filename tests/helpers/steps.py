"""Feed packed steps to a cached program by hand, as an engine would, and collect its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from smelt.passes.program import Program
from smelt.runtime.artifact import open_artifact
from smelt.runtime.batch import Batch, no_tree


class Opened:
    """An opened artifact in the place of a program, for `Stepper`."""

    def __init__(self, folder: Path) -> None:
        self.program = open_artifact(folder).program
        self.caches = self.program.spec

    def run(self, values: dict[str, torch.Tensor], weights: object) -> torch.Tensor:
        batch = Batch.named(values, self.caches)
        caches = [values[f"kv_cache_{i}"] for i in range(self.caches.layers)]
        return self.program.run(batch, caches)


class Stepper:
    """A cached or lowered program run eagerly over sequences whose blocks interleave.

    Block tables are dealt out so that neighbouring blocks of the pool belong to different sequences
    and no sequence's blocks are in order; each cache group has a table of its own. prompts: how
    many tokens of each sequence are its prompt, where rotary factors depend on it; else all.
    """

    def __init__(
        self,
        program: Program | Opened,
        weights: Mapping[str, torch.Tensor],
        sequences: Sequence[torch.Tensor],
        prompts: Sequence[int] | None = None,
    ) -> None:
        assert program.caches is not None
        self.program, self.weights, self.sequences = program, weights, sequences
        self.spec = spec = program.caches
        self.block = spec.block_size
        wide = -(-max(len(s) for s in sequences) // self.block)
        count = len(sequences) * wide
        self.tables = []
        for group in range(len(spec.groups)):
            order = torch.arange(count).flip(0).roll(group)
            self.tables.append(order.view(wide, len(sequences)).T.contiguous().to(torch.int32))
        self.caches = spec.allocate(count)
        for cache in self.caches:  # what an unwritten slot holds must not matter
            if cache.is_floating_point():
                cache.normal_()
            else:
                cache.random_(0, 256)
        self.done = [0] * len(sequences)
        self.prompts = list(prompts or [len(s) for s in sequences])

    def step(self, chunks: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Run the next chunks[b] tokens of each sequence b; logits [chunks[b], V] of each."""
        ids, positions, slots, starts, lengths, rope = [], [], [], [0], [], []
        scaling = self.spec.rope
        for b, count in chunks.items():
            at = torch.arange(self.done[b], self.done[b] + count)
            ids.append(self.sequences[b][at])
            positions.append(at)
            slots.append(
                [t[b, at // self.block].long() * self.block + at % self.block for t in self.tables]
            )
            starts.append(starts[-1] + count)
            lengths.append(self.done[b] + count)
            if scaling is not None:
                known = max(self.prompts[b], lengths[-1])
                rope += scaling.lengths(known, self.prompts[b], at.tolist())
            self.done[b] += count
        rows = list(chunks)
        values = {
            "input_ids": torch.cat(ids),
            "position_ids": torch.cat(positions),
            "query_start": torch.tensor(starts, dtype=torch.int32),
            "seq_lens": torch.tensor(lengths, dtype=torch.int32),
            "logits_rows": torch.arange(starts[-1]),
            "tree_mask": no_tree(starts[-1]),
        }
        if scaling is not None:
            values["rope_lens"] = torch.tensor(rope)
        for g, table in enumerate(self.tables):
            values[f"slot_mapping_{g}"] = torch.cat([s[g] for s in slots])
            values[f"block_tables_{g}"] = table[rows]
        for i, cache in enumerate(self.caches):
            values[f"kv_cache_{i}"] = cache
        output = self.program.run(values, self.weights)
        logits = output[0] if isinstance(output, tuple | list) else output
        return {b: logits[starts[i] : starts[i + 1]] for i, b in enumerate(rows)}
