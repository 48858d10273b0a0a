"""Log probabilities of the model's own distribution, as requests report them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .sequence import Chunk

# Rows are normalised so many values at a time: a long prompt's logits fill memory as they are.
_VALUES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Logprobs:
    """One position: the token there and the most likely ones, before penalties and filters.

    token, logprob, rank: of the token that was chosen; rank 1 is the most likely, tied tokens
    share the better rank. top: the k most likely as (token, logprob), best first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


def top_logprobs(logits: torch.Tensor, tokens: Sequence[int], k: int) -> list[Logprobs]:
    """One `Logprobs` a row. logits [R, V] of any float dtype, as the model gave them.

    tokens: the chosen token of each row. For a prompt: the logits of its positions but the last,
    and its tokens but the first. Natural logarithms, computed in float32.
    """
    found: list[Logprobs] = []
    count = max(1, _VALUES_AT_ONCE // logits.shape[1])
    for start in range(0, len(tokens), count):
        found += _rows(logits[start : start + count], tokens[start : start + count], k)
    return found


def keep_prompt_logprobs(chunks: Sequence[Chunk], logits: torch.Tensor) -> None:
    """Of the prompt tokens whose logits a step gave, kept with the sequences that want them."""
    row = 0
    for chunk in chunks:
        sample = chunk.sequence
        found = sample.prompt_logprobs
        # Of a sequence that stepped back while it answered they are known.
        if found is not None and not sample.generated and chunk.start < sample.prompt_length - 1:
            end = min(chunk.start + chunk.count, sample.prompt_length - 1)
            rows = logits[row : row + end - chunk.start]
            tokens = sample.tokens[chunk.start + 1 : end + 1]
            del found[chunk.start :]  # a prompt that was begun before and preempted
            found += top_logprobs(rows, tokens, sample.params.prompt_logprobs or 0)
        row += chunk.rows


def _rows(logits: torch.Tensor, tokens: Sequence[int], k: int) -> list[Logprobs]:
    logprobs = logits.float().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)
    ranks = (logprobs > values).sum(-1) + 1
    best = logprobs.topk(min(k, logits.shape[1]), -1)
    columns = (values[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist())
    return [
        Logprobs(token, value, rank, tuple(zip(ids, top, strict=True)))
        for token, value, rank, ids, top in zip(tokens, *columns, strict=True)
    ]
