"""From logits to tokens, for all rows of a step at once.

Each row has its own parameters and its own random numbers, and no operation mixes rows, so a
request's tokens depend on its seed and logits alone, not on what else runs in the batch.

A request may have several rows in a step: one behind its last token, and one behind each of the
tokens that were drafted for it. What a row sees of its request (penalties, grammar, random number)
counts the drafted tokens before it, and nothing is consumed until the engine says which tokens it
took (`SamplerState.accept`). So the row behind d accepted drafts gives the very token that a step
without speculation would have given.

    prepared = prepare(rows, vocab_size, device)    # grammar masks, in threads
    logits = program.run(...)                       # meanwhile
    tokens = sample(logits, rows, prepared)
    rows[i].state.accept(taken)                     # for each request
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import SmeltError
from .filters import NO_VALUE, NOTHING, drawn, listed, probabilities
from .masks import Prepared, prepare
from .processors import BadWords, Seen, Shift, encode_bad_words, process
from .sampling_params import SamplingParams
from .transfer import send

if TYPE_CHECKING:
    from .masks import Matcher

__all__ = [
    "ACCEPT",
    "DRAFT",
    "DRAW",
    "Prepared",
    "Row",
    "SamplerState",
    "distributions",
    "pick",
    "prepare",
    "process",
    "sample",
]

# What a random number is for. Numbers of different uses are independent of each other.
DRAW = "draw"  # a token from the row's distribution, or from the residual after a rejection
ACCEPT = "accept"  # whether a drafted token is accepted
DRAFT = "draft"  # a token from the draft model's distribution


class SamplerState:
    """What the sampler remembers of one request, or of one of its `n` answers.

    prompt_length: tokens that count as prompt and not as answer.
    ends: token ids that may not come before `min_tokens`.
    bad_words: token ids of each sequence to avoid (`encode_bad_words`); None takes the lists of
    `params`, `UserError` if it has strings.
    matcher: what its text has to match, of its own.
    index: which of the request's answers this is; each has other random numbers.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_length: int = 0,
        ends: Iterable[int] = (),
        *,
        bad_words: Sequence[Sequence[int]] | None = None,
        matcher: Matcher | None = None,
        index: int = 0,
    ) -> None:
        self.params = params
        self.prompt_length = prompt_length
        self.ends = sorted(ends)
        self.matcher = matcher
        if bad_words is None:
            bad_words = encode_bad_words(params.bad_words, None)
        self.seen = None if params.repetition_penalty == 1 else Seen()
        self.bad_words = BadWords(bad_words) if any(len(w) > 1 for w in bad_words) else None
        self.shift = Shift.of(params, prompt_length, [w[0] for w in bad_words if len(w) == 1])
        self.greedy = params.greedy
        changes = (self.seen, self.shift, self.bad_words, matcher)
        # Whether anything comes before the temperature, and whether nothing comes at all.
        self.processed = bool(params.min_tokens) or any(c is not None for c in changes)
        self.plain = self.greedy and not self.processed
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._seed: int | str = seed if index == 0 else f"{seed}/{index}"
        self._streams: dict[str, _Stream] = {}
        self._taken = 0

    @property
    def finished(self) -> bool:
        """Whether the structure is complete: the answer ends here, whatever `ignore_eos` says."""
        return self.matcher is not None and self.matcher.finished

    def peek(self, ahead: int = 0, use: str = DRAW) -> float:
        """The random number, in [0, 1), of the token `ahead` places on; consumes nothing."""
        stream = self._streams.get(use)
        if stream is None:
            seed = self._seed if use == DRAW else f"{self._seed}/{use}"
            stream = self._streams[use] = _Stream(seed)
            stream.advance(self._taken)
        return stream.peek(ahead)

    def advance(self, count: int) -> None:
        """Consume the random numbers of `count` tokens, of every use."""
        self._taken += count
        for stream in self._streams.values():
            stream.advance(count)

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were taken: random numbers and grammar move on, in this order.

        Penalties follow the history by themselves. Raises `SmeltError`, which ends this request
        alone, if the grammar refuses a token (not one that was sampled) or exceeds its limits.
        """
        if not self.greedy:
            self.advance(len(tokens))
        if self.matcher is not None and not self.matcher.accept(tokens):
            reason = self.matcher.error or "the tokens do not match"
            raise SmeltError(f"the request's structure refused its own tokens: {reason}")


class _Stream:
    """Random numbers that can be looked at before they are consumed."""

    def __init__(self, seed: int | str) -> None:
        # Python's generator: a number costs 50 ns (torch's: microseconds) and it is the same on
        # every device and version.
        self._next = random.Random(seed).random
        self._ahead: list[float] = []

    def peek(self, ahead: int) -> float:
        numbers = self._ahead
        while len(numbers) <= ahead:
            numbers.append(self._next())
        return numbers[ahead]

    def advance(self, count: int) -> None:
        for _ in range(count - len(self._ahead)):
            self._next()
        del self._ahead[:count]


@dataclass(slots=True)
class Row:
    """One row of logits: they predict the token after `history` and `draft`.

    history: the request's tokens so far, by reference: it grows between steps and is never copied.
    draft: drafted tokens between the history and this row; empty when decoding normally.
    """

    state: SamplerState
    history: list[int]
    draft: tuple[int, ...] = ()

    @property
    def early(self) -> bool:
        """Whether the answer has fewer than `min_tokens` tokens before this row."""
        wanted = self.state.params.min_tokens
        if not wanted:
            return False
        return len(self.history) + len(self.draft) - self.state.prompt_length < wanted


def sample(
    logits: torch.Tensor, rows: Sequence[Row], prepared: Prepared | None = None
) -> list[int | None]:
    """One token a row. logits [R, V] of any float dtype; prepared: of the same rows.

    A row behind d drafted tokens takes the d-th next number of its request's stream. None stands
    for a row with nothing to choose: its logits are NaN, or nothing is allowed.
    """
    return listed(pick(logits, rows, prepared).tolist())


def pick(
    logits: torch.Tensor, rows: Sequence[Row], prepared: Prepared | None = None
) -> torch.Tensor:
    """`sample`, int64 [R] on the device of the logits, with NOTHING for None.

    Where nothing comes before the temperature, the device is not waited for.
    """
    if all(row.state.plain for row in rows):
        return _greedy(logits)
    scores = process(logits, rows, prepared)
    places = [i for i, row in enumerate(rows) if not row.state.greedy]
    if len(places) == len(rows):
        return _drawn(scores, rows)
    picked = _greedy(scores)
    if places:
        index = send(places, torch.int64, scores.device)
        picked[index] = _drawn(scores[index], [rows[i] for i in places])
    return picked


def _drawn(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    probs = probabilities(scores, [row.state.params for row in rows])
    return drawn(probs, [row.state.peek(len(row.draft)) for row in rows])


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    best, tokens = logits.max(-1)
    # A NaN wins every maximum; minus infinity means that nothing at all is allowed.
    return torch.where(best > NO_VALUE, tokens, NOTHING)


def distributions(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """What each row is drawn from, after temperature and filters. float32 [R, V] -> [R, V].

    scores: of `process`. Rows sum to 1; a greedy row has all of it on its most likely token. A row
    with nothing to choose is NaN throughout.
    """
    greedy = [i for i, row in enumerate(rows) if row.state.greedy]
    if not greedy:
        return probabilities(scores, [row.state.params for row in rows])
    probs = torch.zeros_like(scores)
    sure_rows = send(greedy, torch.int64, scores.device)
    best, tokens = scores[sure_rows].max(-1, keepdim=True)
    sure = torch.where(best > NO_VALUE, 1.0, float("nan"))
    probs[sure_rows] = torch.where(best > NO_VALUE, 0.0, sure).expand(-1, scores.shape[1])
    probs[sure_rows[:, None], tokens] = sure
    others = [i for i, row in enumerate(rows) if not row.state.greedy]
    if others:
        index = send(others, torch.int64, scores.device)
        probs[index] = probabilities(scores[index], [rows[i].state.params for i in others])
    return probs
