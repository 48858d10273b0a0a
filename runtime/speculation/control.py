"""How many tokens to draft: as many as pay, and none while drafting loses.

With acceptance a (the chance that a token is taken if those before it were), a draft of k gives
(1 - a^(k+1)) / (1 - a) tokens a step (Leviathan et al. 2023). What a step of so many tokens costs,
and what proposing costs, is measured while it happens; the best rate wins. Every so often another
length is tried, so that a text that becomes predictable is noticed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

LENGTHS = (0, 1, 2, 3, 4, 6, 8)
PROBE_EVERY = 48  # steps, doubled each time that a probe finds nothing better
PROBE_AT_LEAST_EVERY = 1536
DECIDE_EVERY = 4  # steps: the choice costs as much as a small model's sampling
KEEP = 0.9  # of an old estimate, with each new measurement


class Average:
    """An exponential moving average that begins with its first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else KEEP * self.value + (1 - KEEP) * value


class DraftLength:
    """Chooses the length of the next draft. fixed: always that, otherwise by what pays.

    longest: what may be chosen at most. nodes: the tokens of a draft of so many levels, for trees.
    """

    def __init__(
        self,
        fixed: int | None = None,
        longest: int = 8,
        nodes: Callable[[int], int] = lambda levels: levels,
    ) -> None:
        self.fixed = fixed if fixed is None else min(fixed, longest)
        self.nodes = nodes
        self.lengths = [n for n in LENGTHS if n <= longest]
        self.acceptance = Average()
        self.proposing = Average()  # seconds a proposed token
        self._seconds: dict[int, Average] = defaultdict(Average)  # of a step, by its tokens
        self._until_probe = PROBE_EVERY
        self._pause = PROBE_EVERY
        self._last = self._sequences = 0

    def choose(self, sequences: int) -> int:
        """Tokens to draft for each of so many sequences, 0 for none."""
        if self.fixed is not None:
            return self.fixed
        plain = self._seconds[_size(sequences)].value
        accepted = self.acceptance.value
        if plain is None:
            return 0  # what a step costs without a draft has to be known first
        middle = self.lengths[len(self.lengths) // 2]
        if accepted is None:
            return middle
        self._until_probe -= 1
        if self._until_probe % DECIDE_EVERY and sequences == self._sequences:
            return self._last
        self._sequences = sequences
        best = max(self.lengths, key=lambda n: self._rate(n, sequences, accepted, plain))
        if bool(best) != bool(self._last):
            self._pause = PROBE_EVERY
        self._last = best
        if self._until_probe > 0:
            return best
        self._pause = min(2 * self._pause, PROBE_AT_LEAST_EVERY)
        self._until_probe = self._pause
        return 0 if best else middle

    def _rate(self, count: int, sequences: int, accepted: float, plain: float) -> float:
        """Tokens a second and sequence; a size never seen costs what smaller ones do."""
        a = min(accepted, 0.99)
        tokens = (1 - a ** (count + 1)) / (1 - a)
        nodes = self.nodes(count)
        seconds = self._seconds[_size(sequences * (1 + nodes))].value
        if seconds is None:
            known = [v.value for n, v in self._seconds.items() if n <= sequences * (1 + nodes)]
            seconds = max([v for v in known if v is not None], default=plain)
        return tokens / (seconds + (self.proposing.value or 0.0) * nodes * sequences)

    def proposed(self, tokens: int, seconds: float) -> None:
        """So many tokens were proposed in so many seconds."""
        if tokens:
            self.proposing.add(seconds / tokens)

    def verified(self, judged: int, accepted: int) -> None:
        """Of `judged` tokens whose predecessors were all taken, `accepted` were taken."""
        if judged:
            self.acceptance.add(accepted / judged)

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step of decoding alone, of so many tokens, took so long."""
        self._seconds[_size(tokens)].add(seconds)


def _size(tokens: int) -> int:
    """Steps of nearly equal sizes share a measurement: to the next of 1 to 8, then of eighths."""
    if tokens <= 8:
        return tokens
    unit = 1 << (tokens.bit_length() - 4)
    return -(-tokens // unit) * unit
