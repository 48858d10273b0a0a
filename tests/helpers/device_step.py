"""A step program without a host read, so that a device can capture it; it runs everywhere.

The logits of a row are a random function of all tokens of its sequence up to it, as the cache has
them, and of their positions. Everything is exact in float32.
"""

from __future__ import annotations

import torch

from smelt.runtime.batch import Batch, BatchLayout, CacheGroup, CacheSpec
from smelt.runtime.transfer import upload

VOCAB = 61


class DeviceStep:
    """`StepProgram` on `device`, with one layer's cache of one number a token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.vocab_size = VOCAB
        self.features = None
        self.spec = CacheSpec(4, "float32", (1,), (1,), (CacheGroup("full", 0, (0,)),))
        self.layout = BatchLayout(64, 16, 32, 64, 128)
        self.runs = 0
        make = torch.Generator().manual_seed(0)
        self._logits = (torch.randn(VOCAB, VOCAB, generator=make) * 3).to(device)

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        self.runs += 1
        tensors = batch.tensors()
        if self.device.type != "cpu":
            tensors = upload(tensors, self.device)
        ids, positions, starts, _, _, slots, tables, rows = tensors
        keys = caches[0][:, 0, :, 0, 0]
        places = torch.arange(keys.numel(), device=self.device)
        here = slots[:, None] == places
        value = (here * (ids + 1.0)[:, None]).sum(0)
        kept = keys.reshape(-1)
        keys.copy_(torch.where(here.any(0), value, kept).view(keys.shape))
        # Rows behind the last sequence read what is the last one's, and give what nobody reads.
        row = torch.arange(len(ids), device=self.device, dtype=starts.dtype)
        owner = torch.searchsorted(starts[1:].contiguous(), row, right=True)
        blocks = tables[owner.clamp(max=len(tables) - 1)].long()
        seen = keys[blocks].flatten(1)
        at = torch.arange(seen.shape[1], device=self.device)
        sees = at <= positions[:, None]
        state = torch.where(sees, seen * (at % 7 + 1), 0.0).sum(1).long() % VOCAB
        return self._logits[state][rows]

    def run_with_features(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError
