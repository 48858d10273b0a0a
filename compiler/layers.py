"""How every linear layer of a model will be stored and computed, from its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from smelt.models.quantized import Quantization
from smelt.passes.kernels import kernel_for
from smelt.passes.quantize.spec import FORMATS, QuantSpec, Scheme
from smelt.passes.quantize.verdict import EXPERTS, indivisible

from .stored import keeps


@dataclass(frozen=True)
class Layer:
    """A linear [N, K]. scheme: how it is quantized, None at 16 bits. note: why it is not, or what
    becomes of it otherwise than asked; None where there is nothing to say."""

    name: str
    module: nn.Module
    n: int
    k: int
    scheme: Scheme | None
    note: str | None

    @property
    def saved(self) -> int:
        """Bytes that the scheme saves against the module's own weight."""
        if self.scheme is None:
            return 0
        weight: Any = self.module.weight
        return int(weight.numel() * weight.element_size() - quantized(self.n, self.k, self.scheme))


@dataclass(frozen=True)
class LayerKind:
    """Layers that are stored and computed alike: names with * for numbers and + between siblings.

    count: how many linears (or expert layers). format: "int4 g128", or "16 bit". operator,
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
    """Every linear in the model's order. stored: of a checkpoint that is quantized already; its
    logits' linear and routers count as left alone, as published ones are, listed or not."""
    found = []
    for name, module, n, k in linears(skeleton):
        reason = _left(skeleton, name, module, spec, n, k)
        scheme, note = None, reason
        form = stored.form(name) if stored is not None and reason is None else None
        if form is not None:
            scheme, note = keeps(form, k)
            note = note if scheme else f"{note}: dequantized"
        elif stored is None and reason is None and spec.method != "none":
            scheme = spec.scheme(name)
            note = indivisible(scheme, k)
        found.append(Layer(name, module, n, k, scheme, note))
    return found


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


def kinds(skeleton: nn.Module, found: Sequence[Layer], target: str) -> list[LayerKind]:
    """`found` and the expert layers of the model, those that are alike in one line."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    rows = [(layer.name, layer.scheme, layer.note) for layer in found]
    experts = [name for name, module in skeleton.named_modules() if is_experts(module)]
    for name, scheme, note in [*rows, *((name, None, EXPERTS) for name in experts)]:
        operator = scheme.operator if scheme else "experts" if name in experts else "linear"
        kernel = kernel_for(operator, target)
        format = scheme.label() if scheme else "16 bit"
        parent, _, leaf = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name).rpartition(".")
        key = (format, operator, kernel.provider, kernel.reason, kernel.limit, note)
        alike.setdefault((parent, *key), []).append(leaf)
    return [
        LayerKind(f"{parent}.{names}" if parent else names, len(leaves), *rest)
        for (parent, *rest), leaves in alike.items()
        if (names := "+".join(dict.fromkeys(leaves)))
    ]


def quantized(n: int, k: int, scheme: Scheme) -> int:
    """Bytes of a linear of N rows and K features in canonical packed form."""
    groups = scheme.groups(k)
    form = FORMATS[scheme.format]
    if scheme.format == "fp8":
        size = scheme.group_size
        return n * k + 4 * (-(-n // size) * -(-k // size) if size else n)
    if scheme.activations != "none":
        return n * (k + 4)
    return n * (-(-k * form.bits // 8) + (2 if form.symmetric else 3) * groups)


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
