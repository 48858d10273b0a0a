"""The compressed-tensors format, written: quantized values and the configuration that names them.

pack-quantized    weight_packed int32 [N, ceil(K*bits/32)] holds the values of a row, offset to be
                  unsigned, the first in the lowest bits; weight_zero_point likewise along N;
                  weight_shape is [N, K].
int-quantized,    weight int8 or float8_e4m3fn [N, K], input_scale where inputs are rounded with one
float-quantized,  scale. Named naive-quantized where inputs are left alone.
naive-quantized
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from .packed import Packed

# The linears of experts. transformers takes the scheme of experts from a pattern with that word.
EXPERTS = r"re:.*\.experts\.\d+\..*"


@dataclass(frozen=True)
class Scheme:
    """How a linear is stored. bits; symmetric: no zero points; group: features a scale, 0 for the
    whole row; kind: "int" or "float"; block: a scale for block x block weights, or 0; inputs: how
    the layer's input is rounded, "none", "dynamic" or "static"."""

    bits: int
    symmetric: bool
    group: int = 0
    kind: str = "int"
    block: int = 0
    inputs: str = "none"

    @property
    def format(self) -> str:
        """The name of the layout."""
        if self.kind == "float":
            return "naive-quantized" if self.inputs == "none" else "float-quantized"
        return "pack-quantized" if self.inputs == "none" else "int-quantized"

    def to_json(self) -> dict[str, Any]:
        """An entry of config_groups, without its targets."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }
        if self.block:
            weights |= {"strategy": "block", "block_structure": [self.block, self.block]}
        return {
            "weights": weights,
            "input_activations": self._inputs(),
            "output_activations": None,
            "format": self.format,
        }

    def _inputs(self) -> dict[str, Any] | None:
        if self.inputs == "none":
            return None
        strategy = "group" if self.block else "token"
        return {
            "num_bits": self.bits,
            "type": self.kind,
            "symmetric": True,
            "strategy": strategy if self.inputs == "dynamic" else "tensor",
            "group_size": self.block if self.block and self.inputs == "dynamic" else None,
            "dynamic": self.inputs == "dynamic",
        }


def tensors(packed: Packed, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One linear's tensors by leaf name. Scales are written in `dtype` where it holds them exactly,
    else in float32."""
    cast = packed.scales.to(dtype)
    exact = torch.equal(cast.float(), packed.scales.float())
    scales, scheme = cast if exact else packed.scales.float(), packed.scheme
    if scheme.format != "pack-quantized":
        scales = scales[:: scheme.block] if scheme.block else scales
        found = {"weight": packed.q, "weight_scale": scales}
        return found if packed.input_scale is None else {**found, "input_scale": packed.input_scale}
    unsigned = packed.q if packed.zeros is not None else packed.q.to(torch.int16) + 128
    found = {
        "weight_packed": _words(unsigned, scheme.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(list(packed.q.shape)),
    }
    if packed.zeros is not None and not scheme.symmetric:
        found["weight_zero_point"] = _words(packed.zeros.T, scheme.bits).T.contiguous()
    return found


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] of unsigned values -> int32 [R, ceil(C*bits/32)]."""
    a_word = 32 // bits
    padded = F.pad(values.to(torch.int32), (0, -values.shape[1] % a_word))
    places = padded.unflatten(1, (-1, a_word))
    packed = torch.zeros_like(places[..., 0])
    for place in range(a_word):
        packed |= places[..., place] << (bits * place)
    return packed


def configuration(
    modules: Mapping[str, Scheme], left: Sequence[str], experts: Scheme | None = None
) -> dict[str, Any]:
    """`quantization_config` for quantized `modules`; left: the other linears of the model; experts:
    the scheme of all linears of experts, None where there are none."""
    schemes = list(dict.fromkeys(modules.values()))
    alike = len({*schemes, experts} - {None}) == 1
    groups = {}
    for i, scheme in enumerate(schemes):
        names = [name for name, own in modules.items() if own == scheme]
        groups[f"group_{i}"] = {"targets": ["Linear"] if alike else names, **scheme.to_json()}
    if experts is not None and not (alike and schemes):
        schemes.append(experts)
        targets = ["Linear"] if alike else [EXPERTS]
        groups[f"group_{len(groups)}"] = {"targets": targets, **experts.to_json()}
    formats = {scheme.format for scheme in schemes}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(left),
        "kv_cache_scheme": None,
    }
    if not all(scheme.symmetric for scheme in schemes):
        # transformers 5 has no place for packed zero points but this way; others ignore the key.
        config["dequantize"] = True
    return config
