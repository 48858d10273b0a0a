"""Drafts from an EAGLE-3 network: one layer that continues the model's own hidden states.

Li et al. 2025 (arXiv:2503.01840). The network reads, for every token whose features the model has
given, those features and the token behind it; then it drafts a chain, its own output standing in
for the features of what it drafted.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..sequence import Sequence
from .drafter import Proposal
from .eagle3_model import Context, Eagle3Model, load_eagle3

if TYPE_CHECKING:
    from ..engine_options import StepProgram


class _Reader:
    """What the network knows of a sequence.

    start: the first token whose features came; context: its keys and values, of `read` pairs;
    waiting: features [n, F] not read yet; last: the network's output [1, K] for the last pair.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.context = Context()
        self.read = 0
        self.waiting: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    @property
    def end(self) -> int:
        """The first token whose features did not come yet."""
        return self.start + self.read + sum(map(len, self.waiting))


class Eagle3Drafter:
    """Proposes chains of the network's best tokens.

    They are chosen and not drawn; the verification draws from the model alone, so sampled answers
    stay exact. Features that never came, because the prefix cache supplied the tokens, are not
    asked for again: the network's context of that sequence then begins with the first token that
    was computed, which can make its drafts worse and nothing wrong. Its keys and values take as
    much memory a token as one layer of its size, and live until the sequence ends.
    """

    name = "eagle3"
    features = "eagle3"

    def __init__(self, model: Eagle3Model) -> None:
        self.model = model
        self._readers: dict[Sequence, _Reader] = {}

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        found: list[Proposal | None] = [None] * len(sequences)
        asked = [i for i, s in enumerate(sequences) if counts[i] > 0 and self._knows(s)]
        if not asked:
            return found
        with torch.no_grad():
            readers = [self._readers[sequences[i]] for i in asked]
            self._read([(r, sequences[i]) for r, i in zip(readers, asked, strict=True)])
            drafted = self._draft(readers, [counts[i] for i in asked])
        for i, tokens in zip(asked, drafted, strict=True):
            found[i] = Proposal(tokens)
        return found

    def observe(self, sequence: Sequence, position: int, features: torch.Tensor) -> None:
        reader = self._readers.get(sequence)
        if reader is None or position > reader.end:
            reader = self._readers[sequence] = _Reader(position)
        new = features[reader.end - position :]  # the others were computed again
        if len(new):
            reader.waiting.append(new)

    def drop(self, sequence: Sequence) -> None:
        self._readers.pop(sequence, None)

    def _knows(self, sequence: Sequence) -> bool:
        """Whether the features of every token but the newest came."""
        reader = self._readers.get(sequence)
        return reader is not None and reader.end == len(sequence.tokens) - 1

    def _read(self, asked: list[tuple[_Reader, Sequence]]) -> None:
        """Take in the pairs that wait, of all sequences in one go."""
        behind = [(r, s) for r, s in asked if r.waiting]
        if not behind:
            return
        rows: list[torch.Tensor] = []
        tokens: list[int] = []
        positions: list[int] = []
        parts: list[tuple[Context, int]] = []
        for reader, sequence in behind:
            first, end = reader.start + reader.read, reader.end
            rows += reader.waiting
            tokens += sequence.tokens[first + 1 : end + 1]
            positions += range(first, end)
            parts.append((reader.context, end - first))
        hidden = self.model.fuse(torch.cat(rows))
        out = self.model.step(hidden, *self._ids(hidden, tokens, positions), parts)
        at = 0
        for (reader, _), (_, count) in zip(behind, parts, strict=True):
            at += count
            reader.read += count
            reader.waiting.clear()
            reader.last = out[at - 1 : at].clone()

    def _draft(self, readers: list[_Reader], counts: list[int]) -> list[list[int]]:
        """A chain of counts[i] tokens each; what the contexts grew by is forgotten again."""
        drafted: list[list[int]] = [[] for _ in readers]
        active = list(range(len(readers)))
        hidden = torch.cat([r.last for r in readers if r.last is not None])
        while True:
            best = self.model.best(hidden).tolist()
            for i, token in zip(active, best, strict=True):
                drafted[i].append(token)
            going = [at for at, i in enumerate(active) if len(drafted[i]) < counts[i]]
            if not going:
                break
            active = [active[at] for at in going]
            tokens = [drafted[i][-1] for i in active]
            positions = [readers[i].start + readers[i].context.length for i in active]
            parts = [(readers[i].context, 1) for i in active]
            hidden = hidden[going]
            hidden = self.model.step(hidden, *self._ids(hidden, tokens, positions), parts)
        for reader in readers:
            reader.context.length = reader.read
        return drafted

    def _ids(
        self, like: torch.Tensor, tokens: list[int], positions: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(tokens, device=like.device), torch.tensor(positions, device=like.device)


def open_eagle3(folder: Path, program: StepProgram) -> Eagle3Drafter:
    """The drafter of a folder (`load_eagle3`). Raises `UserError`."""
    return Eagle3Drafter(load_eagle3(folder, program))
