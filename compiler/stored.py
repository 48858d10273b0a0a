"""Quantized checkpoints: each packed linear becomes plan steps that make its plain weight.

To the binding of names a quantized linear looks as if the checkpoint held `MODULE.weight`. Behind
that name stand the steps that unpack the foreign layout and dequantize it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.models.checkpoint import Checkpoint
from smelt.models.folder import read_json
from smelt.models.quantized import Quantization, WeightForm, describe
from smelt.models.stored import StoredWeight, own_tensors, stored_weights
from smelt.passes.quantize.kept import (
    NEXT_EXPERT,
    expert_block,
    kept_expert_scheme,
    kept_scheme,
    unfit_groups,
)
from smelt.passes.quantize.spec import QuantSpec, Scheme
from smelt.passes.quantize.stored import DEQUANTIZE
from smelt.passes.weights import TensorSpec, WeightPlan
from smelt.runtime.errors import UserError


@dataclass(frozen=True)
class StoredModel:
    """The quantized part of a checkpoint: its description, and its linears by module path."""

    quantization: Quantization
    weights: Mapping[str, StoredWeight]

    def plain(self, stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The checkpoint's tensors without those of its quantized linears."""
        own = {name for weight in self.weights.values() for name in own_tensors(weight)}
        return {name: spec for name, spec in stored.items() if name not in own}

    def specs(self, stored: Mapping[str, TensorSpec], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """`plain` with a `MODULE.weight` [N, K] in `dtype` for every quantized linear."""
        weights = {
            f"{module}.weight": TensorSpec((weight.n, weight.k), dtype)
            for module, weight in self.weights.items()
        }
        return {**self.plain(stored), **weights}

    def add(
        self, plan: WeightPlan, key: str, stored: Mapping[str, TensorSpec], dtype: torch.dtype
    ) -> str | None:
        """Plan `MODULE.weight` from its packed tensors; None when `key` is no quantized weight."""
        weight = self.weights.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if weight is None:
            return None
        return _dequantized(plan, weight, self.quantization.method, stored, dtype)

    def check(self, checkpoint: Checkpoint, model: Any, where: str) -> None:
        """Raise UserError for quantized tensors that the module they belong to cannot take.

        A bias that the model has no place for is ignored when it is zero, as AutoGPTQ writes it.
        """
        modules = dict(model.named_modules())
        prefix = getattr(model, "base_model_prefix", "")
        for path in self.weights:
            module = modules.get(path) or modules.get(f"{prefix}.{path}")
            if module is None:
                continue
            if type(module).__name__ == "Conv1D":
                raise UserError(
                    f"{where}: {path} is a quantized Conv1D; quantized checkpoints of GPT-2 and "
                    "other models of Conv1D layers are not supported yet"
                )
            bias = f"{path}.bias"
            lacks = getattr(module, "bias", None) is None and bias in checkpoint.entries
            if lacks and bool(checkpoint.tensor(bias).any()):
                raise UserError(
                    f"{where}: {bias} is not zero, and {type(model).__name__} has no such bias"
                )


def read_stored(folder: Path, checkpoint: Checkpoint, asked: QuantSpec) -> StoredModel | None:
    """The quantized part of the model in `folder`, None for an ordinary one.

    Raises UserError when it is quantized and `asked` wants it quantized otherwise.
    """
    quantization = describe(read_json(folder / "config.json"), str(folder))
    if quantization is None:
        return None
    refuse_another(quantization, asked, str(folder))
    return StoredModel(quantization, stored_weights(quantization, checkpoint, str(folder)))


def refuse_another(quantization: Quantization, asked: QuantSpec, where: str) -> None:
    """Raise UserError when `asked` wants a quantized checkpoint quantized otherwise."""
    size = asked.group_size or 0
    same = quantization.is_what(asked.method, asked.format, size, asked.activations)
    if asked.method != "none" and not same:
        raise UserError(
            f"{where}: the checkpoint is already quantized ({quantization.label()}), which cannot "
            f"become {asked.label()}; leave --quant out to compile it as it is, or name the "
            "original model"
        )


def _dequantized(
    plan: WeightPlan,
    weight: StoredWeight,
    method: str,
    stored: Mapping[str, TensorSpec],
    dtype: torch.dtype,
) -> str:
    loaded = {
        role: plan.load(f"checkpoint:{name}", name, stored[name].shape, stored[name].dtype)
        for role, name in weight.tensors.items()
    }
    form, base = weight.form, f"checkpoint:{weight.module}"
    q, scales, zeros = loaded["q"], loaded["scales"], loaded.get("zeros")
    if form.layout == "awq":
        q, zeros = plan.add("unpack_awq", [f"{base}.q", f"{base}.zeros"], [q, str(zeros)])
    elif form.layout == "gptq":
        names = [f"{base}.q", f"{base}.zeros"]
        how = {"bits": form.bits, "offset": form.zero_offset}
        q, zeros = plan.add("unpack_gptq", names, [q, str(zeros)], **how)
    elif form.layout == "packed":
        (q,) = plan.add("unpack_rows", [f"{base}.q"], [q], bits=form.bits, k=weight.k)
        if zeros is not None:
            how = {"bits": form.bits, "n": weight.n}
            (zeros,) = plan.add("unpack_columns", [f"{base}.zeros"], [zeros], **how)
    if form.layout in ("awq", "gptq"):
        (scales,) = plan.add("transpose", [f"{base}.scales"], [scales], dim0=0, dim1=1)
    given = {"zeros": zeros, "order": loaded.get("order")}
    extras = {kind: name for kind, name in given.items() if name is not None}
    (name,) = plan.add(
        DEQUANTIZE,
        [f"{base}.weight"],
        [q, scales, *extras.values()],
        kinds=list(extras),
        group=form.group,
        rows=form.rows,
        dtype=str(dtype).removeprefix("torch."),
        layer=weight.module,
        form={
            "method": method,
            "order": weight.order,
            "input_scale": weight.input_scale,
            **as_data(weight.announced),
        },
    )
    return name


def as_data(form: WeightForm) -> dict[str, Any]:
    """What decides which operator keeps a weight, as `passes.quantize.kept` takes it."""
    inputs = None if form.inputs is None else asdict(form.inputs)
    size = {"group": form.group, "rows": form.rows}
    return {"kind": form.kind, "bits": form.bits, **size, "inputs": inputs}


def keeps(form: WeightForm, k: int = 0) -> tuple[Scheme | None, str | None]:
    """`kept_scheme` of a form as announced: 8 bits with zero points count as having some."""
    return kept_scheme(as_data(form), zeros=form.bits == 8 and not form.symmetric, k=k)


def keeps_expert(form: WeightForm, n: int, k: int) -> tuple[Scheme | None, str | None]:
    """`keeps` of an expert's linear [N, K], as the operator of experts holds it."""
    scheme, note = kept_expert_scheme(as_data(form), zeros=form.bits == 8 and not form.symmetric)
    if scheme is None:
        return None, note
    if scheme.format != "fp8":
        reason = unfit_groups(scheme.group_size, k)
        return (scheme, note) if reason is None else (None, reason)
    block = expert_block(scheme.group_size, (n, k))
    if block is None:
        return None, NEXT_EXPERT.format(scheme.group_size)
    return Scheme("fp8", block), note


def quant_json(quantization: Quantization) -> dict[str, Any]:
    """The manifest's `quant` for a quantized checkpoint: what it is, and what of it is kept."""
    scheme, _ = keeps(quantization.rules[0].form)
    return {**quantization.to_json(), "activations": scheme.activations if scheme else "none"}
