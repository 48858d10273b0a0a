"""Drafting beside an engine: asks for proposals before a step, learns from what was taken."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..metrics import Metrics
from ..sequence import Chunk, Sequence
from .control import DraftLength
from .drafter import Drafter, Proposal
from .verify import Taken

if TYPE_CHECKING:
    import torch


class Speculator:
    """A drafter and the length of its drafts. tokens: a fixed length, None for what pays.

    A drafter that raises is switched off with a warning; the answers go on without it.
    """

    def __init__(self, drafter: Drafter, tokens: int | None = None) -> None:
        self.drafter: Drafter | None = drafter
        self.name = drafter.name
        kinds = {
            key: getattr(drafter, key) for key in ("longest", "nodes") if hasattr(drafter, key)
        }
        self.length = DraftLength(tokens, **kinds)
        self.proposals: dict[Sequence, Proposal] = {}

    @property
    def features(self) -> str | None:
        """The kind of features the drafter reads, None for none."""
        return getattr(self.drafter, "features", None)

    def draft(self, running: Iterable[Sequence]) -> None:
        """Give the sequences that decode their drafts for the next step."""
        self.proposals.clear()
        if self.drafter is None:
            return
        ready = [s for s in running if s.pending == 1 and s.generated]
        count = self.length.choose(len(ready)) if ready else 0
        for sequence in ready:
            sequence.draft, sequence.parents = [], None
        # The step itself gives one token, so a draft is useful up to one before the last.
        ready = [s for s in ready if s.limit - len(s.tokens) > 1]
        if not count or not ready:
            return
        counts = [min(count, s.limit - len(s.tokens) - 1) for s in ready]
        began = time.perf_counter()
        try:
            found = self.drafter.propose(ready, counts)
        except Exception as error:
            self._stop(error)
            return
        made = 0
        for sequence, proposal in zip(ready, found, strict=True):
            if proposal is not None and proposal.tokens:
                sequence.draft, sequence.parents = proposal.tokens, proposal.parents
                self.proposals[sequence] = proposal
                made += len(proposal.tokens)
        self.length.proposed(made, time.perf_counter() - began)

    def learn(
        self,
        chunks: list[Chunk],
        taken: Mapping[Sequence, Taken],
        seconds: float,
        metrics: Metrics,
    ) -> None:
        """What a step took, and how long the model needed."""
        judged = accepted = 0
        for chunk in chunks:
            if not chunk.draft or chunk.sequence not in taken:
                continue
            path = taken[chunk.sequence].path
            accepted += len(path)
            deepest = max(len(path), 1) if chunk.parents else len(chunk.draft)
            judged += min(deepest, len(path) + 1)
            metrics.drafted_tokens += len(chunk.draft)
            metrics.draft_sequences += 1
        metrics.accepted_tokens += accepted
        metrics.draft_steps += any(chunk.draft for chunk in chunks)
        self.length.verified(judged, accepted)
        if all(chunk.known == 1 for chunk in chunks):
            self.length.stepped(sum(chunk.count for chunk in chunks), seconds)

    def observe(
        self,
        chunks: list[Chunk],
        taken: Mapping[Sequence, Taken],
        forks: Mapping[Sequence, list[Sequence]],
        features: torch.Tensor,
    ) -> None:
        """Hand a step's features, [R, F] or [T, F] by their kind, to the sequences they are of.

        A fork gets those of the chunk it begins with.
        """
        if self.drafter is None:
            return
        row = 0
        for chunk in chunks:
            found = taken.get(chunk.sequence)
            path = found.path if found is not None else []
            position = chunk.start
            if self.features == "final":
                row += chunk.rows
                last = row - 1 - len(chunk.draft) + (1 + path[-1] if path else 0)
                rows = [last] if found is not None else []
                position += chunk.known - 1 + len(path)
            else:
                rows = [row + i for i in (*range(chunk.known), *(chunk.known + n for n in path))]
                row += chunk.count
            if not rows:
                continue
            own = features[rows]
            try:
                for sequence in (chunk.sequence, *forks.get(chunk.sequence, ())):
                    self.drafter.observe(sequence, position, own)
            except Exception as error:
                self._stop(error)
                return

    def _stop(self, error: Exception) -> None:
        """A draft is never needed."""
        warnings.warn(
            f"drafting stopped, answers go on without it: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        self.drafter = None

    def drop(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self.proposals.pop(sequence, None)
        if self.drafter is not None:
            self.drafter.drop(sequence)
