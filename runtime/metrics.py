"""What an engine has done and how long things took: counters, the present state, histograms."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

# Upper bounds in seconds: of a first token, and of the time between two.
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ITL_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass
class Histogram:
    """Counts by upper bound, as Prometheus has them. bounds: ascending; counts: one more."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def quantile(self, share: float) -> float:
        """An upper bound of the value below which `share` of all lie; 0 where there are none."""
        wanted, seen = share * self.count, 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            if seen and seen >= wanted:
                return bound
        return 0.0


@dataclass
class Metrics:
    """Counters since the engine was made, and what is so now.

    Tokens: prefilled (computed of prompts), asked (of prompts that began), reused (of those, found
    in the cache), generated, drafted and accepted (of those). steps: of the model; draft_steps:
    those with a draft of some sequence, draft_sequences: its sequences. ttft: seconds to the first
    token; itl: between two tokens of an answer, tokens of one step sharing its time. graphs: CUDA
    graphs that were captured, graph_bytes: device memory they take.
    """

    steps: int = 0
    prefilled_tokens: int = 0
    asked_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    requests: int = 0
    errors: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_steps: int = 0
    draft_sequences: int = 0
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    graphs: int = 0
    graph_bytes: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS))
    itl: Histogram = field(default_factory=lambda: Histogram(ITL_BOUNDS))

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the cache."""
        return self.reused_tokens / self.asked_tokens if self.asked_tokens else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that the model took."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens that a sequence got from a step with a draft, on average; 1 without any."""
        if not self.draft_sequences:
            return 1.0
        return 1.0 + self.accepted_tokens / self.draft_sequences
