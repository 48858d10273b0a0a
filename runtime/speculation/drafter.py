"""What proposes tokens, and what it proposes."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..sequence import Sequence

if TYPE_CHECKING:
    import torch


@dataclass
class Proposal:
    """Tokens that may follow a sequence.

    tokens: k of them; parents: of each the index of the token before it, -1 for the sequence's
    last; None is a chain. q: float32 [k, V], the distributions the tokens were drawn from; None
    where they were chosen and not drawn, and always for trees.
    """

    tokens: list[int]
    parents: list[int] | None = None
    q: torch.Tensor | None = None


class Drafter(Protocol):
    """Proposes tokens for sequences that decode.

    name: as in `--draft`. Drafters that read the model's features also have `features`, the kind
    they want (`Features.kind`); those whose proposals have an end have `longest`, the most tokens
    (of a tree: levels) that they give; those that give trees have `nodes(levels)`, their tokens.
    """

    name: str

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        """Up to counts[i] tokens (of a tree: levels) after each sequence, None for no idea."""

    def observe(self, sequence: Sequence, position: int, features: torch.Tensor) -> None:
        """The model's features [n, F] of the sequence's tokens from `position` on, after a step.

        Of kind "final" only the row that gives the newest token (n is 1); otherwise all tokens of
        the step that are the sequence's own, in order. What the prefix cache supplied never
        comes; what is computed again after a preemption comes again.
        """

    def drop(self, sequence: Sequence) -> None:
        """The sequence ended or stepped back; forget it."""
