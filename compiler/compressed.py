"""The compressed-tensors format, written: packed integers and the configuration that names them.

weight_packed int32 [N, ceil(K*bits/32)] holds the values of a row, offset to be unsigned, the first
in the lowest bits; weight_zero_point likewise along N; weight_shape is [N, K].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Scheme:
    """bits; symmetric: no zero points; group: features a scale, 0 for the whole row."""

    bits: int
    symmetric: bool
    group: int

    def to_json(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }


def packed_tensors(
    q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """One linear's tensors by leaf name.

    q: uint8 [N, K] with zeros uint8 [N, G] (4 bits), or int8 [N, K] without (8 bits). scales [N, G]
    are written in `dtype` where it holds them exactly, else in float32.
    """
    bits = 4 if zeros is not None else 8
    unsigned = q if zeros is not None else q.to(torch.int16) + 128
    cast = scales.to(dtype)
    exact = torch.equal(cast.float(), scales.float())
    out = {
        "weight_packed": _words(unsigned, bits),
        "weight_scale": cast if exact else scales.float(),
        "weight_shape": torch.tensor(list(q.shape)),
    }
    if zeros is not None:
        out["weight_zero_point"] = _words(zeros.T, bits).T.contiguous()
    return out


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] of unsigned values -> int32 [R, ceil(C*bits/32)]."""
    a_word = 32 // bits
    padded = F.pad(values.to(torch.int32), (0, -values.shape[1] % a_word))
    places = padded.unflatten(1, (-1, a_word))
    packed = torch.zeros_like(places[..., 0])
    for place in range(a_word):
        packed |= places[..., place] << (bits * place)
    return packed


def configuration(modules: Mapping[str, Scheme], left: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` for quantized `modules`; left: the other linears of the model."""
    schemes = list(dict.fromkeys(modules.values()))
    groups = {}
    for i, scheme in enumerate(schemes):
        names = [name for name, own in modules.items() if own == scheme]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else names,
            "weights": scheme.to_json(),
            "input_activations": None,
            "output_activations": None,
        }
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(left),
        "kv_cache_scheme": None,
    }
    if not all(scheme.symmetric for scheme in schemes):
        # transformers 5 has no place for packed zero points but this way; others ignore the key.
        config["dequantize"] = True
    return config
