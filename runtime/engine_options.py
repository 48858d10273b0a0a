"""What an engine drives, and how it is asked to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .batch import Batch, BatchLayout, CacheSpec
from .policies import Policy
from .speculation.drafter import Drafter

# Tokens and rows of every step in deterministic mode: whole tiles of every matrix kernel.
DETERMINISTIC_TOKENS = 32


class StepProgram(Protocol):
    """A compiled step: packed tokens in, logits out, caches changed in place."""

    spec: CacheSpec
    layout: BatchLayout
    vocab_size: int
    device: torch.device

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        """Logits [R, V] of `batch.logits_rows`, of any float dtype."""


@dataclass(frozen=True)
class EngineOptions:
    """blocks: cache blocks, otherwise from `kv_cache_tokens` or `kv_cache_fraction`.

    prefix_cache: keep what was computed for later requests. policy: the order of requests.
    max_tokens: of a step, at most the graph's: longer prompts are cut into chunks of it, so that
    nobody who decodes waits longer than for one.
    deterministic: greedy tokens depend on nothing but the prompt; every step then computes
    `DETERMINISTIC_TOKENS` rows. drafter: proposes tokens; draft_tokens: how many, None for as many
    as pay.
    """

    blocks: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_fraction: float | None = None
    prefix_cache: bool = True
    policy: str | Policy = "fcfs"
    max_tokens: int = 512
    deterministic: bool = False
    drafter: Drafter | None = None
    draft_tokens: int | None = None
