"""A quantized linear of an artifact in plain values, to be cut apart, dequantized or written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .compressed import Scheme


@dataclass(frozen=True)
class Packed:
    """A quantized linear [N, K].

    q: uint8 with zeros, int8 or float8_e4m3fn [N, K]. scales: [N, G], those of blocks repeated for
    each of their rows. zeros: uint8 [N, G] or None. order int64 [K]: the feature each column
    belongs to, or None. input_scale: float32 [1] of static activations, or None. A symmetric scheme
    has no zeros, or they are all 8.
    """

    q: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> Packed:
        """Output rows start to stop."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, q=self.q[start:stop], scales=self.scales[start:stop], zeros=zeros)

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K], features in the model's order."""
        k, groups = self.q.shape[1], self.scales.shape[1]
        size = self.scheme.block or k // groups

        def of_feature(x: torch.Tensor) -> torch.Tensor:
            return x.float().repeat_interleave(size, 1)[:, :k]

        q = self.q.float()
        if self.zeros is not None:
            q = q - of_feature(self.zeros)
        weight = q * of_feature(self.scales)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)
