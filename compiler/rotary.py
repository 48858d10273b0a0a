"""Rotary factors that depend on the sequence's length, made a computation of each token.

transformers' rotary modules for dynamic NTK and longrope look at the largest position of the whole
forward and change their own buffers. A packed step holds several sequences, so before the export
such a module computes cosines and sines from `smelt::sequence_length`, one length a token, instead.
How the module lays its angles out is found by what it computes; that ours are the same, by
comparing them with the module's, below the limit and beyond it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from smelt.models.config import rope_dicts
from smelt.runtime.batch import LengthScaling
from smelt.runtime.errors import UserError
from smelt.runtime.length_scaling import DYNAMIC, LONGROPE

LENGTH_KINDS = (DYNAMIC, LONGROPE)


class RotaryError(UserError):
    """A rotary module that is not understood; the text names it."""


# Angles [T, D'/2] to the D' features they turn: halves (Llama), pairs (Cohere), or once.
_LAYOUTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda angles: torch.cat((angles, angles), -1),
    lambda angles: angles.repeat_interleave(2, -1),
    lambda angles: angles,
)


@dataclass(frozen=True)
class Rotary:
    """One kind of rotation of one module: a module may have one for each type of layer.

    short: float32 [D'/2], inverse frequencies up to the limit; long: beyond it for longrope, for
    dynamic NTK the exponents 2i/D' of its base. growth: (base, factor) of dynamic NTK.
    """

    module: nn.Module
    layer_type: str | None
    scaling: LengthScaling
    short: torch.Tensor
    long: torch.Tensor
    growth: tuple[float, float] = (1.0, 1.0)

    def frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        """lengths int64 [T], of each token's sequence -> inverse frequencies, float32 [T, D'/2]."""
        limit = self.scaling.limit
        long = self.long
        if self.scaling.kind == DYNAMIC:
            base, factor = self.growth
            width = 2 * self.short.shape[0]
            # Clamped, for a power of what is negative would be NaN where nobody wants it.
            grown = factor * lengths.clamp(min=limit) / limit - (factor - 1)
            bases = base * grown ** (width / (width - 2))
            long = 1.0 / bases[:, None] ** self.long
        return torch.where((lengths > limit)[:, None], long, self.short)

    def own(self, name: str) -> Any:
        return getattr(self.module, f"{self.layer_type}_{name}" if self.layer_type else name)


def length_rotaries(model: nn.Module) -> list[Rotary]:
    """The rotations of a model that depend on the sequence's length, checked and understood.

    Raises RotaryError, naming the class, for kinds that cannot be told from the module.
    """
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        found += [_rotary(module, t, k) for t, k in by_layer.items() if k in LENGTH_KINDS]
    if len({rotary.scaling for rotary in found}) > 1:
        raise RotaryError(
            f"{type(model).__name__} scales positions by length in more than one way; "
            "this is not supported yet"
        )
    config = getattr(model, "config", None)
    asked = {parameters.get("rope_type") for parameters in rope_dicts(config)} & set(LENGTH_KINDS)
    if asked and not any(hasattr(module, "rope_type") for module in model.modules()):
        raise RotaryError(
            f"{type(model).__name__} uses {asked.pop()} rotary scaling in a module of its own; "
            "this is not supported yet"
        )
    return found


def _rotary(module: nn.Module, layer_type: str | None, kind: str) -> Rotary:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = type(module).__name__
    config: Any = module.config
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    prefix = f"{layer_type}_" if layer_type else ""
    short = getattr(module, f"{prefix}original_inv_freq", None)
    if not isinstance(short, torch.Tensor):
        raise RotaryError(f"{name} uses {kind} rotary scaling in a way that is not supported yet")
    short = short.detach().float().clone()
    own = {"layer_type": layer_type} if layer_type else {}
    if kind == LONGROPE:
        limit = int(parameters["original_max_position_embeddings"])
        long, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=limit + 1, **own)
        return Rotary(module, layer_type, LengthScaling(kind, limit), short, long.float())
    limit = int(config.max_position_embeddings)
    width = 2 * short.shape[0]
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    growth = float(parameters["rope_theta"]), float(parameters["factor"])
    return Rotary(module, layer_type, LengthScaling(kind, limit), short, exponents, growth)


@contextlib.contextmanager
def rotation_by_token(model: nn.Module) -> Iterator[None]:
    """Inside, the model's length-dependent rotary modules take their lengths from our operator."""
    rotaries = length_rotaries(model)
    layouts = {id(rotary): _layout(rotary) for rotary in rotaries}
    by_module: dict[nn.Module, dict[str | None, Rotary]] = {}
    for rotary in rotaries:
        by_module.setdefault(rotary.module, {})[rotary.layer_type] = rotary
    for module, own in by_module.items():
        module.forward = partial(_forward, module.forward, own, layouts)
    try:
        yield
    finally:
        for module in by_module:
            del module.forward


def _forward(
    original: Callable[..., Any],
    rotaries: dict[str | None, Rotary],
    layouts: dict[int, Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotary module's forward: position_ids [1, T] -> cos and sin, [1, T, D'] of x's dtype."""
    rotary = rotaries.get(layer_type)
    if rotary is None:  # of this module, only other types of layers look at the length
        result: tuple[torch.Tensor, torch.Tensor] = original(x, position_ids, layer_type)
        return result
    positions = position_ids[0]
    scaling = rotary.scaling
    lengths = torch.ops.smelt.sequence_length(positions, scaling.kind, scaling.limit)
    cos, sin = _turned(rotary, positions, lengths, layouts[id(rotary)])
    return cos[None].to(x.dtype), sin[None].to(x.dtype)


def _turned(
    rotary: Rotary,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    layout: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions and lengths int64 [T] -> cos and sin, float32 [T, D']."""
    angles = layout(positions[:, None].float() * rotary.frequencies(lengths))
    attention = rotary.own("attention_scaling")
    return angles.cos() * attention, angles.sin() * attention


def _layout(rotary: Rotary) -> Callable[[torch.Tensor], torch.Tensor]:
    """How the module lays out its angles; a module whose numbers are not ours is refused.

    The positions compared are small but for the last, which sets the length: far out, angles of
    hundreds of turns differ by what their frequencies' last bits do.
    """
    limit = rotary.scaling.limit
    lengths = (min(3, limit), limit, limit + 1, 2 * limit + 3)
    for layout in _LAYOUTS:
        if all(_agrees(rotary, layout, length) for length in lengths):
            return layout
    raise RotaryError(
        f"{type(rotary.module).__name__} computes {rotary.scaling.kind} rotary scaling in a way "
        "that smelt does not reproduce"
    )


def _agrees(rotary: Rotary, layout: Callable[[torch.Tensor], torch.Tensor], length: int) -> bool:
    """Compared on a copy, for the module keeps what it computed for the longest sequence."""
    module: Any = copy.deepcopy(rotary.module)
    positions = torch.tensor([0, 1, 2, length - 1])
    own = (rotary.layer_type,) if rotary.layer_type else ()
    module(torch.zeros(1), positions[None, :1], *own)  # a short sequence lets it forget
    theirs = module(torch.zeros(1), positions[None], *own)
    ours = _turned(rotary, positions, torch.full_like(positions, length), layout)
    return all(
        a[0].shape == b.shape and torch.allclose(a[0, :-1], b[:-1], atol=1e-5)
        for a, b in zip(theirs, ours, strict=True)
    )
