"""From a step's logits to the tokens each sequence goes on with, drafts verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from .filters import listed
from .logprobs import Logprobs, top_logprobs
from .sampler import Prepared, Row, SamplerState, pick, prepare, process
from .sequence import Chunk, Sequence
from .speculation.drafter import Proposal
from .speculation.verify import Taken, reject, walk
from .transfer import read, send


class Selection:
    """The rows of one step that tokens are chosen from. Made before the model runs, so that
    grammar masks are filled meanwhile.

    proposals: what was drafted for a sequence, for its distributions q; forks: the sequences that
    begin with the token behind a chunk's last row, beside its own.
    """

    def __init__(
        self,
        chunks: list[Chunk],
        proposals: Mapping[Sequence, Proposal],
        forks: Mapping[Sequence, list[Sequence]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._proposals = proposals
        self._forks = {c.sequence: forks[c.sequence] for c in chunks if c.sequence in forks}
        self._rows: list[Row] = []
        self._index: list[int] = []  # of each row, the row of logits it stands for
        self._parts: list[tuple[Chunk, int, int, int]] = []  # chunk, logits row, first row, end
        at = 0
        for chunk in chunks:
            self._add(chunk, at)
            at += chunk.rows
        self._plain = self._index == list(range(at))
        self._prepared: Prepared = prepare(self._rows, vocab_size, device)

    def _add(self, chunk: Chunk, at: int) -> None:
        """Rows of a chunk whose logits begin at row `at`: those that tokens are drawn from."""
        sequence = chunk.sequence
        if chunk.start + chunk.known < len(sequence.tokens):
            return  # still in its prompt: what follows is known
        first = len(self._rows)
        behind = at + chunk.rows - len(chunk.draft) - 1
        for node in range(-1, len(chunk.draft)):
            self._rows.append(Row(_state(sequence), sequence.tokens, _path(chunk, node)))
            self._index.append(behind + 1 + node)
        for fork in self._forks.get(sequence, ()):
            self._rows.append(Row(_state(fork), fork.tokens))
            self._index.append(behind)
        self._parts.append((chunk, behind, first, len(self._rows)))

    def choose(
        self,
        logits: torch.Tensor,
        meanwhile: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[dict[Sequence, Taken], torch.Tensor]:
        """What each sequence takes, forks included, and the logits [rows, V] they came from.

        logits [R, V]: of all chunks, perhaps with rows of padding behind them. meanwhile: called
        with the tokens on the device, int64 [rows] as `pick` gives them, before they are read;
        only where no chunk has a draft.
        """
        if not self._rows:
            return {}, logits
        if not self._plain or len(logits) > len(self._index):
            logits = logits[send(self._index, torch.int64, logits.device)]
        drawn = [part for part in self._parts if self._drawn(part[0])]
        picked: list[int | None] = []
        scores = None
        if drawn:
            scores = process(logits, self._rows, self._prepared)
        if len(drawn) < len(self._parts):
            tokens = pick(logits, self._rows, self._prepared)
            picked = listed(read(tokens, partial(meanwhile, tokens) if meanwhile else None))
        taken: dict[Sequence, Taken] = {}
        for part in self._parts:
            chunk, _, first, end = part
            own = first + 1 + len(chunk.draft)
            if scores is not None and self._drawn(chunk):
                q = self._proposals[chunk.sequence].q
                assert q is not None
                taken[chunk.sequence] = reject(
                    chunk, scores[first:own], self._rows[first:own], q.to(scores.device)
                )
            else:
                taken[chunk.sequence] = walk(chunk, picked[first:own])
            for fork, token in zip(
                self._forks.get(chunk.sequence, ()), picked[own:end], strict=False
            ):
                taken[fork] = Taken([token], [])
        return taken, logits

    def logprobs(
        self, logits: torch.Tensor, sequence: Sequence, tokens: list[int], path: list[int]
    ) -> list[Logprobs]:
        """Of the tokens a sequence took, along `path`. logits: as `choose` gave them back."""
        for chunk, _, first, end in self._parts:
            if chunk.sequence is sequence:
                rows = [first, *(first + 1 + node for node in path)]
                break
            forks = self._forks.get(chunk.sequence, [])
            if sequence in forks:
                rows = [end - len(forks) + forks.index(sequence)]
                break
        wanted = sequence.params.logprobs or 0
        return top_logprobs(logits[rows[: len(tokens)]], tokens, wanted)

    def _drawn(self, chunk: Chunk) -> bool:
        proposal = self._proposals.get(chunk.sequence)
        return bool(chunk.draft) and proposal is not None and proposal.q is not None


def _state(sequence: Sequence) -> SamplerState:
    assert sequence.sampler is not None
    return sequence.sampler


def _path(chunk: Chunk, node: int) -> tuple[int, ...]:
    """The drafted tokens from the first to `node`, along its branch."""
    if chunk.parents is None:
        return tuple(chunk.draft[: node + 1])
    path: list[int] = []
    while node >= 0:
        path.append(chunk.draft[node])
        node = chunk.parents[node]
    return tuple(reversed(path))
