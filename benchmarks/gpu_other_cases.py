"""Cases of everything between the matrix products: norms, gates, quantization; experts; sampling.

Beside norms and gates stands what Inductor makes of the same operators: that comparison decides
which provider they get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from smelt.runtime.filters import NO_VALUE
from smelt.runtime.kernels.gpu.roofline import Cost
from smelt.runtime.ops.experts import experts
from smelt.runtime.ops.experts_quantized import experts_quantized
from smelt.runtime.ops.gated_activation import gated_activation
from smelt.runtime.ops.linear_fp8 import E4M3_MAX, to_e4m3
from smelt.runtime.ops.linear_w8a8 import quantize_rows, usable_scale
from smelt.runtime.ops.norm import rms_norm

from .gpu_cases import (
    BF16,
    CLOSE,
    Case,
    Maker,
    Scale,
    Trial,
    bound_of,
    inductor,
    kernel_module,
    operators,
)
from .gpu_measure import Call

EPS = 1e-5
GATE = "silu"
FORMS = ("same", "int8", "fp8", "fp8 of 128")
TOP_K, TOP_P = 50, 0.9
# Codes that may differ where a norm is fused with its quantization: the compiler may order the
# norm's float32 operations otherwise.
FEW_CODES = 1e-3


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> (int8, scale [..., 1]), one scale a row."""
    values, scale = quantize_rows(x, None)
    return values.to(torch.int8), scale


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> (e4m3, scale [..., 1]), one scale a row."""
    wide = x.float()
    scale = usable_scale(wide.abs().amax(-1, keepdim=True), E4M3_MAX)
    return to_e4m3(wide / scale), scale


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] -> (e4m3, scale [..., K/128]), a scale for every 128 features."""
    codes, scale = quantize_fp8(x.unflatten(-1, (-1, 128)))
    return codes.flatten(-2), scale.squeeze(-1)


def _plain(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x,)


_QUANTIZE: dict[str, Callable[[torch.Tensor], Any]] = {
    "same": _plain,
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "fp8 of 128": quantize_blocks,
}


def _norm_then(form: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + residual
    return (total, *_QUANTIZE[form](rms_norm(total, weight, EPS, 0.0)))


def _gate_then(form: str, gate: torch.Tensor, up: torch.Tensor) -> Any:
    return _QUANTIZE[form](gated_activation(gate, up, GATE))


# One function object for each form: torch.compile keeps what it made by function.
_NORMS = {form: partial(_norm_then, form) for form in FORMS}
_GATES = {form: partial(_gate_then, form) for form in FORMS}


def _norm(form: str, tokens: int, k: int, maker: Maker) -> Trial:
    ops, module = operators("norms"), kernel_module("quantize")
    x, residual = maker.normal(tokens, k), maker.normal(tokens, k)
    weight = maker.uniform(k, low=0.5, high=1.5, dtype=BF16)
    run: Call = {
        "same": lambda: ops.add_rms_norm_triton(x, residual, weight, EPS, 0.0),
        "int8": lambda: ops.add_rms_norm_int8_triton(x, residual, weight, EPS, 0.0, None),
        "fp8": lambda: ops.add_rms_norm_fp8_triton(x, residual, weight, EPS, 0.0, None, 0),
        "fp8 of 128": lambda: ops.add_rms_norm_fp8_triton(x, residual, weight, EPS, 0.0, None, 128),
    }[form]

    def reference() -> Any:
        if form == "same":
            total = x + residual
            return total, rms_norm(total.float(), weight.float(), EPS, 0.0)
        # What the kernel rounds is what it gives unquantized; see `_quantize` for the CPU.
        total, normed = ops.add_rms_norm_triton(x, residual, weight, EPS, 0.0)
        return (total, *_QUANTIZE[form](normed.cpu()))

    def compiled() -> Call:
        function = inductor(_NORMS[form], x.device)
        return lambda: function(x, residual, weight)

    def cost() -> Cost:
        moved = _cost(module, tokens, k, 2, form)
        return Cost(moved.bytes + 2 * x.numel())  # the sum is written as well

    return Trial(
        run,
        cost,
        reference,
        tolerance=CLOSE if form == "same" else FEW_CODES,
        exact=form != "same",
        peers={"inductor": compiled},
    )


def _gate(form: str, tokens: int, width: int, maker: Maker) -> Trial:
    ops, module = operators("norms"), kernel_module("quantize")
    both = maker.normal(tokens, 2 * width)
    gate, up = both.chunk(2, -1)
    run: Call = {
        "same": lambda: (ops.gated_activation_triton(gate, up, GATE),),
        "int8": lambda: ops.gated_activation_int8_triton(gate, up, GATE, None),
        "fp8": lambda: ops.gated_activation_fp8_triton(gate, up, GATE, None, 0),
        "fp8 of 128": lambda: ops.gated_activation_fp8_triton(gate, up, GATE, None, 128),
    }[form]

    def reference() -> Any:
        if form == "same":
            return (gated_activation(gate.float(), up.float(), GATE),)
        return _QUANTIZE[form](ops.gated_activation_triton(gate, up, GATE).cpu())

    def compiled() -> Call:
        function = inductor(_GATES[form], both.device)
        return lambda: function(gate, up)

    return Trial(
        run,
        lambda: _cost(module, tokens, width, 2, form),
        reference,
        tolerance=CLOSE if form == "same" else FEW_CODES,
        exact=form != "same",
        peers={"inductor": compiled},
    )


def _quantize(form: str, tokens: int, k: int, maker: Maker) -> Trial:
    ops, module = operators("quantize"), kernel_module("quantize")
    x = maker.normal(tokens, k)
    run: Call = {
        "int8": lambda: ops.quantize_int8_triton(x, None),
        "fp8": lambda: ops.quantize_fp8_triton(x, None, 0),
        "fp8 of 128": lambda: ops.quantize_fp8_triton(x, None, 128),
    }[form]

    def compiled() -> Call:
        function = inductor(_QUANTIZE[form], x.device)
        return lambda: function(x)

    return Trial(
        run,
        lambda: _cost(module, tokens, k, 1, form),
        # On the CPU: a GPU divides by a Python number through its reciprocal.
        lambda: _QUANTIZE[form](x.cpu()),
        tolerance=0.0,
        exact=True,
        peers={"inductor": compiled},
    )


def _cost(module: Any, tokens: int, k: int, reads: int, form: str) -> Cost:
    kind = {"same": "same", "int8": "int8"}.get(form, "e4m3")
    found: Cost = module.cost(tokens, k, reads, kind, 128 if form == "fp8 of 128" else 0)
    return found


def _routed(layer: Any, tokens: int, maker: Maker) -> tuple[torch.Tensor, ...]:
    """x [T, K]; index and weight [T, top_k], different experts for a token."""
    scores = maker.uniform(tokens, layer.experts)
    weight, index = scores.topk(layer.top_k, -1)
    return maker.normal(tokens, layer.k), index, weight / weight.sum(-1, keepdim=True)


def _experts(layer: Any, tokens: int, maker: Maker) -> Trial:
    ops, module = operators("experts"), kernel_module("experts")
    x, index, weight = _routed(layer, tokens, maker)
    gate_up = maker.normal(layer.experts, 2 * layer.width, layer.k, scale=layer.k**-0.5)
    down = maker.normal(layer.experts, layer.k, layer.width, scale=layer.width**-0.5)
    rows, chosen = bound_of(tokens), int(index.unique().numel())

    def grouped() -> Call:
        """torch's grouped products over choices that lie in order already."""
        order = index.flatten().argsort()
        ends = torch.bincount(index.flatten(), minlength=layer.experts).cumsum(0).to(torch.int32)
        own = x[order // layer.top_k]
        first, second = gate_up.transpose(1, 2), down.transpose(1, 2)

        def call() -> torch.Tensor:
            gate, up = torch._grouped_mm(own, first, offs=ends).chunk(2, -1)
            return torch._grouped_mm(gated_activation(gate, up, GATE), second, offs=ends)

        return call

    return Trial(
        lambda: ops.experts_triton(x, index, weight, gate_up, down, GATE, rows),
        lambda: module.cost(tokens, layer, chosen),
        lambda: experts(x.float(), index, weight, gate_up.float(), down.float(), GATE),
        tolerance=0.03,
        peers={"grouped_mm": grouped},
    )


def _experts_int4(layer: Any, tokens: int, group: int, maker: Maker) -> Trial:
    ops, layout = operators("experts_int4"), kernel_module("int4_layout")
    x, index, weight = _routed(layer, tokens, maker)
    canonical: list[Any] = [x.float(), index, weight]
    tiled: list[torch.Tensor] = []
    for n, k in ((2 * layer.width, layer.k), (layer.k, layer.width)):
        rows = layer.experts * n
        q = maker.integers(0, 256, rows, k // 2, dtype=torch.uint8)
        step = 0.2 * k**-0.5
        scales = maker.uniform(rows, k // group, low=step / 2, high=step, dtype=BF16)
        zeros = maker.integers(0, 16, rows, k // group, dtype=torch.uint8)
        canonical += [q, scales, zeros]
        tiled += layout.lay_out_int4(q, scales, zeros, k)
    given = (*canonical, GATE, "int4", layer.experts, 0)
    bound, chosen = bound_of(tokens), int(index.unique().numel())
    sizes = (layer.experts, layer.width, bound)
    return Trial(
        lambda: ops.experts_int4_triton(x, index, weight, *tiled, GATE, *sizes),
        lambda: kernel_module("experts_int4").cost(tokens, layer, chosen, group),
        lambda: experts_quantized(*given),
        tolerance=0.03,
    )


def _filter(rows: int, vocab: int, maker: Maker) -> Trial:
    module = kernel_module("sampling")
    scores = maker.normal(rows, vocab, scale=3.0, dtype=torch.float32)
    top_k, top_p = [TOP_K] * rows, [TOP_P] * rows

    def by_sorting() -> torch.Tensor:
        best, order = scores.sort(-1, descending=True)
        kept = torch.arange(vocab, device=scores.device) < TOP_K
        probs = best.masked_fill(~kept, NO_VALUE).softmax(-1)
        kept = kept & (probs.cumsum(-1) - probs < TOP_P)
        return torch.full_like(scores, NO_VALUE).scatter(-1, order, best.where(kept, NO_VALUE))

    def flashinfer() -> Call:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits

        return lambda: top_k_top_p_sampling_from_logits(scores, TOP_K, TOP_P)

    return Trial(
        # Its argument is changed: the copy is timed with it, as one is in every step.
        lambda: module.filter_top(scores.clone(), top_k, top_p),
        lambda: module.cost(rows, vocab) + Cost(2 * scores.nbytes),
        by_sorting,
        tolerance=1e-6,
        exact=True,
        peers={"sort": lambda: by_sorting, "flashinfer_with_draw": flashinfer},
        capture=False,
    )


def activation_cases(scale: Scale) -> Iterator[Case]:
    """Norms, gates and quantization, in each form of what follows."""
    model = scale.llama
    for tokens in (1, 64, 2048):
        count = scale.tokens(tokens)
        for form in FORMS:
            what = "" if form == "same" else f", {form}"
            norm = partial(_norm, form, count, model.hidden)
            gate = partial(_gate, form, count, model.ffn)
            yield Case("activations", "add_rms_norm", f"{count} x {model.hidden}{what}", norm)
            yield Case("activations", "gated_activation", f"{count} x {model.ffn}{what}", gate)
    for tokens in (1, 2048):
        for form in FORMS[1:]:
            count = scale.tokens(tokens)
            make = partial(_quantize, form, count, model.ffn)
            yield Case("activations", "quantize", f"{count} x {model.ffn}, {form}", make)


def expert_cases(scale: Scale) -> Iterator[Case]:
    """A layer of few large experts and one of many small ones."""
    module = kernel_module("experts")
    layers = [module.QWEN3_30B_A3B, module.MIXTRAL_8X7B]
    if scale.small:
        layers = [module.Layer(16, 2, 64, 64), module.Layer(4, 2, 64, 128)]
    for layer in layers:
        for tokens in (1, 64, 2048):
            count = scale.tokens(tokens)
            shape = f"{layer.experts} of {layer.width}, top {layer.top_k}, {count} tokens"
            yield Case("experts", "experts", shape, partial(_experts, layer, count))
            make = partial(_experts_int4, layer, count, scale.group(64 if scale.small else 128))
            yield Case("experts", "experts_int4", shape, make)


def sampling_cases(scale: Scale) -> Iterator[Case]:
    """Top-k and top-p together."""
    for count in (1, 2, 3) if scale.small else (1, 8, 64):
        vocab = scale.llama.vocab
        make = partial(_filter, count, vocab)
        yield Case("sampling", "filter_top", f"{count} x {vocab}", make)
