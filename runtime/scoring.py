"""Logits of every token of given sequences, for evaluation and tests: no sampling, no text."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from .engine import Engine
from .errors import SmeltError, UserError
from .sampling_params import SamplingParams
from .sequence import Chunk, Sequence


def score(engine: Engine, prompts: Items[Items[int]]) -> list[torch.Tensor]:
    """One float32 [len, V] tensor a prompt: row i holds the logits after its tokens 0 to i.

    Prompts are packed together, cut so that no step exceeds the graph's tokens and logit rows.
    They use the engine's cache, so it must have no requests; idle sessions are dropped if needed.
    """
    if engine.scheduler.has_work:
        raise UserError("logits need the engine for themselves: finish or abort its requests")
    sequences = [_sequence(engine, i, list(prompt)) for i, prompt in enumerate(prompts)]
    results = [torch.empty(len(s.tokens), engine.program.vocab_size) for s in sequences]
    waiting = [s for s in reversed(sequences) if s.tokens]
    active: list[Sequence] = []
    lanes = list(range(engine.scheduler.max_running))
    try:
        while waiting or active:
            while waiting and lanes and _start(engine, waiting[-1], lanes):
                active.append(waiting.pop())
            if not active:
                raise SmeltError("too few cache blocks are free for logits: close sessions first")
            chunks = _plan(engine, active)
            logits = engine.program.run(engine.builder.build(chunks), engine.caches)
            row = 0
            for chunk in chunks:
                end = chunk.start + chunk.count
                results[chunk.sequence.id][chunk.start : end] = logits[row : row + chunk.count]
                row += chunk.count
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
    while not engine.memory.grow(tables, len(sequence.tokens)):
        if not engine.scheduler.sessions.reclaim():
            return False
    sequence.tables = tables
    sequence.lane = lanes.pop()
    return True


def _plan(engine: Engine, active: list[Sequence]) -> list[Chunk]:
    layout = engine.program.layout
    budget = min(layout.max_tokens, layout.max_rows)
    chunks: list[Chunk] = []
    for sequence in active:
        count = min(sequence.pending, budget)
        if count:
            chunks.append(Chunk(sequence, sequence.computed, count, count))
            budget -= count
    return chunks


def _stop(sequence: Sequence, lanes: list[int]) -> None:
    for table in sequence.tables:
        table.clear()
    lanes.append(sequence.lane)
