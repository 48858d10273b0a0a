"""`QuantSpec`: the one type that says how a model is quantized: method x format.

A method says how scales and weights are found, a format how they are stored and multiplied. A
combination that does not work is refused here, before a weight is read, with the reason and the
nearest one that works.
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
    "fp8": Format(bits=8, symmetric=True, group=0),
}

# Formats of each method, its default first. What searches finds nothing at 8 bits, where rounding
# loses less than it could win back, and at 2 bits neither scales nor error compensation save a
# layer.
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "rtn": ("int4", "int8", "int3", "int2", "fp8"),
    "awq": ("int4", "int3"),
    "gptq": ("int4", "int3"),
    "smoothquant": ("int8",),
    "fp8": ("fp8",),
    "mixed": ("mixed",),
}
_NEEDS_TEXT = {"awq", "gptq", "mixed"}
# Methods whose layers quantize their input, too: per token as it comes, or with one scale found by
# calibration.
_ACTIVATIONS = {"smoothquant": ("dynamic", "static"), "fp8": ("dynamic", "static")}
FP8_BLOCK = 128
# Of mixed: the budget when none is given, and what its formats allow (`mixed.py`).
DEFAULT_BITS = 4.5
BITS = (2.75, 16.0)


@dataclass(frozen=True)
class Scheme:
    """How one linear layer is stored: its format and group size along K (0: the whole row).

    activations: "none" leaves the input as it is, "dynamic" and "static" quantize it, too.
    """

    format: str
    group_size: int
    activations: str = "none"

    @property
    def operator(self) -> str:
        """The smelt:: operator that multiplies by such a weight."""
        both = self.format == "int8" and self.activations != "none"
        return "linear_w8a8" if both else f"linear_{self.format}"

    def label(self) -> str:
        """ "int4 g128", "int8, dynamic inputs", "fp8 128 x 128, static inputs"."""
        size = self.group_size
        words = (
            f"{self.format} {size} x {size}" if self.format == "fp8" else f"{self.format} g{size}"
        )
        words = words if size else self.format
        return words if self.activations == "none" else f"{words}, {self.activations} inputs"

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

    method: one of METHODS. format: int4, int3, int2 (asymmetric, groups along K), int8
    (symmetric, one scale a row, groups on request), fp8 (e4m3, one scale a row, or 128 x 128 blocks
    with group size 128); empty is the method's default. group_size: None is the format's own, 0 or
    -1 the whole row. keep: the roles that are left alone: "lm_head" (the linear that gives the
    logits) and "router" (the one that chooses experts). min_features: a linear with fewer rows or
    columns is left alone.
    alpha: smoothquant's exponent, 0 (nothing is moved) to 1 (all of it), None to search one for
    each group of layers. activations: "dynamic" (a scale a token) or "static" (one scale, from
    calibration) for methods that quantize them, "none" for the others; empty is the method's
    default.

    Raises UserError for what does not work, naming what does.
    """

    method: str = "none"
    format: str = ""
    group_size: int | None = None
    keep: tuple[str, ...] = ROLES
    min_features: int = 16
    alpha: float | None = None
    activations: str = ""
    bits: float | None = None

    def __post_init__(self) -> None:
        if not self.format:
            object.__setattr__(self, "format", (METHODS.get(self.method) or ("int4",))[0])
        _check_method(self.method, self.format)
        _check_bits(self.method, self.bits, self.group_size)
        if self.method == "mixed" and self.bits is None:
            object.__setattr__(self, "bits", DEFAULT_BITS)
        _check_activations(self.method, self.format, self.activations, self.group_size)
        _check_group_size(self.group_size, self.format)
        _check_alpha(self.method, self.alpha)
        if not self.activations:
            default = _ACTIVATIONS.get(self.method, ("none",))[0]
            object.__setattr__(self, "activations", default)
        object.__setattr__(self, "keep", tuple(self.keep))
        for role in self.keep:
            if role not in ROLES:
                raise UserError(f"quantization: no role {role!r} to keep; {', '.join(ROLES)} exist")
        if self.group_size is None:
            form = FORMATS.get(self.format)
            object.__setattr__(self, "group_size", form.group if form else 0)
        elif self.group_size == -1:
            object.__setattr__(self, "group_size", 0)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method runs text through the model."""
        searched = self.method == "smoothquant" and self.alpha != 0
        return self.method in _NEEDS_TEXT or searched or self.activations == "static"

    def scheme(self, layer: str) -> Scheme:
        """The scheme of the linear at module path `layer`: the same for all, but for mixed, whose
        choice is made on the way."""
        assert self.group_size is not None
        return Scheme(self.format, self.group_size, self.activations)

    def label(self) -> str:
        """One word for tables and file names: "awq-int4-g128", "rtn-int8", "fp8-static", "none"."""
        if self.method == "none":
            return "none"
        if self.method == "mixed":
            return f"mixed-{self.bits:g}"
        name = self.method if self.method == self.format else f"{self.method}-{self.format}"
        group = f"-g{self.group_size}" if self.group_size else ""
        alpha = f"-a{self.alpha:g}" if self.alpha is not None else ""
        static = "-static" if self.activations == "static" else ""
        return f"{name}{group}{alpha}{static}"

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


def _check_method(method: str, format: str) -> None:
    if method not in METHODS:
        raise UserError(f"no quantization method {method!r}; {', '.join(METHODS)} exist")
    if method == "mixed":
        if format != "mixed":
            raise UserError(
                f"mixed chooses every layer's format itself, not {format}; leave --format out, or "
                f"use gptq for {format} everywhere"
            )
        return
    if format not in FORMATS:
        raise UserError(f"no weight format {format!r}; {', '.join(FORMATS)} exist")
    if method in _ACTIVATIONS and format not in METHODS[method]:
        only = METHODS[method][0]
        raise UserError(
            f"{method} multiplies {only} weights by {only} inputs, not {format}; leave --format "
            f"out, or use rtn for {format} weights and inputs that stay as they are"
        )
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


def _check_bits(method: str, bits: float | None, size: int | None) -> None:
    if method != "mixed":
        if bits is not None:
            raise UserError(f"--bits is mixed's budget; {method} takes --format and --group-size")
        return
    if size not in (None, 0, -1):
        raise UserError(
            f"group size {size}: mixed chooses every layer's group size itself; leave --group-size "
            "out, or use gptq for one size everywhere"
        )
    if bits is not None and not BITS[0] <= bits <= BITS[1]:
        raise UserError(
            f"--bits {bits:g}: mixed's formats take from {BITS[0]:g} bits a weight (int2 in groups "
            f"of 32, with their scales) to {BITS[1]:g} (left as they are)"
        )


def _check_activations(method: str, format: str, activations: str, size: int | None) -> None:
    """Raise UserError for activations or a group size that the method's operator does not have."""
    known = _ACTIVATIONS.get(method, ("none",))
    if activations and activations not in known:
        if known == ("none",):
            raise UserError(
                f"activations {activations!r}: {method} leaves the inputs of layers as they are; "
                "smoothquant (int8) and fp8 quantize them"
            )
        raise UserError(f"activations {activations!r}: {method} has {', '.join(known)}")
    if method == "smoothquant" and size not in (None, 0, -1):
        raise UserError(
            f"group size {size}: smoothquant's integer sums run over whole rows, so it has one "
            "scale a row; leave --group-size out, or use rtn with int8 for groups"
        )
    if method == "fp8" and size not in (None, 0, -1, FP8_BLOCK):
        raise UserError(
            f"group size {size}: fp8 has one scale a row (0) or blocks of {FP8_BLOCK} x {FP8_BLOCK}"
        )
    if method == "rtn" and format == "fp8" and size not in (None, 0, -1):
        raise UserError(
            f"group size {size}: rtn with fp8 has one scale a row; --quant fp8 --group-size "
            f"{FP8_BLOCK} has blocks"
        )
    if method == "fp8" and size == FP8_BLOCK and activations == "static":
        raise UserError(
            "fp8 with blocks gives every 128 features of a token a scale of their own: use "
            "--activations dynamic, or leave --group-size out for static ones"
        )


def _check_alpha(method: str, alpha: float | None) -> None:
    if alpha is None:
        return
    if method != "smoothquant":
        raise UserError(f"alpha is smoothquant's exponent; {method} has none")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}: it goes from 0 (nothing is moved into weights) to 1")


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
