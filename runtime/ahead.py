"""Run ahead: the next decode step is launched before the tokens of the one before are read.

    step N runs  ->  its tokens are chosen on the device  ->  step N+1 is launched with them
                                                          ->  the tokens are read and taken in

So the device computes step N+1 while the host detokenizes, looks for ends, answers its callers and
chooses from N+1's logits. It is done where the host knows all of step N+1 but the tokens: every
running sequence decodes without a draft, nobody can be admitted, and each sequence has a block for
one more token that is its own, if need be one that the prefix cache held for nobody. What comes
before the temperature (penalties, structures) does not matter: it is looked up when N+1's tokens
are chosen, and N's have been taken in by then.

The next `Engine.step` takes the logits of all sequences that still run, without asking the
scheduler anew: whoever came meanwhile could not have started before that step was done either. The
rows of those that ended are dropped, and what was written to the cache for them does no harm:

- A sequence that ended with token t of step N has keys up to the token before t. Step N+1 wrote
  those of t, one position on: into the last block, behind what the prefix cache keeps of it, or
  into a block that is free again.
- Who shares a block in part copies it before writing, and reads no further than what was shared
  and what it has written itself. Who gets a free block writes each position before reading it.
- Both happen in later steps, and steps and copies run on one stream, in order. For the same reason
  step N+1 may read blocks that were given back after it was launched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from .batch_builder import BatchBuilder
from .engine_options import StepProgram
from .scheduler import Scheduler
from .sequence import Chunk, Sequence
from .transfer import send


@dataclass
class _Launched:
    """A step under way: its logits [R, V], a row for each chunk, or what launching it raised."""

    chunks: list[Chunk]
    logits: torch.Tensor | Exception


class Ahead:
    """Launches steps early for one engine. forks: sequences that wait for another one's prompt."""

    def __init__(
        self,
        scheduler: Scheduler,
        builder: BatchBuilder,
        program: StepProgram,
        caches: list[torch.Tensor],
        forks: Mapping[Sequence, list[Sequence]],
    ) -> None:
        self._scheduler = scheduler
        self._builder = builder
        self._program = program
        self._caches = caches
        self._forks = forks
        self._launched: _Launched | None = None

    def chunks(self) -> list[Chunk]:
        """Those of the step under way whose sequences still run; empty without such a step."""
        if self._launched is None:
            return []
        return [c for c in self._launched.chunks if c.sequence.lane >= 0]

    def logits(self, chunks: list[Chunk]) -> torch.Tensor | None:
        """Of the step under way the rows of `chunks`; None where these are not its own.

        Raises what launching it raised.
        """
        launched, self._launched = self._launched, None
        if launched is None:
            return None
        places = {id(chunk): i for i, chunk in enumerate(launched.chunks)}
        if not all(id(chunk) in places for chunk in chunks):
            return None
        if isinstance(launched.logits, Exception):
            raise launched.logits
        if len(chunks) == len(places):
            return launched.logits
        rows = [places[id(chunk)] for chunk in chunks]
        return launched.logits[send(rows, torch.int64, launched.logits.device)]

    def after(self, chunks: list[Chunk]) -> Callable[[torch.Tensor], None] | None:
        """What launches the step behind `chunks`, given their tokens; None where it cannot be yet.

        The blocks of that step are reserved. tokens: int64 [len(chunks)] on the device, as
        `sampler.pick` gives them.
        """
        if not self._foreseen(chunks):
            return None
        places = [i for i, c in enumerate(chunks) if not _last(c.sequence)]
        following = [Chunk(s, len(s.tokens), 1, 1) for s in (chunks[i].sequence for i in places)]
        if not following or not self._reserve(following):
            return None
        batch = self._builder.build(following, chosen=False)

        def launch(tokens: torch.Tensor) -> None:
            if len(places) < len(chunks):
                tokens = tokens[send(places, torch.int64, tokens.device)]
            # A row with nothing to choose has a token as well: an embedding must be read.
            ids = tokens.clamp(min=0)
            ids = torch.nn.functional.pad(ids, (0, len(batch.input_ids) - len(ids)))
            found: torch.Tensor | Exception
            try:
                found = self._program.run(replace(batch, input_ids=ids), self._caches)
            except Exception as error:  # reported when the step is taken, as by any other
                found = error
            self._launched = _Launched(following, found)

        return launch

    def _foreseen(self, chunks: list[Chunk]) -> bool:
        """Whether the step behind `chunks` computes one token of each and nothing else."""
        scheduler = self._scheduler
        if scheduler.rope is not None or len(chunks) != len(scheduler.running):
            return False
        # With all lanes taken, whoever waits gets one only when a sequence has ended.
        full = len(scheduler.running) == scheduler.max_running
        if scheduler.waiting and (scheduler.policy.preemptive or not full):
            return False
        return all(self._decodes(chunk) for chunk in chunks)

    def _decodes(self, chunk: Chunk) -> bool:
        """Whether the next token of a chunk's sequence needs nothing but its last one."""
        sequence = chunk.sequence
        complete = chunk.start + chunk.count == len(sequence.tokens)  # also: it has no draft
        # Log probabilities are read from the logits after the tokens, so these must not go.
        return complete and not sequence.logprobs and sequence not in self._forks

    def _reserve(self, chunks: list[Chunk]) -> bool:
        """Make one position of each writable, for which nobody steps back and nothing is copied."""
        memory = self._scheduler.memory
        if any(t.shared(chunk.start) for chunk in chunks for t in chunk.sequence.tables):
            return False
        for group, pool in enumerate(memory.pools):
            missing = sum(c.sequence.tables[group].missing(c.start + 1) for c in chunks)
            while pool.free < missing:
                if not self._scheduler.cache.reclaim():
                    return False
        for chunk in chunks:
            memory.grow(chunk.sequence.tables, chunk.start, chunk.start + 1)
        return True


def _last(sequence: Sequence) -> bool:
    """Whether the token that is being chosen is the sequence's last by its length."""
    return len(sequence.tokens) + 1 >= sequence.limit
