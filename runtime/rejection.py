"""Accepting a draft model's tokens so that the output follows the target's distribution exactly.

Leviathan, Kalman, Matias 2023, "Fast inference from transformers via speculative decoding"; Chen
et al. 2023, "Accelerating large language model decoding with speculative sampling". A token x that
was drawn from q is accepted with probability min(1, p(x) / q(x)). After a rejection the token comes
from what p has more than q, and not from p: accepted tokens have already used up the share of p
that q covers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .filters import draw


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """max(0, p - q) normalised, over the last dimension; where it is all zero, p itself.

    p, q: [..., V], rows that sum to 1, q of any float dtype; the result has p's. It is all zero
    only where p equals q, and then a rejection has probability 0.
    """
    rest = (p - q.to(p.dtype)).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.where(total > 0, torch.ones_like(total)), p)


def accept_chain(
    p_rows: torch.Tensor,
    q_rows: torch.Tensor,
    draft: Sequence[int],
    uniforms: Sequence[tuple[float, float]],
) -> tuple[int, int | None]:
    """How many of a sequence's k drafted tokens are taken, and the token that follows them.

    p_rows [k+1, V]: the target's `distributions` of the rows behind 0 to k drafts; q_rows [k, V]:
    what each token of the draft was drawn from (one-hot where it was not drawn). Float, rows sum to
    1, each after its own temperature and filters. uniforms: k + 1 pairs in [0, 1), two a position:
    the first decides whether its draft is accepted (unused in the last pair), the second picks the
    token if the chain ends there; `peek(i, ACCEPT)` and `peek(i, DRAW)` of the request's state.
    They must be independent of the numbers that drew the draft (`peek(i, DRAFT)`).

    The token is None if its row of p holds no distribution (NaN); drafts are not accepted there.
    """
    count = len(draft)
    if p_rows.shape[0] != count + 1 or q_rows.shape[0] != count or len(uniforms) != count + 1:
        raise ValueError(
            f"{count} drafts need {count + 1} rows of p, {count} of q and {count + 1} pairs of "
            f"uniforms, not {p_rows.shape[0]}, {q_rows.shape[0]} and {len(uniforms)}"
        )
    accepted = 0
    if count:
        tokens = torch.tensor(draft, device=p_rows.device)[:, None]
        wanted = p_rows[:count].double().gather(1, tokens)[:, 0].tolist()
        offered = q_rows.double().gather(1, tokens)[:, 0].tolist()
        # u < p / q without the division: u is below 1, so p >= q always accepts.
        while accepted < count and (uniforms[accepted][0] * offered[accepted] < wanted[accepted]):
            accepted += 1
    last = p_rows[accepted].double()
    if accepted < count:
        last = residual(last, q_rows[accepted])
    return accepted, draw(last[None], [uniforms[accepted][1]])[0]
