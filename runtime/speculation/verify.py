"""Which drafted tokens the model takes. A chain or a tree, drawn or chosen, in one place.

A token that was chosen (n-gram, heads) is verified by drawing from the model's own distribution
and comparing: it is taken with probability p(x), and otherwise the token comes from p without x,
which is norm(max(0, p - q)) for a q that has all of its mass on x. So the output is the very text
that plain decoding gives for the same seed. Tokens drawn from a draft model's distribution go
through rejection sampling (runtime/rejection.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from ..rejection import accept_chain
from ..sampler import ACCEPT, DRAW, Row, distributions
from ..sequence import Chunk


@dataclass
class Taken:
    """tokens: what the sequence goes on with, at least one (None: nothing could be chosen).

    path: indices of the drafted tokens among them, in order; the last token is never of the draft.
    """

    tokens: list[int | None]
    path: list[int]


def walk(chunk: Chunk, picked: Items[int | None]) -> Taken:
    """Follow the drafted tokens as long as they are what the model picked behind the one before.

    picked: the model's token behind the last known token, then behind each drafted one.
    """
    draft, parents = chunk.draft, chunk.parents
    tokens: list[int | None] = [picked[0]]
    path: list[int] = []
    node = -1
    while tokens[-1] is not None:
        children = (node + 1,) if parents is None else range(node + 1, len(draft))
        found = next(
            (
                i
                for i in children
                if i < len(draft)
                and draft[i] == tokens[-1]
                and (parents is None or parents[i] == node)
            ),
            None,
        )
        # A row behind a draft that cannot be judged is asked again as a first row.
        if found is None or picked[found + 1] is None:
            break
        node = found
        path.append(node)
        tokens.append(picked[node + 1])
    return Taken(tokens, path)


def reject(chunk: Chunk, scores: torch.Tensor, rows: Items[Row], q: torch.Tensor) -> Taken:
    """Rejection sampling of a chain drawn from q [k, V]. scores float32 [k+1, V], processed."""
    state = rows[0].state
    count = len(chunk.draft)
    uniforms = [(state.peek(i, ACCEPT), state.peek(i, DRAW)) for i in range(count + 1)]
    accepted, token = accept_chain(distributions(scores, rows), q[:count], chunk.draft, uniforms)
    return Taken([*chunk.draft[:accepted], token], list(range(accepted)))


def slots_to_move(chunk: Chunk, path: Items[int]) -> list[tuple[int, int]]:
    """Positions (from, to) that bring an accepted branch of a tree to where its tokens stand."""
    first = chunk.start + chunk.known
    return [(first + node, first + i) for i, node in enumerate(path) if node != i]
