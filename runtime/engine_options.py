"""What an engine drives, and how it is asked to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .batch import Batch, BatchLayout, CacheSpec, Features
from .policies import Policy
from .speculation.drafter import Drafter

# Tokens and rows of every step in deterministic mode: whole tiles of every matrix kernel.
DETERMINISTIC_TOKENS = 32


class StepProgram(Protocol):
    """A compiled step: packed tokens in, logits out, caches changed in place.

    features: what `run_with_features` gives beside logits, None where there is no such output.
    """

    spec: CacheSpec
    layout: BatchLayout
    vocab_size: int
    device: torch.device
    features: Features | None

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        """Logits [R, V] of `batch.logits_rows`, of any float dtype; valid until the next run."""

    def run_with_features(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`run`, and the features beside it."""


@dataclass(frozen=True)
class EngineOptions:
    """blocks: cache blocks, otherwise from `kv_cache_tokens` or `kv_cache_fraction`.

    prefix_cache: keep what was computed for later requests. policy: the order of requests.
    max_tokens: of a step, at most the graph's: longer prompts are cut into chunks of it, so that
    nobody who decodes waits longer than for one.
    deterministic: greedy tokens depend on nothing but the prompt; every step then computes
    `DETERMINISTIC_TOKENS` rows. drafter: proposes tokens; draft_tokens: how many, None for as many
    as pay. cuda_graphs: replay decode steps as graphs, on CUDA. run_ahead: launch a step
    before the tokens of the one before are read, where that is possible; None: on CUDA.
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
    cuda_graphs: bool = True
    run_ahead: bool | None = None
