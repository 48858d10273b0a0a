"""`QuantSpec`: the one type that says how a model is quantized: method x format.

A method says how scales and weights are found, a format how they are stored and multiplied. A
combination that does not work is refused here, before a weight is read, with the reason and the
nearest one that works. What is written to disk follows the configuration of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from smelt.runtime.errors import UserError

ROLES = ("lm_head", "router")


@dataclass(frozen=True)
class Format:
    """A way to store weights. bits a value; symmetric: no zero point; group: the default size."""

    bits: int
    symmetric: bool
    group: int


FORMATS = {
    "int4": Format(bits=4, symmetric=False, group=128),
    "int3": Format(bits=3, symmetric=False, group=128),
    "int2": Format(bits=2, symmetric=False, group=128),
    "int8": Format(bits=8, symmetric=True, group=0),
}

# Formats of each method. What searches finds nothing at 8 bits, where rounding loses less than it
# could win back, and at 2 bits neither scales nor error compensation save a layer.
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "rtn": ("int4", "int8", "int3", "int2"),
    "awq": ("int4", "int3"),
    "gptq": ("int4", "int3"),
}
_NEEDS_TEXT = {"awq", "gptq"}
_NOT_YET = {
    "smoothquant": "rtn with format int8",
    "fp8": "rtn with format int8",
    "mixed": "awq",
}


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored: its format and group size along K (0: the whole row)."""

    format: str
    group_size: int

    def groups(self, k: int) -> int:
        """Scales a row of K features has. A size that does not divide K: one for the row."""
        size = self.group_size
        return k // size if size and k % size == 0 else 1

    def fits(self, k: int) -> bool:
        """Whether the group size divides K."""
        return not self.group_size or k % self.group_size == 0


@dataclass(frozen=True)
class QuantSpec:
    """method x format, and what stays at 16 bits.

    method: none, rtn, awq, gptq. format: int4, int3, int2 (asymmetric, groups along K), int8
    (symmetric, one scale a row, groups on request). group_size: None is the format's own, 0 or -1
    the whole row. keep: the roles that are left alone: "lm_head" (the linear that gives the logits)
    and "router" (the one that chooses experts). min_features: a linear with fewer rows or columns
    is left alone.

    Raises UserError for what does not work, naming what does.
    """

    method: str = "none"
    format: str = "int4"
    group_size: int | None = None
    keep: tuple[str, ...] = ROLES
    min_features: int = 16

    def __post_init__(self) -> None:
        _check_method(self.method, self.format)
        _check_group_size(self.group_size, self.format)
        object.__setattr__(self, "keep", tuple(self.keep))
        for role in self.keep:
            if role not in ROLES:
                raise UserError(f"quantization: no role {role!r} to keep; {', '.join(ROLES)} exist")
        if self.group_size is None:
            object.__setattr__(self, "group_size", FORMATS[self.format].group)
        elif self.group_size == -1:
            object.__setattr__(self, "group_size", 0)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method runs text through the model."""
        return self.method in _NEEDS_TEXT

    def scheme(self, layer: str) -> Scheme:
        """The scheme of the linear at module path `layer`; the same for all of them so far."""
        assert self.group_size is not None
        return Scheme(self.format, self.group_size)

    def label(self) -> str:
        """One word for tables and file names: "awq-int4-g128", "rtn-int8", "none"."""
        if self.method == "none":
            return "none"
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"{self.method}-{self.format}{group}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of `to_json`. Raises UserError for a field this version does not know."""
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise UserError(
                    f"quantization settings hold {name!r}, which this version of smelt does not "
                    f"know (it knows {', '.join(sorted(known))}); was it made by a newer one?"
                )
        return cls(**{**data, "keep": tuple(data.get("keep", ROLES))})

    def compressed_tensors_config(self, ignore: tuple[str, ...] = ()) -> dict[str, Any]:
        """`quantization_config` in the compressed-tensors form; ignore: module paths left alone.

        Empty for method none.
        """
        if self.method == "none":
            return {}
        form = FORMATS[self.format]
        weights = {
            "num_bits": form.bits,
            "type": "int",
            "symmetric": form.symmetric,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size or None,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _check_method(method: str, format: str) -> None:
    if method in _NOT_YET:
        raise UserError(
            f"quantization method {method} is not supported yet; the nearest is {_NOT_YET[method]}"
        )
    if method not in METHODS:
        raise UserError(f"no quantization method {method!r}; {', '.join(METHODS)} exist")
    if format not in FORMATS:
        raise UserError(f"no weight format {format!r}; {', '.join(FORMATS)} exist")
    if method != "none" and format not in METHODS[method]:
        why = (
            f"at {format} plain rounding loses less than {method} could win back"
            if FORMATS[format].bits >= 8
            else f"{format} costs more than {method} can win back"
        )
        raise UserError(
            f"{method} works with {', '.join(METHODS[method])}, not {format}: {why}; use rtn with "
            f"{format}, or {method} with {METHODS[method][-1]}"
        )


def _check_group_size(size: int | None, format: str) -> None:
    if size is None or size in (0, -1):
        return
    if isinstance(size, bool) or not isinstance(size, int):
        raise UserError(f"group size {size!r} is not a whole number")
    if size < 16 or size % 8:
        nearest = max(16, round(size / 16) * 16)
        raise UserError(
            f"group size {size}: {format} kernels read weights eight at a time and a scale per few "
            f"weights saves nothing, so it must be a multiple of 8 from 16 up; the nearest is "
            f"{nearest} (0: one group a row)"
        )
