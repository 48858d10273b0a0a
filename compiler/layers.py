"""How every linear layer of a model will be stored and computed, from its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from smelt.models.quantized import Quantization
from smelt.passes.kernels import kernel_for
from smelt.passes.quantize.formats import packed_bytes
from smelt.passes.quantize.spec import QuantSpec, Scheme
from smelt.passes.quantize.verdict import indivisible

from .expert_names import expert_names
from .stored import keeps, keeps_expert

# Stands for the formats that mixed chooses from; its kernels are those of int4, mostly.
MIXED = Scheme("int4", 0)


@dataclass(frozen=True)
class Layer:
    """A linear, or one matrix of all the experts of a layer. bytes: of its own weight.

    scheme: how it is quantized, None at 16 bits. packed_bytes: what it takes then. note: why it
    is not quantized, or what becomes of it otherwise than asked; None where there is nothing to
    say. experts: whether the matrix is one of experts.
    """

    name: str
    bytes: int
    scheme: Scheme | None
    packed_bytes: int
    note: str | None
    experts: bool = False

    @property
    def saved(self) -> int:
        """Bytes that the scheme saves."""
        return self.bytes - self.packed_bytes


@dataclass(frozen=True)
class LayerKind:
    """Layers that are stored and computed alike: names with * for numbers and + between siblings.

    count: how many linears (or matrices of experts). format: "int4 g128", or "16 bit". operator,
    provider: what computes them; reason: why that; limit: why nothing faster; note: as in `Layer`.
    """

    layers: str
    count: int
    format: str
    operator: str
    provider: str
    reason: str
    limit: str | None
    note: str | None


def layers(skeleton: Any, spec: QuantSpec, stored: Quantization | None = None) -> list[Layer]:
    """Every linear in the model's order, then experts. stored: of a checkpoint that is quantized
    already; its logits' linear and routers count as left alone, as published ones are."""
    found = []
    for name, module, n, k in linears(skeleton):
        reason = _left(skeleton, name, module, spec, n, k)
        scheme, note = None, reason
        form = stored.form(name) if stored is not None and reason is None else None
        if form is not None:
            scheme, note = keeps(form, k)
            note = note if scheme else f"{note}: dequantized"
        elif stored is None and reason is None and spec.method != "none":
            scheme, note = _asked(spec, name, k)
        weight: Any = module.weight
        found.append(_layer(name, weight, n, k, scheme, note, spec))
    for name, module in skeleton.named_modules():
        if is_experts(module):
            kept = _kept_experts(skeleton, name, module, stored) if stored is not None else {}
            matrices = _matrices(module)
            found += [_expert_matrix(name, p, spec, kept.get(key)) for key, p in matrices.items()]
    return found


Kept = tuple[Scheme | None, str | None]


def _kept_experts(
    skeleton: Any, name: str, module: nn.Module, stored: Quantization
) -> dict[str, Kept]:
    """By matrix of a layer of experts, what keeps its integers, or why nothing does.

    As announced: a checkpoint may hold one expert otherwise, or features out of order.
    """
    found: dict[str, Kept] = {}
    for key, weight in _matrices(module).items():
        linears = expert_names(skeleton, f"{name}.{key}", 1)
        forms = {stored.form(path) for path in linears[0]} if linears else set()
        form = forms.pop() if len(forms) == 1 else None
        # gate and up stand one below the other.
        rows = weight.shape[1] // (len(linears[0]) if linears else 1)
        if not linears:
            found[key] = None, "which linears of the checkpoint its experts are is not known"
        elif form is None:
            found[key] = None, "the checkpoint announces no one form for its experts"
        else:
            found[key] = keeps_expert(form, rows, weight.shape[2])
    schemes = [scheme for scheme, _ in found.values()]
    whole = {(s.format, s.group_size if s.format == "fp8" else 0) for s in schemes if s}
    if None not in schemes and len(whole) == 1:
        return found
    said = [note for scheme, note in found.values() if scheme is None]
    note = said[0] if said else "its matrices are stored in different formats"
    return dict.fromkeys(found, (None, f"{note}: dequantized"))


def _expert_matrix(name: str, weight: torch.Tensor, spec: QuantSpec, kept: Kept | None) -> Layer:
    """weight [E, N, K]. Inputs of experts stay as they are, whatever the method. kept: of a
    checkpoint that is quantized already."""
    experts, n, k = weight.shape
    scheme, note = kept or (None, None)
    if kept is None and spec.method != "none" and min(weight.shape[1:]) >= spec.min_features:
        asked, note = _asked(spec, name, k)
        scheme = asked if asked is MIXED else replace(asked, activations="none")
    layer = _layer(name, weight, n, k, scheme, note, spec, experts)
    return replace(layer, experts=True)


def _asked(spec: QuantSpec, name: str, k: int) -> tuple[Scheme, str | None]:
    """What a method gives a layer, and what is to be said of it."""
    if spec.bits is None:
        scheme = spec.scheme(name)
        return scheme, indivisible(scheme, k)
    return MIXED, f"one of int2 to int8, measured when it is compiled; {spec.bits:g} bits a weight"


def _layer(
    name: str,
    weight: torch.Tensor,
    n: int,
    k: int,
    scheme: Scheme | None,
    note: str | None,
    spec: QuantSpec,
    count: int = 1,
) -> Layer:
    plain = weight.numel() * weight.element_size()
    if scheme is None:
        return Layer(name, plain, None, plain, note)
    if spec.bits is not None:  # its share of the budget, which holds for all together
        return Layer(name, plain, scheme, int(count * n * k * spec.bits / 8), note)
    return Layer(name, plain, scheme, count * packed_bytes(n, k, scheme), note)


def linears(skeleton: Any) -> list[tuple[str, nn.Module, int, int]]:
    """(path, module, N, K) of every linear."""
    found: list[tuple[str, nn.Module, int, int]] = []
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear):
            found.append((name, module, module.out_features, module.in_features))
        elif type(module).__name__ == "Conv1D":
            k, n = module.weight.shape
            found.append((name, module, int(n), int(k)))
    return found


def kinds(found: Sequence[Layer], target: str) -> list[LayerKind]:
    """`found`, those that are alike in one line."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for layer in found:
        scheme = layer.scheme
        operator = scheme.operator if scheme else "linear"
        if layer.experts:
            operator = "experts_quantized" if scheme else "experts"
        kernel = kernel_for(operator, target)
        format = "16 bit" if scheme is None else "mixed" if scheme is MIXED else scheme.label()
        parent, _, leaf = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name).rpartition(".")
        key = (format, operator, kernel.provider, kernel.reason, kernel.limit, layer.note)
        alike.setdefault((parent, *key), []).append(leaf)
    return [
        LayerKind(f"{parent}.{names}" if parent else names, len(leaves), *rest)
        for (parent, *rest), leaves in alike.items()
        if (names := "+".join(dict.fromkeys(leaves)))
    ]


def _left(
    skeleton: Any, name: str, module: nn.Module, spec: QuantSpec, n: int, k: int
) -> str | None:
    """Why a linear stays at 16 bits; None when it is quantized."""
    if module is skeleton.get_output_embeddings() and "lm_head" in spec.keep:
        return "lm_head (tied)" if _tied(skeleton, module) else "lm_head"
    if _tied(skeleton, module):
        return "its weight is the embedding table"
    if is_router(skeleton, name) and "router" in spec.keep:
        return "router"
    return f"too small ({n} x {k})" if min(n, k) < spec.min_features else None


def _tied(skeleton: Any, module: nn.Module) -> bool:
    return module.weight is getattr(skeleton.get_input_embeddings(), "weight", None)


def is_router(skeleton: nn.Module, name: str) -> bool:
    """Whether the module decides between experts that stand beside it."""
    parent, _, own = name.rpartition(".")
    if own not in ("gate", "router"):
        return False
    return any(is_experts(child) for child in skeleton.get_submodule(parent).children())


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts."""
    return type(module).__name__.endswith("Experts")


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights [E, N, K] of a module that holds experts, by name."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
