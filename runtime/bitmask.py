"""Single bits of a packed mask over the vocabulary. Without torch, for the compiling process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def set_bits(mask: torch.Tensor, tokens: Iterable[int], value: bool) -> None:
    """Allow these tokens or take them out. mask: int32 [W] on the CPU, 32 tokens an entry."""
    words = mask.numpy().view("uint32")
    for token in tokens:
        if token // 32 < len(words):
            bit, word = 1 << (token % 32), int(words[token // 32])
            words[token // 32] = word | bit if value else word & ~bit
