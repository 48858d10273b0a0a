"""Drafts from a smaller model: an artifact with the same vocabulary, run a few tokens ahead.

It keeps a paged cache of its own in which each sequence has a shadow. Before it proposes it takes
in what the model has accepted since; what was drafted and refused is overwritten. All sequences
draft together, a token a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..batch import Batch, no_tree
from ..batch_builder import BatchBuilder
from ..blocks import PagedMemory
from ..cuda_graphs import with_graphs
from ..filters import draw
from ..kv_cache import allocate_cache, cache_blocks
from ..prefix_cache import common_prefix
from ..sampler import DRAFT, DRAW, Row, distributions, process, sample
from ..sequence import Chunk, Sequence
from .drafter import Proposal

if TYPE_CHECKING:
    from ..engine import StepProgram


class _Shadow:
    """A sequence as the draft model's cache has it.

    fed: the tokens in its cache; drafted: those of the proposal under way, q their distributions.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = Sequence(sequence.id, [], sequence.params, sequence.limit)
        self.sequence.prompt_length = sequence.prompt_length
        self.known = 0  # of `fed`, how many were the model's own at the last proposal
        self.drafted: list[int] = []
        self.q: list[torch.Tensor] = []

    def follow(self, tokens: list[int]) -> None:
        """Go back to where the cache and the model's tokens agree, and await the rest."""
        own = self.sequence
        fed = own.tokens[: own.computed]
        agreed = self.known + common_prefix(fed[self.known :], tokens[self.known : len(fed)])
        own.computed = min(agreed, len(tokens) - 1)
        own.tokens = list(tokens)
        self.known = own.computed
        self.drafted, self.q = [], []


class ModelDrafter:
    """Proposes what the draft model would say. vocab_size: of the model it drafts for.

    Sampled requests draw from the draft's own distribution, under the request's parameters; greedy
    ones take its best token. A sequence whose prompt it has not read yet gets no proposal: it reads
    one step's tokens of it at a time.

    coupled: draw with the very random numbers that the model will draw with, and let it judge the
    tokens as if they had been chosen. Then even a sampled answer is the one without a draft, token
    for token, at the price of fewer accepted drafts where the distributions differ. cuda_graphs: as
    in `EngineOptions`.
    """

    name = "draft"

    def __init__(
        self,
        program: StepProgram,
        vocab_size: int,
        coupled: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        self.program = program = with_graphs(program) if cuda_graphs else program
        self.coupled = coupled
        self.vocab_size = vocab_size
        self.rope = program.spec.rope
        spec, layout = program.spec, program.layout
        blocks = cache_blocks(spec, layout, program.device)
        self.memory = PagedMemory(blocks, spec.block_size, [g.window for g in spec.groups])
        self.caches = allocate_cache(spec, blocks, program.device)
        lanes = min(layout.max_sequences, layout.max_rows, layout.max_tokens)
        self.builder = BatchBuilder(spec, layout, lanes)
        self._lanes = list(range(lanes))
        self._shadows: dict[Sequence, _Shadow] = {}  # least recently used first

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        for sequence in sequences:
            shadow = self._shadows.pop(sequence, None)
            if shadow is not None:  # now the most recently used
                self._shadows[sequence] = shadow
        asked = []
        for sequence, count in zip(sequences, counts, strict=True):
            shadow = self._follow(sequence)
            room = self.program.layout.max_position - len(sequence.tokens)
            if self.rope is not None and (most := self.rope.room(len(sequence.tokens))) is not None:
                room = min(room, most)
            if shadow is not None and min(count, room) > 0:
                asked.append((sequence, shadow, min(count, room)))
        if asked and self._together([(s, d) for s, d, _ in asked]):
            self._chain([d for _, d, _ in asked], min(n for *_, n in asked))
        else:
            self._step([(s, d) for s, d, _ in asked])
            rest = [(s, d, n) for s, d, n in asked if d.drafted]
            for done in range(1, max((n for *_, n in rest), default=0)):
                self._step([(s, d) for s, d, n in rest if len(d.drafted) == done < n])
        return [self._proposal(sequence) for sequence in sequences]

    def observe(self, sequence: Sequence, position: int, features: torch.Tensor) -> None: ...

    def drop(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            for table in shadow.sequence.tables:
                table.clear()
            shadow.sequence.tables = []
            self._lanes.append(shadow.sequence.lane)

    def _follow(self, sequence: Sequence) -> _Shadow | None:
        if len(sequence.tokens) >= self.program.layout.max_position:
            return None
        shadow = self._shadows.get(sequence)
        regime = 0
        if self.rope is not None:
            regime = self.rope.regime(len(sequence.tokens), sequence.prompt_length)
        if shadow is not None and shadow.sequence.regime != regime:
            self.drop(sequence)  # its keys were turned by other factors
            shadow = None
        if shadow is None:
            if not self._lanes:
                return None
            shadow = self._shadows[sequence] = _Shadow(sequence)
            shadow.sequence.tables = self.memory.new_tables()
            shadow.sequence.lane = self._lanes.pop()
            shadow.sequence.regime = regime
        shadow.follow(sequence.tokens)
        for table in shadow.sequence.tables:
            table.slide(shadow.known)
        return shadow

    def _step(self, active: list[tuple[Sequence, _Shadow]]) -> None:
        """Read what is pending and draft one more token for each that has no more to read."""
        budget = self.program.layout.max_tokens
        chunks = []
        for _, shadow in active:
            own = shadow.sequence
            count = min(own.pending, budget)
            # Another one's growth may have taken this one's blocks.
            if own.tables and count and self._grow(shadow, own.computed + count):
                chunks.append(Chunk(own, own.computed, count, int(count == own.pending)))
                budget -= count
        chunks = [chunk for chunk in chunks if chunk.sequence.tables]
        if not chunks:
            return
        logits = self.program.run(self.builder.build(chunks), self.caches)
        drafting = {chunk.sequence for chunk in chunks if chunk.rows}
        for chunk in chunks:
            chunk.sequence.computed += chunk.count
        self._pick([(s, d) for s, d in active if d.sequence in drafting], logits)

    def _together(self, asked: list[tuple[Sequence, _Shadow]]) -> bool:
        """Whether one step reads all that is pending, and every token is simply the best one."""
        plain = all(s.sampler is not None and s.sampler.plain for s, _ in asked)
        pending = sum(d.sequence.pending for _, d in asked)
        return self.rope is None and plain and pending <= self.program.layout.max_tokens

    def _chain(self, shadows: list[_Shadow], count: int) -> None:
        """Read what is pending and draft `count` tokens for each, all of them the best ones.

        Each step's tensors follow from those before, and tokens stay on the device: for a small
        draft model, making them anew and reading every token back would take as long as the model.
        """
        ahead = count - 1
        grown = [
            d
            for d in shadows
            if d.sequence.tables and self._grow(d, len(d.sequence.tokens) + ahead)
        ]
        # Another one's growth may have taken this one's blocks.
        grown = [d for d in grown if d.sequence.tables]
        if not grown:
            return
        own = [d.sequence for d in grown]
        batch = self.builder.build([Chunk(s, s.computed, s.pending, 1) for s in own], ahead)
        best, found = self._best(batch)
        tokens = [found]
        for following in self._following(batch, ahead):
            tokens.append(self._best(following(input_ids=tokens[-1]))[1])
        drafts = torch.stack(tokens, 1).tolist()
        nothing = best.isnan().tolist()  # where the draft's logits are no numbers
        for shadow, drafted, none in zip(grown, drafts, nothing, strict=True):
            if none:
                continue
            shadow.known = len(shadow.sequence.tokens)
            shadow.drafted = drafted
            shadow.sequence.tokens += drafted
            shadow.sequence.computed = len(shadow.sequence.tokens) - 1

    def _best(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(its logit, the best token) behind each row of a step."""
        logits = _fit(self.program.run(batch, self.caches), self.vocab_size)
        return logits.max(-1)

    def _following(self, batch: Batch, count: int) -> Iterator[Callable[..., Batch]]:
        """What makes each of the `count` steps after `batch`, of one token a sequence, given their
        `input_ids`."""
        size = self.program.spec.block_size
        sequences = len(batch.seq_lens)
        lengths = batch.seq_lens + torch.arange(1, count + 1, dtype=torch.int32)[:, None]
        positions = lengths.long() - 1
        index, offset = (positions // size).T, positions % size
        blocks = [t.gather(1, index).T.long() for t in batch.block_tables]
        slots = [(each * size + offset).contiguous() for each in blocks]
        one_each = replace(
            batch,
            query_start=torch.arange(sequences + 1, dtype=torch.int32),
            logits_rows=torch.arange(sequences),
            tree_mask=no_tree(sequences),
            max_query=1,
        )
        for i in range(count):
            yield partial(
                replace,
                one_each,
                position_ids=positions[i],
                seq_lens=lengths[i],
                slot_mapping=[each[i] for each in slots],
            )

    def _pick(self, active: list[tuple[Sequence, _Shadow]], logits: torch.Tensor) -> None:
        """Choose the token behind each row of logits."""
        rows = []
        for sequence, shadow in active:
            assert sequence.sampler is not None
            rows.append(Row(sequence.sampler, sequence.tokens, tuple(shadow.drafted)))
        if not rows:
            return
        logits = _fit(logits, self.vocab_size)
        if all(row.state.greedy for row in rows):
            picked, q = sample(logits, rows), None
        else:
            q = distributions(process(logits, rows), rows)
            use = DRAW if self.coupled else DRAFT
            uniforms = [
                0.0 if row.state.greedy else row.state.peek(len(row.draft), use) for row in rows
            ]
            picked = draw(q, uniforms)
        for i, (_, shadow) in enumerate(active):
            token = picked[i]
            if token is None:  # the draft's logits are no numbers: it has nothing to say
                continue
            if not shadow.drafted:
                shadow.known = shadow.sequence.computed
            shadow.drafted.append(token)
            shadow.sequence.tokens.append(token)
            if q is not None and not rows[i].state.greedy and not self.coupled:
                shadow.q.append(q[i])

    def _proposal(self, sequence: Sequence) -> Proposal | None:
        shadow = self._shadows.get(sequence)
        if shadow is None or not shadow.drafted:
            return None
        q = torch.stack(shadow.q) if shadow.q else None
        return Proposal(shadow.drafted, None, q)

    def _grow(self, shadow: _Shadow, tokens: int) -> bool:
        """Room for so many tokens, at the cost of whoever drafted longest ago."""
        while self.memory.grow(shadow.sequence.tables, shadow.sequence.computed, tokens) is None:
            oldest = next(iter(self._shadows))
            if self._shadows[oldest] is shadow:
                return False
            self.drop(oldest)
        return True


def _fit(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits of the model's width: vocabularies are padded to different multiples."""
    missing = vocab_size - logits.shape[1]
    if missing == 0:
        return logits
    if missing < 0:
        return logits[:, :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
