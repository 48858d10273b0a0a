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

    name: as in `--draft`.
    """

    name: str

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        """Up to counts[i] tokens (of a tree: levels) after each sequence, None for no idea."""

    def observe(self, sequence: Sequence, features: torch.Tensor) -> None:
        """The model's features of the row that gave the sequence's newest token, [F]."""

    def drop(self, sequence: Sequence) -> None:
        """The sequence ended or stepped back; forget it."""
