"""From logits to tokens, for all rows of a step at once.

Each row has its own parameters and its own random numbers, and no operation mixes rows, so a
request's tokens depend on its seed and logits alone, not on what else runs in the batch.
`probabilities` and `draw` are separate because speculation compares whole distributions.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Sequence

import torch

from .sampling_params import SamplingParams

NO_VALUE = float("-inf")


class SamplerState:
    """What the sampler remembers of one request.

    prompt_length: tokens that count as prompt and not as answer.
    ends: token ids that may not come before `min_tokens`.
    """

    def __init__(
        self, params: SamplingParams, prompt_length: int = 0, ends: Iterable[int] = ()
    ) -> None:
        self.params = params
        self.prompt_length = prompt_length
        self.ends = sorted(ends)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        # Python's generator: a number costs 50 ns (torch's: microseconds) and it is the same on
        # every device and version.
        self._random = None if params.greedy else random.Random(seed)
        self._seen: torch.Tensor | None = None
        self._marked = 0

    @property
    def plain(self) -> bool:
        """Whether the most likely token is the answer, with nothing to change before."""
        params = self.params
        return params.greedy and params.repetition_penalty == 1 and not params.min_tokens

    def uniform(self) -> float:
        """The next random number of this request, in [0, 1)."""
        assert self._random is not None
        return self._random.random()

    def seen(self, tokens: list[int], vocab_size: int, device: torch.device) -> torch.Tensor:
        """bool [V]: which tokens occur in `tokens`, a list that only grows from call to call."""
        if self._seen is None:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        if self._marked < len(tokens):
            new = torch.tensor(tokens[self._marked :], device=device)
            self._seen[new[new < vocab_size]] = True
            self._marked = len(tokens)
        return self._seen


def sample(
    logits: torch.Tensor, states: Sequence[SamplerState], histories: Sequence[list[int]]
) -> list[int | None]:
    """One token a row. logits [R, V] of any float dtype; histories: all tokens so far, a row each.

    None stands for a row whose logits hold no number to choose by (NaN).
    """
    if all(state.plain for state in states):
        return _greedy(logits)
    scores = constrain(logits.float(), states, histories)
    drawn = [i for i, state in enumerate(states) if not state.params.greedy]
    if len(drawn) == len(states):
        return _drawn(scores, states)
    picked = _greedy(scores)
    for i, token in zip(drawn, _drawn(scores[drawn], [states[i] for i in drawn]), strict=True):
        picked[i] = token
    return picked


def _drawn(scores: torch.Tensor, states: Sequence[SamplerState]) -> list[int | None]:
    if not states:
        return []
    probs = probabilities(scores, [state.params for state in states])
    return draw(probs, [state.uniform() for state in states])


def _greedy(logits: torch.Tensor) -> list[int | None]:
    best, tokens = logits.max(-1)
    picked: list[int | None] = tokens.tolist()
    for i, value in enumerate(best.tolist()):
        # A NaN wins every maximum; minus infinity means that nothing at all is allowed.
        if value != value or value == NO_VALUE:
            picked[i] = None
    return picked


def constrain(
    scores: torch.Tensor, states: Sequence[SamplerState], histories: Sequence[list[int]]
) -> torch.Tensor:
    """Repetition penalty and minimum length, before any temperature. float32 [R, V] -> same."""
    vocab_size = scores.shape[1]
    penalised = [i for i, s in enumerate(states) if s.params.repetition_penalty != 1]
    early = [
        i
        for i, state in enumerate(states)
        if len(histories[i]) - state.prompt_length < state.params.min_tokens
    ]
    if not penalised and not early:
        return scores
    scores = scores.clone()
    if penalised:
        seen = torch.stack(
            [states[i].seen(histories[i], vocab_size, scores.device) for i in penalised]
        )
        penalty = scores.new_tensor([states[i].params.repetition_penalty for i in penalised])
        rows = scores[penalised]
        changed = torch.where(rows < 0, rows * penalty[:, None], rows / penalty[:, None])
        scores[penalised] = torch.where(seen, changed, rows)
    for i in early:
        scores[i, [t for t in states[i].ends if t < vocab_size]] = NO_VALUE
    return scores


def probabilities(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution each row is drawn from. float32 [R, V] -> [R, V], rows sum to 1.

    params: one a row, none of them greedy.
    """
    column = scores.new_tensor([p.temperature for p in params])[:, None]
    scores = scores / column
    if any(p.top_k for p in params):
        scores = _top_k(scores, [p.top_k for p in params])
    if any(p.top_p < 1 for p in params):
        scores = _top_p(scores, [p.top_p for p in params])
    probs = scores.softmax(-1)
    if any(p.min_p for p in params):
        floor = scores.new_tensor([p.min_p for p in params])[:, None]
        probs = probs.masked_fill(probs < floor * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _top_k(scores: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    vocab_size = scores.shape[1]
    counts = [min(k, vocab_size) for k in top_k]
    best = scores.topk(max(counts), -1).values
    last = torch.tensor([max(k - 1, 0) for k in counts], device=scores.device)
    everything = torch.tensor([k == 0 for k in counts], device=scores.device)
    threshold = best.gather(1, last[:, None]).masked_fill(everything[:, None], NO_VALUE)
    return scores.masked_fill(scores < threshold, NO_VALUE)


def _top_p(scores: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """Keep each row's smallest set of most likely tokens whose probabilities reach top_p."""
    probs = scores.softmax(-1)
    floors = torch.stack([_nucleus_floor(row, p) for row, p in zip(probs, top_p, strict=True)])
    return scores.masked_fill(probs < floors[:, None], NO_VALUE)


def _nucleus_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probability of the least likely token kept, 0 where all are. probs [V].

    On the CPU, sorting a whole vocabulary costs milliseconds. Tokens below (1 - top_p) / V make up
    less than 1 - top_p together, so none of them is kept: mostly a few dozen are left to sort.
    """
    if top_p >= 1:
        return probs.new_zeros(())
    likely = probs[probs >= (1 - top_p) / len(probs)] if probs.device.type == "cpu" else probs
    if not len(likely):  # a row of NaN, which `draw` reports
        return probs.new_zeros(())
    best = likely.sort(descending=True).values
    # A token is kept while those before it have not reached top_p.
    return best[(best.cumsum(0)[:-1] < top_p).sum()]


def draw(probs: torch.Tensor, uniforms: Sequence[float]) -> list[int | None]:
    """One token a row by inverting the cumulative distribution. probs [R, V], uniforms in [0, 1).

    In float64, so that the tail of a large vocabulary keeps its exact share. None for a row of NaN.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=probs.device)
    # Strictly below the total: the last token of zero probability must stay out of reach.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    tokens: list[int | None] = found.tolist()
    for i, mass in enumerate(total.tolist()):
        if not mass > 0:  # NaN logits, or none allowed (their softmax is NaN)
            tokens[i] = None
    return tokens
