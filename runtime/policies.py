"""Who goes first: policies that the scheduler asks for an order. Plain Python, no torch.

A policy gives each sequence a key, smallest first, and may change keys as service is received.
Times are seconds of the scheduler's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from .errors import UserError
from .sequence import Sequence

Key = tuple[float, ...]


class Policy(Protocol):
    """An order of sequences.

    name: as in `--policy`; preemptive: whether a waiting sequence whose key is smaller takes the
    place of a running one (which keeps its cache blocks as long as nobody needs them).
    """

    name: str
    preemptive: bool

    def key(self, sequence: Sequence) -> Key:
        """Smaller goes first. Constant between `arrived`, `served` and `aged`."""

    def arrived(self, sequence: Sequence, budget: int) -> None:
        """A new sequence; budget: tokens of a step."""

    def served(self, sequence: Sequence, tokens: int, now: float) -> bool:
        """It received so many tokens of service; True if its key changed."""

    def aged(self, waiting: Iterable[Sequence], now: float) -> bool:
        """Called once a step; True if the key of one that waits changed."""


class Fcfs:
    """First come, first served: nobody is overtaken, and what runs stays."""

    name = "fcfs"
    preemptive = False

    def key(self, sequence: Sequence) -> Key:
        return (sequence.arrival, sequence.id, sequence.index)

    def arrived(self, sequence: Sequence, budget: int) -> None: ...

    def served(self, sequence: Sequence, tokens: int, now: float) -> bool:
        return False

    def aged(self, waiting: Iterable[Sequence], now: float) -> bool:
        return False


class Priority(Fcfs):
    """Smaller `priority` first, first come within one; waiting raises a sequence.

    Each `aging_s` seconds of waiting are worth one step of priority. As everybody ages alike, the
    order of two sequences never changes: it is that of arrival plus aging_s times priority.
    """

    name = "priority"
    preemptive = True

    def __init__(self, aging_s: float = 30.0) -> None:
        self.aging_s = aging_s

    def key(self, sequence: Sequence) -> Key:
        place = sequence.arrival + self.aging_s * sequence.priority
        return (place, sequence.id, sequence.index)


class Mlfq(Fcfs):
    """Skip-join multi-level feedback queue (FastServe: Wu et al. 2023, arXiv:2305.05920).

    Level i serves `quantum` * 2**i tokens, then the sequence goes one level down: short answers
    pass long ones without anybody knowing lengths in advance. A prompt is one long first turn, so
    a new sequence skips to the level whose quantum holds its prompt. Whoever waited `starvation_s`
    is put on top again. A smaller `priority` counts before the level.
    """

    name = "mlfq"
    preemptive = True
    levels = 8

    def __init__(self, quantum: int = 64, starvation_s: float = 60.0) -> None:
        self.quantum = quantum
        self.starvation_s = starvation_s

    def key(self, sequence: Sequence) -> Key:
        return (sequence.priority, sequence.level, sequence.queued, sequence.id, sequence.index)

    def arrived(self, sequence: Sequence, budget: int) -> None:
        # A prompt's cost counted in decode steps: chunks of a budget take about as long each.
        steps = -(-len(sequence.tokens) // budget)
        sequence.level = next(
            (i for i in range(self.levels) if self._quantum(i) >= steps), self.levels - 1
        )
        sequence.queued = sequence.arrival

    def served(self, sequence: Sequence, tokens: int, now: float) -> bool:
        sequence.served += tokens
        if sequence.served < self._quantum(sequence.level) or sequence.level == self.levels - 1:
            return False
        sequence.level += 1
        sequence.served = 0
        sequence.queued = now
        return True

    def aged(self, waiting: Iterable[Sequence], now: float) -> bool:
        changed = False
        for sequence in waiting:
            if sequence.level and now - sequence.queued > self.starvation_s:
                sequence.level = sequence.served = 0
                sequence.queued = now
                changed = True
        return changed

    def _quantum(self, level: int) -> int:
        return self.quantum << level


POLICIES: dict[str, type[Fcfs]] = {p.name: p for p in (Fcfs, Priority, Mlfq)}


def make_policy(policy: str | Policy) -> Policy:
    """A policy by name, or the one given; `UserError` for a name that is not known."""
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise UserError(f"policy {policy!r} is not known: give one of {', '.join(POLICIES)}")
    return POLICIES[policy]()
