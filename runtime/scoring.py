"""Logits of every token of given sequences, for evaluation and tests: no sampling, no text."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from .engine import Engine
from .errors import SmeltError, UserError
from .sampling_params import SamplingParams
from .sequence import Chunk, Sequence


def score(
    engine: Engine, prompts: Items[Items[int]], last: Items[int] | None = None
) -> list[torch.Tensor]:
    """One float32 [len, V] tensor a prompt: row i holds the logits after its tokens 0 to i.

    last: of each prompt, only the rows of so many last tokens, [last, V]. Prompts are packed
    together, cut so that no step exceeds the engine's tokens and rows. They use the engine's
    cache, so it must have no requests; what is kept of earlier ones is dropped if needed.
    """
    if engine.scheduler.has_work:
        raise UserError("logits need the engine for themselves: finish or abort its requests")
    sequences = [_sequence(engine, i, list(prompt)) for i, prompt in enumerate(prompts)]
    rows = [len(s.tokens) for s in sequences] if last is None else list(last)
    skipped = [len(s.tokens) - n for s, n in zip(sequences, rows, strict=True)]
    if any(not 0 <= n <= len(s.tokens) for s, n in zip(sequences, rows, strict=True)):
        raise UserError(f"last is {rows}: give at most the number of each prompt's tokens")
    results = [torch.empty(n, engine.program.vocab_size) for n in rows]
    waiting = [s for s in reversed(sequences) if s.tokens]
    active: list[Sequence] = []
    lanes = list(range(engine.scheduler.max_running))
    try:
        while waiting or active:
            while waiting and lanes and _start(engine, waiting[-1], lanes):
                active.append(waiting.pop())
            if not active:
                raise SmeltError("too few cache blocks are free for logits")
            chunks = _plan(engine, active, skipped)
            logits = engine.program.run(engine.builder.build(chunks), engine.caches)
            row = 0
            for chunk in chunks:
                index = chunk.sequence.id
                end = chunk.start + chunk.count - skipped[index]
                results[index][end - chunk.rows : end] = logits[row : row + chunk.rows]
                row += chunk.rows
            engine.scheduler.commit(chunks)
            for sequence in [s for s in active if not s.pending]:
                active.remove(sequence)
                _stop(sequence, lanes)
    finally:
        for sequence in active:
            _stop(sequence, lanes)
    return results


def _sequence(engine: Engine, index: int, tokens: list[int]) -> Sequence:
    vocab_size = engine.program.vocab_size
    if len(tokens) > engine.capacity:
        raise UserError(
            f"sequence {index} has {len(tokens)} tokens, context and KV cache hold "
            f"{engine.capacity}: cut it"
        )
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise UserError(f"sequence {index} holds a token id outside 0 to {vocab_size - 1}")
    return Sequence(index, tokens, SamplingParams(), len(tokens))


def _start(engine: Engine, sequence: Sequence, lanes: list[int]) -> bool:
    """Reserve all blocks of a sequence at once, so that those under way never wait for more."""
    tables = engine.memory.new_tables()
    while engine.memory.grow(tables, 0, len(sequence.tokens)) is None:
        if not engine.scheduler.cache.reclaim():
            return False
    sequence.tables = tables
    sequence.lane = lanes.pop()
    return True


def _plan(engine: Engine, active: list[Sequence], skipped: list[int]) -> list[Chunk]:
    """Chunks within a step's tokens and rows; the first `skipped` tokens need no rows."""
    tokens, rows = engine.scheduler.max_tokens, engine.scheduler.max_rows
    rows = min(rows, engine.builder.padded or rows)
    chunks: list[Chunk] = []
    for sequence in active:
        before = max(0, skipped[sequence.id] - sequence.computed)
        count = min(sequence.pending, tokens, before + rows)
        if count:
            wanted = max(0, count - before)
            chunks.append(Chunk(sequence, sequence.computed, count, wanted))
            tokens -= count
            rows -= wanted
    return chunks


def _stop(sequence: Sequence, lanes: list[int]) -> None:
    for table in sequence.tables:
        table.clear()
    lanes.append(sequence.lane)
