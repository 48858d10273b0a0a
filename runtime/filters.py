"""What comes after the logits are processed: temperature, filters, and drawing a token.

Every filter keeps the tokens that are tied with the last one it keeps, and at least one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .sampling_params import SamplingParams
from .transfer import send

NO_VALUE = float("-inf")
NOTHING = -1  # in the place of a token, where nothing can be chosen


def probabilities(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution each row is drawn from. float32 [R, V] -> [R, V], rows sum to 1.

    params: one a row, none of them greedy.
    """
    column = send([p.temperature for p in params], scores.dtype, scores.device)[:, None]
    scores = _most_likely(scores / column, [p.top_k for p in params], [p.top_p for p in params])
    probs = scores.softmax(-1)
    if any(p.min_p for p in params):
        floor = send([p.min_p for p in params], scores.dtype, scores.device)[:, None]
        probs = probs.masked_fill(probs < floor * probs.amax(-1, keepdim=True), 0.0)
        # Rows without the filter are divided by 1: not even their rounding may change.
        probs = probs / probs.sum(-1, keepdim=True).where(floor > 0, torch.ones_like(floor))
    if any(p.typical_p < 1 for p in params):
        probs = _typical(probs, [p.typical_p for p in params])
    return probs


def _most_likely(scores: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Minus infinity for what top_k drops and top_p drops of the rest, perhaps in place."""
    limited = any(p < 1 for p in top_p)
    kernel = _kernel(scores.device, *scores.shape) if limited or any(top_k) else None
    if kernel is not None:
        return kernel(scores, top_k, top_p)
    if any(top_k):
        scores = _top_k(scores, top_k)
    return _top_p(scores, top_p) if limited else scores


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Compile what filters rows on a CUDA device, so that no request waits for it."""
    kernel = _kernel(device, 1, vocab_size)
    if kernel is not None:
        kernel(torch.zeros(1, vocab_size, device=device), [1], [0.5])


def _kernel(
    device: torch.device, rows: int, vocab_size: int
) -> Callable[[torch.Tensor, list[int], list[float]], torch.Tensor] | None:
    """What filters scores [rows, vocab_size] on a device without sorting them, where that pays."""
    if device.type != "cuda":
        return None
    try:
        from .kernels.gpu.sampling import filter_top, pays
    except ImportError:  # a torch without triton
        return None
    return filter_top if pays(rows, vocab_size) else None


def _top_k(scores: torch.Tensor, top_k: list[int]) -> torch.Tensor:
    vocab_size = scores.shape[1]
    counts = [min(k, vocab_size) for k in top_k]
    best = scores.topk(max(counts), -1).values
    last = send([max(k - 1, 0) for k in counts], torch.int64, scores.device)
    everything = send([k == 0 for k in counts], torch.bool, scores.device)
    threshold = best.gather(1, last[:, None]).masked_fill(everything[:, None], NO_VALUE)
    return scores.masked_fill(scores < threshold, NO_VALUE)


def _top_p(scores: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """Keep each row's smallest set of most likely tokens whose probabilities reach top_p."""
    probs = scores.softmax(-1)
    if probs.device.type == "cpu":
        rows = [_nucleus_floor(row, p) for row, p in zip(probs, top_p, strict=True)]
        return scores.masked_fill(probs < torch.stack(rows)[:, None], NO_VALUE)
    return scores.masked_fill(probs < _sorted_floors(probs, top_p), NO_VALUE)


def _sorted_floors(probs: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """[R, 1]: the probability of each row's least likely token kept, all rows at once."""
    reaches = [p if p < 1 else float("inf") for p in top_p]
    wanted = send(reaches, probs.dtype, probs.device)[:, None]
    best = probs.sort(-1, descending=True).values
    # A token is kept while those before it have not reached top_p.
    return best.gather(1, (best.cumsum(-1)[:, :-1] < wanted).sum(-1, keepdim=True))


def _nucleus_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The probability of the least likely token kept, 0 where all are. probs [V].

    Sorting a whole vocabulary costs milliseconds. Tokens below (1 - top_p) / V make up
    less than 1 - top_p together, so none of them is kept: mostly a few dozen are left to sort.
    """
    if top_p >= 1:
        return probs.new_zeros(())
    likely = probs[probs >= (1 - top_p) / len(probs)]
    if not len(likely):  # a row of NaN, which `draw` reports
        return probs.new_zeros(())
    best = likely.sort(descending=True).values
    return best[(best.cumsum(0)[:-1] < top_p).sum()]


def _typical(probs: torch.Tensor, typical_p: list[float]) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy until they reach typical_p.

    Meister et al. 2022, "Locally typical sampling". probs [R, V] -> [R, V], rows sum to 1.
    """
    places = [i for i, p in enumerate(typical_p) if p < 1]
    chosen = send(places, torch.int64, probs.device)
    rows = probs[chosen]
    surprise = -rows.log()
    entropy = (rows * surprise).nansum(-1, keepdim=True)
    distance = (surprise - entropy).abs()
    nearest, order = distance.sort(-1)
    wanted = send([typical_p[i] for i in places], rows.dtype, rows.device)[:, None]
    reached = (rows.gather(1, order).cumsum(-1) < wanted).sum(-1, keepdim=True)
    threshold = nearest.gather(1, reached.clamp(max=rows.shape[1] - 1))
    kept = rows.masked_fill(distance > threshold, 0.0)
    probs = probs.clone()
    probs[chosen] = kept / kept.sum(-1, keepdim=True)
    return probs


def draw(probs: torch.Tensor, uniforms: Sequence[float]) -> list[int | None]:
    """`drawn`, on the host. None for a row of NaN."""
    return listed(drawn(probs, uniforms).tolist())


def listed(tokens: Sequence[int]) -> list[int | None]:
    """None in the places of NOTHING."""
    return [None if token == NOTHING else token for token in tokens]


def drawn(probs: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution. probs [R, V], uniforms in [0, 1).

    In float64, so that the tail of a large vocabulary keeps its exact share. int64 [R] on the
    device of `probs`, which is not waited for; NOTHING for a row of NaN.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    uniform = send(uniforms, torch.float64, probs.device)
    # Strictly below the total: the last token of zero probability must stay out of reach.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # No mass: NaN logits, or none allowed (their softmax is NaN).
    return torch.where(total > 0, found, NOTHING)
