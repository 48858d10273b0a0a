"""Rotary factors that depend on how long a sequence is: which ones a cached key was turned by.

The cache holds keys that are turned already, so the factors are part of what a block holds. Two
ways of scaling positions read the length; what smelt does when a cached sequence passes the limit:

longrope (LongRoPE: Ding et al. 2024, arXiv:2402.13753) has two sets of factors, and all keys of a
sequence must have the same. A sequence that passes the limit while it is decoded gives its cache
up and is computed again, whole, with the long factors: its logits are always those of one forward
over all its tokens.

dynamic NTK (bloc97 and emozilla 2023; YaRN: Peng et al. 2023, arXiv:2309.00071, section 3.3) has
other factors for every length beyond the limit. A token keeps those of its sequence's length when
it came: the tokens of a prompt the prompt's length, each generated token its own place. That is
what transformers does with a cache. It depends on nothing else, so a sequence that is preempted and
computed again gets the same keys.

Plain Python: the scheduler reads this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LONGROPE, DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True)
class LengthScaling:
    """kind: LONGROPE or DYNAMIC; limit: the longest sequence with the factors of training."""

    kind: str
    limit: int

    def __post_init__(self) -> None:
        if self.kind not in (LONGROPE, DYNAMIC):
            raise ValueError(f"rotary scaling {self.kind!r} does not depend on the length")

    def regime(self, tokens: int, prompt: int) -> int:
        """Names the factors of a sequence of `tokens` tokens, the first `prompt` of them given.

        Sequences of different regimes share no cached block; 0 up to the limit. In one regime the
        factors of a token are a function of its position.
        """
        if self.kind == LONGROPE:
            return int(tokens > self.limit)
        return prompt if prompt > self.limit else 0

    def lengths(self, tokens: int, prompt: int, positions: Sequence[int]) -> list[int]:
        """The length that gives the factors of the tokens at `positions` of such a sequence."""
        if self.kind == LONGROPE:
            return [tokens] * len(positions)
        return [max(prompt, position + 1) for position in positions]

    def room(self, tokens: int) -> int | None:
        """How many drafted tokens may follow `tokens` in one step; None: any number.

        A draft beyond the limit would be judged with the wrong factors.
        """
        if self.kind == LONGROPE and tokens <= self.limit:
            return self.limit - tokens
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LengthScaling:
        return cls(str(data["kind"]), int(data["limit"]))
