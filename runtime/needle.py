"""Long-context retrieval: is a fact still found that was said far back in a long text?

A KV cache that loses old keys hardly moves perplexity, which the nearest tokens decide; asking for
one fact shows it. The protocol:

- A cell of the grid is a length (tokens of the whole prompt with its answer) and a depth (share of
  the haystack before the fact). Each cell asks `trials` prompts. Haystacks and facts are drawn by
  the seed; every depth of a length hides the same facts in the same haystacks.
- Answers are scored with their right beginning given, in one prefill. An answer is *found* if each
  of its tokens is the most likely one, which is when greedy decoding would write it.
- *gain* is how much likelier the fact makes the answer: mean log-likelihood in nats a token, minus
  the same in the same prompt without the fact. It also tells weak models apart that find nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Protocol

import torch

from .errors import SmeltError, UserError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 4
# Without a wish, no prompt is longer: a prefill of more takes minutes on a CPU.
DEFAULT_LENGTH = 16384
# A question in small tokens takes half of that.
SHORTEST = 256

# (token ids of prompts, how many last tokens of each) -> logits of those tokens, [last, V] each.
ScoreLast = Callable[[list[list[int]], list[int]], list[torch.Tensor]]
Progress = Callable[[int, int], None]


class Tokenizer(Protocol):
    """What is needed of `smelt.runtime.tokenizer.Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class Needle:
    """fact: a piece of the haystack. question and answer end the prompt, with their own spaces."""

    fact: str
    question: str
    answer: str


@dataclass(frozen=True)
class Haystack:
    """What facts are hidden in. pieces end with their own separators; head stands before them.

    draw: a needle of a random generator. special: the tokenizer adds its special tokens; False
    where the text has them already.
    """

    kind: str
    pieces: tuple[str, ...]
    draw: Callable[[Random], Needle]
    head: str = ""
    special: bool = True


@dataclass(frozen=True)
class Prompt:
    """Token ids with the answer at the end, and how many of them are the answer."""

    tokens: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Cell:
    """found, tokens: shares of answers and of answer tokens that are right; gain in nats."""

    length: int
    depth: float
    found: float
    tokens: float
    gain: float


@dataclass(frozen=True)
class Retrieval:
    """The grid row by row, lengths outside; found, tokens and gain are means over it."""

    cells: tuple[Cell, ...]
    protocol: str

    def mean(self, name: str) -> float:
        return float(sum(getattr(cell, name) for cell in self.cells) / len(self.cells))

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: self.mean(name) for name in ("found", "tokens", "gain")},
            "cells": [asdict(cell) for cell in self.cells],
            "protocol": self.protocol,
        }


def default_lengths(capacity: int) -> tuple[int, ...]:
    """A quarter, half and all of the context, between `SHORTEST` and `DEFAULT_LENGTH`."""
    most = min(capacity, DEFAULT_LENGTH)
    return (*(n for n in (most // 4, most // 2) if n >= SHORTEST), most)


def retrieval(
    haystack: Haystack,
    tokenizer: Tokenizer,
    score: ScoreLast,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Retrieval:
    """Ask every cell of `lengths` times `depths`, as the module says.

    progress(done, total) is called in prompts. Raises UserError for a length that the needle alone
    fills, and SmeltError where logits are NaN.
    """
    cells: list[Cell] = []
    done, total = 0, len(lengths) * trials * (len(depths) + 1)
    for length in lengths:
        found = [[0.0, 0.0, 0.0] for _ in depths]
        for trial in range(trials):
            group = prompts(haystack, tokenizer, length, depths, Random(f"{seed} {length} {trial}"))
            scores = _score(group, score)
            plain = scores.pop()[2]
            for sums, (right, share, likelihood) in zip(found, scores, strict=True):
                sums[0] += right / trials
                sums[1] += share / trials
                sums[2] += (likelihood - plain) / trials
            done += len(group)
            if progress is not None:
                progress(done, total)
        cells += [Cell(length, depth, *sums) for depth, sums in zip(depths, found, strict=True)]
    protocol = (
        f"{haystack.kind} needle, {trials} prompts a cell, seed {seed}; found: greedy decoding "
        "writes the answer; gain: nats a token over the same prompt without the fact"
    )
    return Retrieval(tuple(cells), protocol)


def prompts(
    haystack: Haystack, tokenizer: Tokenizer, length: int, depths: Sequence[float], rng: Random
) -> list[Prompt]:
    """One prompt a depth, and last the same without the fact; none over `length` tokens."""
    needle = haystack.draw(rng)
    first = rng.randrange(len(haystack.pieces))
    around = haystack.head + needle.fact + needle.question + needle.answer
    room = length - len(tokenizer.encode(around, haystack.special))
    pieces, sizes = _fill(haystack.pieces, first, room, tokenizer)
    while pieces:
        at = [_nearest(sizes, depth * sizes[-1]) for depth in depths]
        texts = ["".join((*pieces[:i], needle.fact, *pieces[i:])) for i in at]
        made = [_prompt(haystack, needle, text, tokenizer) for text in (*texts, "".join(pieces))]
        if all(len(prompt.tokens) <= length for prompt in made):
            return made
        pieces, sizes = pieces[:-1], sizes[:-1]
    raise UserError(
        f"a needle prompt of {length} tokens has no room for a haystack: the question alone takes "
        f"{length - room}; give longer --needle-lengths"
    )


def _fill(
    pieces: Sequence[str], first: int, room: int, tokenizer: Tokenizer
) -> tuple[list[str], list[int]]:
    """(pieces from `first` on, round and round, that fit into `room` tokens; tokens before each
    of them and at the end)."""
    count = 1
    while True:
        taken = [pieces[(first + i) % len(pieces)] for i in range(count)]
        tokens, ends = tokenizer.encode_with_ends("".join(taken))
        if len(tokens) >= room:
            break
        count *= 2
    sizes, characters = [0], 0
    for piece in taken:
        characters += len(piece)
        sizes.append(bisect_right(ends, characters))
    fitting = sum(size <= room for size in sizes[1:])
    return taken[:fitting], sizes[: fitting + 1]


def _nearest(values: Sequence[int], wanted: float) -> int:
    """The index of the value nearest to `wanted`."""
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


def _prompt(haystack: Haystack, needle: Needle, text: str, tokenizer: Tokenizer) -> Prompt:
    asked = haystack.head + text + needle.question
    before = tokenizer.encode(asked, haystack.special)
    tokens = tokenizer.encode(asked + needle.answer, haystack.special)
    same = 0
    while same < len(before) and before[same] == tokens[same]:
        same += 1
    return Prompt(tuple(tokens), len(tokens) - same)


def _score(group: Sequence[Prompt], score: ScoreLast) -> list[tuple[float, float, float]]:
    """(found, share of tokens right, mean log-likelihood) of each prompt's answer."""
    results = []
    logits = score([list(p.tokens[:-1]) for p in group], [p.answer for p in group])
    for prompt, rows in zip(group, logits, strict=True):
        if torch.isnan(rows).any():
            raise SmeltError(
                f"the logits of a prompt of {len(prompt.tokens)} tokens hold NaN: compile the "
                "model again with --check-numerics, or with another --dtype or --kv-cache"
            )
        answer = torch.tensor(prompt.tokens[-prompt.answer :], device=rows.device)
        right = rows.argmax(-1) == answer
        likelihood = rows.float().log_softmax(-1).gather(-1, answer[:, None]).mean()
        results.append((float(right.all()), float(right.float().mean()), float(likelihood)))
    return results
