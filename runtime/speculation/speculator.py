"""Drafting beside an engine: asks for proposals before a step, learns from what was taken."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping

from ..metrics import Metrics
from ..sequence import Chunk, Sequence
from .control import DraftLength
from .drafter import Drafter, Proposal
from .verify import Taken


class Speculator:
    """A drafter and the length of its drafts. tokens: a fixed length, None for what pays.

    A drafter that raises is switched off with a warning; the answers go on without it.
    """

    def __init__(self, drafter: Drafter, tokens: int | None = None) -> None:
        self.drafter: Drafter | None = drafter
        self.length = DraftLength(tokens)
        self.proposals: dict[Sequence, Proposal] = {}

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
        except Exception as error:  # a draft is never needed
            warnings.warn(
                f"drafting stopped, answers go on without it: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            self.drafter = None
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

    def drop(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self.proposals.pop(sequence, None)
        if self.drafter is not None:
            self.drafter.drop(sequence)
